"""Reading a compiled program: which collectives XLA made of it, between which devices, of how many bytes."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

KINDS = (
    *("all-to-all", "ragged-all-to-all", "all-gather", "reduce-scatter", "all-reduce"),
    *("collective-permute", "collective-broadcast"),
)
_OPERATION = re.compile(rf"^\s*(?:ROOT )?%?\S+ = (.*?) ({'|'.join(KINDS)})(-start)?\(", re.MULTILINE)
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
    """Return the collectives of a program, `jax.stages.Compiled.as_text()`, in the order of the text."""
    found = []
    for match in _OPERATION.finditer(text):
        line = text[match.start() : text.find("\n", match.start() + 1)]
        # The result of a start is ((operands, ...), result), or (operand, result).
        arrays = _ARRAY.findall(match[1].partition("), ")[2] if match[1].startswith("((") else match[1])
        if match[3] and match[1].startswith("(") and not match[1].startswith("(("):
            arrays = arrays[len(arrays) // 2 :]
        name = _OP_NAME.search(line)
        nbytes = sum(math.prod(map(int, filter(None, shape.split(",")))) * _itemsize(kind) for kind, shape in arrays)
        found.append(Collective(match[2], nbytes, _groups(line), name[1] if name else ""))
    return found


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
