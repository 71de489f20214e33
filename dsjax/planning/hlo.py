"""Reading a compiled program: which collectives XLA made of it, of how many bytes, and what runs while they are on."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

KINDS = (
    *("all-to-all", "ragged-all-to-all", "all-gather", "reduce-scatter", "all-reduce"),
    *("collective-permute", "collective-broadcast"),
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_OPERATION = re.compile(rf"^\s*(?:ROOT )?%?(\S+) = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)\}?")
_PRODUCT = re.compile(r' (?:dot|convolution)\(|custom_call_target="(?:__cublas|__cudnn|__triton_gemm|mosaic_gpu)')
_ARRAY = re.compile(r"\b([a-z]+[0-9]+[a-z0-9]*|pred)\[([0-9,]*)\]")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Collective:
    """One collective operation of a program."""

    kind: str
    """One of `KINDS`; asynchronous ones have the name of the synchronous."""
    nbytes: int
    """Size of its result on one device. An all-to-all's result is as large as its operand."""
    groups: tuple[tuple[int, ...], ...]
    """Devices that take part together; empty for pairs of devices."""
    op_name: str
    """Where it comes from in the program that was traced, with its named scopes."""
    computation: str
    """Of the program that was compiled: the body of a loop, a branch, ..."""
    products: int
    """Operations with matrix products that are launched between its start and its end; 0 if it is synchronous."""

    def bytes_sent(self, far: Callable[[int, int], bool]) -> float:
        """Return how many bytes the device that sends most sends to those for which `far(sender, receiver)` holds.

        For an all-to-all, where every member of a group gets an equal part.

        Raises:
            ValueError: it is another kind.
        """
        if self.kind != "all-to-all":
            raise ValueError(f"bytes sent by {self.kind}: only those of an all-to-all are known")
        most = max(sum(far(a, b) for b in group) / len(group) for group in self.groups for a in group)
        return self.nbytes * most


def collectives(text: str) -> list[Collective]:
    """Return the collectives of a program, `jax.stages.Compiled.as_text()`, in the order of the text.

    That is the order of execution within each computation, if the program has been scheduled.
    """
    bodies: dict[str, list[str]] = {}
    lines = bodies.setdefault("", [])
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            lines = bodies.setdefault(begins[1], [])
        else:
            lines.append(line)
    with_products: dict[str, bool] = {}

    def multiplies(line: str) -> bool:
        """Return whether an operation, or one that it calls, is a matrix product."""
        if _PRODUCT.search(line):
            return True
        for names in _CALLED.findall(line):
            for name in names.replace("%", "").split(", "):
                if name not in with_products:
                    with_products[name] = any(map(multiplies, bodies.get(name, ())))
                if with_products[name]:
                    return True
        return False

    found = []
    for computation, lines in bodies.items():
        for at, line in enumerate(lines):
            if match := _OPERATION.match(line):
                products = 0
                if match[4]:
                    done = re.compile(rf" {match[3]}-done\(.*%?{re.escape(match[1])}\)")
                    for after in lines[at + 1 :]:
                        if done.search(after):
                            break
                        products += multiplies(after)
                name = _OP_NAME.search(line)
                found.append(
                    Collective(
                        kind=match[3],
                        nbytes=_nbytes(match[2], started=bool(match[4])),
                        groups=_groups(line),
                        op_name=name[1] if name else "",
                        computation=computation,
                        products=products,
                    )
                )
    return found


def _nbytes(result: str, *, started: bool) -> int:
    # The result of a start is ((operands, ...), result), or (operand, result).
    arrays = _ARRAY.findall(result.partition("), ")[2] if result.startswith("((") else result)
    if started and result.startswith("(") and not result.startswith("(("):
        arrays = arrays[len(arrays) // 2 :]
    return sum(math.prod(map(int, filter(None, shape.split(",")))) * _itemsize(kind) for kind, shape in arrays)


def _itemsize(dtype: str) -> float:
    if dtype == "pred":
        return 1
    return int(re.match(r"[a-z]+([0-9]+)", dtype)[1]) / 8


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
    """Read replica groups in any of XLA's three notations."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        axes = re.findall(r"'(\w+)'", match[2])
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        kept = [name for name in sizes if name not in axes]
        order = [list(sizes).index(name) for name in [*kept, *axes]]
        rows = ids.transpose(order).reshape(-1, math.prod(sizes[name] for name in axes))
    elif match := re.search(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", line):
        shape, dims = (tuple(map(int, part.split(","))) for part in (match[1], match[2]))
        ids = np.arange(math.prod(dims)).reshape(dims)
        rows = (ids.transpose([int(i) for i in match[3].split(",")]) if match[3] else ids).reshape(shape)
    elif match := re.search(r"replica_groups=\{(\{[0-9,{}]*\})\}", line):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([0-9,]+)\}", match[1]))
    else:
        return ()
    return tuple(map(tuple, rows.tolist()))
