"""A process that runs kernels in the Mosaic GPU interpreter, and compares them with their definitions.

The interpreter may hang for ever on a wrong kernel and cannot be interrupted, and after an error it holds on to what it
had allocated. So it has a process of its own, which `conftest.simulate` talks to: one case per line of standard input,
one answer per line of standard output, both JSON.
"""

import functools
import inspect
import json
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

from dsjax.pallas.matmul import calls, kernel, scaled, sixteen_bits
from dsjax.pallas.matmul.config import Config


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _codes(seed: int, *shape: int, rows: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Codes in E4M3 and scales, each of so many rows and 128 columns; any numbers will do."""
    *groups, m, k = shape
    scales = np.random.default_rng(seed + 10).uniform(0.5, 2, (*groups, -(-m // rows), -(-k // 128)))
    return _normal(seed, *shape).astype(jnp.float8_e4m3fn), scales.astype(np.float32)


def _layout(sizes: list[int], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The group of every 128 rows, and rows of every group rounded up to 128."""
    padded = np.array([-(-size // 128) * 128 for size in sizes])
    groups = np.repeat(np.arange(len(sizes)), padded // 128)
    group_of_tile = np.full(rows // 128, len(sizes))
    group_of_tile[: len(groups)] = groups
    return group_of_tile.astype(np.int32), padded.astype(np.int32)


def dense(m, n, k, rows=128, **how):
    return scaled.scaled_matmul, (*_codes(0, m, k), *_codes(1, n, k, rows=rows)), how | {"rows": rows}


def grouped(sizes, r, n, k, **how):
    group_of_tile, _ = _layout(sizes, r)
    return scaled.grouped_scaled_matmul, (*_codes(0, r, k), *_codes(1, len(sizes), n, k, rows=128), group_of_tile), how


def masked(counts, c, n, k, **how):
    groups = len(counts)
    operands = (*_codes(0, groups, c, k), *_codes(1, groups, n, k, rows=128))
    return scaled.masked_scaled_matmul, (*operands, np.array(counts, np.int32)), how


def wgrad(sizes, r, n, k, into=False, **how):
    _, padded = _layout(sizes, r)
    how |= {"into": _normal(2, len(sizes), n, k)} if into else {}
    return scaled.grouped_scaled_wgrad, (*_codes(0, n, r), *_codes(1, k, r), padded), how


def grouped_16bit(sizes, r, n, k, contract=2, **how):
    group_of_tile, _ = _layout(sizes, r)
    x, w = _normal(0, r, k if contract == 2 else n), _normal(1, len(sizes), n, k)
    operands = (array.astype(jnp.bfloat16) for array in (x, w))
    return sixteen_bits.grouped_matmul, (*operands, group_of_tile), how | {"contract": contract}


def wgrad_16bit(sizes, r, n, k, into=False, **how):
    _, padded = _layout(sizes, r)
    how |= {"into": _normal(2, len(sizes), n, k)} if into else {}
    operands = (array.astype(jnp.bfloat16) for array in (_normal(0, r, n), _normal(1, r, k)))
    return sixteen_bits.grouped_wgrad, (*operands, padded), how


def compare(case: dict) -> dict:
    """Run one case by the interpreter and by the definition."""
    build = globals()[case.pop("kind")]
    config = Config(**case.pop("config"))
    num_sms = case.pop("num_sms")
    counts = case.get("counts")
    if "out_dtype" in case:
        case["out_dtype"] = jnp.dtype(case["out_dtype"])
    function, arrays, how = build(**case)
    arrays = jax.tree.map(jnp.asarray, arrays)
    found = np.asarray(function(*arrays, **how, impl="interpret", num_sms=num_sms, config=config), np.float32)
    definition = jax.jit(functools.partial(function, **how, impl="xla"))
    wanted = np.asarray(definition(*arrays), np.float32)
    if counts is not None:
        there = np.arange(wanted.shape[1])[None, :, None] < np.array(counts)[:, None, None]
        found, wanted = np.where(there, found, 0), np.where(there, wanted, 0)
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    return {"error": error, "races": bool(interpreter.get_races().races_found), "largest": float(np.abs(wanted).max())}


def change(old: str, new: str) -> None:
    """Replace a piece of the kernel's source by another."""
    source = inspect.getsource(kernel)
    assert old in source, f"not in {kernel.__file__}: {old}"
    exec(compile(source.replace(old, new), kernel.__file__, "exec"), vars(kernel))
    for module in (calls, scaled, sixteen_bits):
        module.multiply = kernel.multiply


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)  # as in tests/conftest.py
    if sys.argv[1:]:
        change(*sys.argv[1:])
    for line in sys.stdin:
        try:
            answer = compare(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"raised": f"{type(error).__name__}: {error}"}
            interpreter.reset_gpu_interpret_mode_state()
        print(json.dumps(answer), flush=True)
