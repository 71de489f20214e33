"""Whether the kernels for Hopper are right on the GPU at hand, on real shapes.

Expected products are computed in float64 from one row and one column of every 64, so that no tile goes unseen; expected
codes by the definition on the CPU, because XLA's divisions on a GPU are approximate.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsjax.config import Fp8Kernel
from dsjax.pallas.choice import NUM_SMS
from dsjax.pallas.matmul.config import Kind
from dsjax.pallas.matmul.reference import TILE
from dsjax.pallas.matmul.tune import example
from dsjax.pallas.quantize import api as quantizers

Groups = tuple[tuple[int, int], ...]
LIMITS = {"e4m3": 2e-3, "bf16": 4e-3, "16bit": 1e-3}
"""Of errors relative to the largest value: float32 sums of codes (tensor cores keep about 14 bits of 128 products),
results in BF16, float32 sums of BF16."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: DeepSeek-V3's shapes."""

    rows: tuple[int, ...] = (4096, 64, 128)
    dense: Groups = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
    """N x K."""
    odd: Groups = ((576, 7168), (7168, 576))
    """Widths that are no multiple of 128: only checked."""
    experts: Groups = ((4096, 7168), (7168, 2048))
    grouped: Groups = ((4, 8192), (8, 4096))
    """Groups and rows of each."""
    masked: Groups = ((1, 1024), (2, 512), (4, 256))
    width: int = 7168
    hidden: int = 2048
    attention: int = 16384
    """Width of attention's output."""
    num_sms: tuple[int, int] = (112, NUM_SMS)
    cuts: int = 100
    """Most cuts of a product that are tried."""


TINY = Sizes(
    rows=(8,),
    dense=((64, 256),),
    odd=((72, 200),),
    experts=((64, 128),),
    grouped=((2, 128),),
    masked=((2, 16),),
    width=256,
    hidden=128,
    attention=256,
    cuts=2,
)
"""For a dry run."""


def checks(impl: Fp8Kernel, sizes: Sizes, *, dry_run: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    tokens = sizes.rows[0]
    few_groups = sizes.grouped[0][0]
    rows = few_groups * TILE if dry_run else tokens
    cases: list[tuple[str, Kind, tuple[int, ...], dict[str, Any]]] = []
    for n, k in (*sizes.dense, *sizes.odd):
        cases.append((f"scaled_matmul {tokens} x {n} x {k}", "dense", (tokens, n, k), {}))
    n, k = sizes.dense[0]
    for m in sizes.rows[1:]:
        cases.append((f"scaled_matmul {m} x {n} x {k}", "dense", (m, n, k), {}))
    for n, k in (sizes.dense[0], sizes.odd[0]):
        cases.append((f"scaled_matmul 1D1D {n} x {k} x {rows}", "dense_1d1d", (n, k, rows), {}))
    for n, k in sizes.experts:
        cases.append((f"grouped_scaled_matmul {rows} x {n} x {k}", "grouped", (rows, n, k, few_groups), {}))
        groups, c = sizes.masked[-1]
        cases.append((f"masked_scaled_matmul {groups} x {c} x {n} x {k}", "masked", (c, n, k, groups), {}))
        for contract in (2, 1):
            what = f"grouped_matmul {rows} x {n} x {k}, contract {contract}"
            cases.append((what, "grouped_16bit", (rows, n, k, few_groups), {"contract": contract}))
        for adds in (False, True):
            added = ", adding" if adds else ""
            shape = (n, k, rows, few_groups)
            cases.append((f"grouped_scaled_wgrad {n} x {k} x {rows}{added}", "wgrad", shape, {"adds": adds}))
            cases.append((f"grouped_wgrad {n} x {k} x {rows}{added}", "wgrad_16bit", shape, {"adds": adds}))
    for name, kind, shape, how in cases:
        yield name, partial(_check_product, impl, kind, *shape, **how)
    for name, quantizer in quantizer_cases(sizes, checked=True).items():
        yield name, partial(_check_quantizer, impl, quantizer)


def _check_product(
    impl: Fp8Kernel, kind: Kind, m: int, n: int, k: int, groups: int = 1, *, contract: int = 2, adds: bool = False
) -> dict[str, Any]:
    """Multiply with random scales and uneven groups, and compare a row and a column of every 64 with float64."""
    rng = np.random.default_rng(m + n + k)
    arrays, function, out_dtype = example(kind, m, n, k, groups)
    arrays = list(arrays)
    for i in (1, 3) if not kind.endswith("16bit") else ():
        arrays[i] = jnp.asarray(rng.uniform(0.5, 2, arrays[i].shape), jnp.float32)
    # The second of several groups is empty, and what comes behind the last group is no group's.
    tiles = (k if kind.startswith("wgrad") else m) // TILE
    group_of_tile = np.sort(rng.choice([g for g in range(groups + 1) if g != 1 or groups == 1], tiles))
    into = jnp.asarray(rng.standard_normal((groups, m, n), np.float32)) * 100 if adds else None
    if contract == 1:
        arrays[0] = jax.random.normal(jax.random.key(0), (m, n), jnp.bfloat16)
    match kind:
        case "grouped" | "grouped_16bit":
            arrays[-1] = jnp.asarray(group_of_tile, jnp.int32)
        case "wgrad" | "wgrad_16bit":
            arrays[-1] = jnp.asarray(np.bincount(group_of_tile, minlength=groups + 1)[:groups] * TILE, jnp.int32)
        case "masked":
            arrays[-1] = jnp.asarray([m, *rng.integers(0, m + 1, groups - 1)], jnp.int32)
    how = {"contract": contract} if kind == "grouped_16bit" else {}
    summand = {"into": into} if adds else {}
    run = jax.jit(lambda arrays, summand: function(*arrays, **summand, **how, impl=impl))
    found = np.asarray(run(arrays, summand))
    rows, columns = (_one_of_every_64(size, rng) for size in found.shape[-2:])
    found = found[..., rows, :][..., columns].astype(np.float64)
    wanted = _expected(kind, [np.asarray(array) for array in arrays], rows, columns, contract)
    if kind == "masked":  # the other rows are not specified
        there = rows[None, :, None] < np.asarray(arrays[-1])[:, None, None]
        found, wanted = np.where(there, found, 0), np.where(there, wanted, 0)
    if adds:
        wanted = wanted + np.asarray(into, np.float64)[:, rows][:, :, columns]
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    limit = LIMITS["bf16" if out_dtype == jnp.bfloat16 else "16bit" if kind.endswith("16bit") else "e4m3"]
    if error <= limit:
        return {"max_relative_error": error, "limit": limit}
    return {"limit": limit, "error": f"relative error {error:.2e}, should be at most {limit:g}"}  # also of no number


def _one_of_every_64(size: int, rng: np.random.Generator) -> np.ndarray:
    first = np.arange(0, size, 64)
    return np.unique([0, size - 1, *np.minimum(first + rng.integers(0, 64, first.size), size - 1)])


def _expected(kind: Kind, arrays: list[np.ndarray], rows: np.ndarray, columns: np.ndarray, contract: int) -> np.ndarray:
    """Return some rows and columns of a product in float64."""

    def values(codes: np.ndarray, scales: np.ndarray, index: np.ndarray, of: int = 1) -> np.ndarray:
        spread = np.repeat(scales[..., index // of, :].astype(np.float64), TILE, axis=-1)
        return codes[..., index, :].astype(np.float64) * spread[..., : codes.shape[-1]]

    match kind:
        case "dense" | "dense_1d1d":
            a, a_scales, b, b_scales = arrays
            of = TILE if kind == "dense" else 1
            return values(a, a_scales, rows) @ values(b, b_scales, columns, of).T
        case "masked":
            x, x_scales, w, w_scales, _ = arrays
            return values(x, x_scales, rows) @ values(w, w_scales, columns, TILE).swapaxes(1, 2)
        case "grouped" | "grouped_16bit":
            *operands, group_of_tile = arrays
            if kind == "grouped":
                x, x_scales, w, w_scales = operands
                left, right = values(x, x_scales, rows), values(w, w_scales, columns, TILE)
            else:
                x, w = operands
                left = x[rows].astype(np.float64)
                right = (w[:, columns] if contract == 2 else w[:, :, columns].swapaxes(1, 2)).astype(np.float64)
            wanted, group = np.zeros((rows.size, columns.size)), group_of_tile[rows // TILE]
            for g, matrix in enumerate(right):
                wanted[group == g] = left[group == g] @ matrix.T
            return wanted
        case "wgrad" | "wgrad_16bit":
            *operands, padded_sizes = arrays
            if kind == "wgrad":
                dy_t, dy_scales, x_t, x_scales = operands
                left, right = values(dy_t, dy_scales, rows), values(x_t, x_scales, columns)
            else:
                dy, x = operands
                left, right = dy[:, rows].T.astype(np.float64), x[:, columns].T.astype(np.float64)
            ends = np.cumsum(padded_sizes)
            spans = [slice(end - size, end) for end, size in zip(ends, padded_sizes, strict=True)]
            return np.stack([left[:, span] @ right[:, span].T for span in spans])
    raise AssertionError(kind)


@dataclass(frozen=True)
class QuantizerCase:
    """A quantizer and its inputs' shapes."""

    function: Callable[..., Any]
    """Of its inputs, and `impl`."""
    inputs: tuple[tuple[tuple[int, ...], Any], ...]
    """Shapes and types; codes or words, and the scales behind them, are drawn as such."""
    exact: bool = True
    """Whether codes are those of the definition to the bit."""
    transposed: tuple[int, ...] = ()
    """Which inputs are scales, natural here, that other quantizers write transposed."""
    results: tuple[int, ...] = ()
    """Which results are such scales."""
    timed: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *inputs: Any, impl: Fp8Kernel, swap: bool = False) -> list[Array]:
        """Return the results; with `swap`, scales are taken and given as they lie between kernels."""
        given = [x.swapaxes(-1, -2) if swap and i in self.transposed else x for i, x in enumerate(inputs)]
        outputs = jax.tree.leaves(self.function(*given, impl=impl, **self.options))
        return [y.swapaxes(-1, -2) if swap and i in self.results else y for i, y in enumerate(outputs)]


def quantizer_cases(sizes: Sizes, checked: bool) -> dict[str, QuantizerCase]:
    tokens, width, hidden = sizes.rows[0], sizes.width, sizes.hidden
    (groups, rows), (n, k) = sizes.grouped[-1], sizes.experts[0]
    bf16, f32, e4m3 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn
    x, swiglu_rows = ((tokens, width), bf16), tokens if checked else groups * rows
    both, weights = ((swiglu_rows, 2 * hidden), bf16), ((swiglu_rows,), f32)
    matrices = (n, k) if checked else (groups, n, k)
    attended, power = (tokens, sizes.attention), {"power_of_two": True}
    codes = (((tokens, width), e4m3), ((tokens, width // TILE), f32))

    def norm(x: Array, gain: Array, **how: Any) -> Any:
        return quantizers.rms_norm_tiles(x, gain, 1e-6, **how)

    def name(what: str, shape: Sequence[int]) -> str:
        return f"{what} {' x '.join(map(str, shape))}"

    found = {
        name("tiles", x[0]): QuantizerCase(quantizers.tiles, (x,), results=(1,)),
        name("tiles, powers of two,", x[0]): QuantizerCase(
            quantizers.tiles, (x,), results=(1,), timed=False, options=power
        ),
        name("tiles_transposed", x[0]): QuantizerCase(quantizers.tiles_transposed, (x,), results=(1,)),
        name("requantize_transposed", x[0]): QuantizerCase(
            quantizers.requantize_transposed, codes, transposed=(1,), results=(1,), options=power
        ),
        name("blocks", matrices): QuantizerCase(quantizers.blocks, ((matrices, f32),)),
        name("rms_norm_tiles", x[0]): QuantizerCase(norm, (x, ((width,), f32)), exact=False),
        name("swiglu_tiles", both[0]): QuantizerCase(
            quantizers.swiglu_tiles, (both, weights), exact=False, results=(1,)
        ),
        name("swiglu_backward", both[0]): QuantizerCase(
            quantizers.swiglu_backward, (both, weights, ((swiglu_rows, hidden), bf16)), exact=False
        ),
        name("transpose", matrices): QuantizerCase(quantizers.transpose, ((matrices, e4m3),)),
        name("pack_e5m6", attended): QuantizerCase(quantizers.pack_e5m6, ((attended, bf16),)),
        name("unpack_e5m6", attended): QuantizerCase(
            quantizers.unpack_e5m6,
            (((tokens, 3 * sizes.attention // 8), jnp.uint32), ((tokens, sizes.attention // TILE), f32)),
            options={"dtype": bf16},
        ),
    }
    return {name: quantizer for name, quantizer in found.items() if checked or quantizer.timed}


def draw(quantizer: QuantizerCase, rng: np.random.Generator) -> list[np.ndarray]:
    """Return inputs whose tiles differ in magnitude."""
    arrays = []
    for shape, dtype in quantizer.inputs:
        values = rng.standard_normal(shape, np.float32)
        if dtype == jnp.uint32:
            values = rng.integers(2**32, size=shape, dtype=np.uint32)
        elif dtype == jnp.float8_e4m3fn:
            values *= 100
        elif any(x in (jnp.float8_e4m3fn, jnp.uint32) for _, x in quantizer.inputs):  # scales, here powers of two
            values = np.exp2(rng.integers(-8, 8, shape)).astype(np.float32)
        elif len(shape) > 1 and shape[-1] % TILE == 0:
            spread = np.exp2(rng.uniform(-6, 2, (*shape[:-1], shape[-1] // TILE))).astype(np.float32)
            values *= np.repeat(spread, TILE, axis=-1)
        arrays.append(values.astype(dtype))
    return arrays


def _check_quantizer(impl: Fp8Kernel, quantizer: QuantizerCase) -> dict[str, Any]:
    inputs = draw(quantizer, np.random.default_rng(0))
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise ValueError("JAX has no CPU beside the GPU to compute codes: JAX_PLATFORMS should not be set") from None
    found = [np.asarray(y) for y in jax.jit(partial(quantizer, impl=impl))(*map(jnp.asarray, inputs))]
    with jax.default_device(cpu):
        on_cpu = [jax.device_put(x, cpu) for x in inputs]
        wanted = [np.asarray(y) for y in jax.jit(partial(quantizer, impl="xla"))(*on_cpu)]
    result: dict[str, Any] = {}
    wrong = []
    for i, (have, want) in enumerate(zip(found, wanted, strict=True)):
        if want.dtype == jnp.float8_e4m3fn:
            differing = int((have.view(np.uint8) != want.view(np.uint8)).sum())
            result |= {"differing_codes": differing, "codes": want.size}
            allowed = 0 if quantizer.exact else want.size // 200
            if differing > allowed:
                wrong.append(f"{differing} of {want.size} codes differ, at most {allowed} should")
        elif quantizer.exact:
            differing = int((have != want).sum())
            what = {"uint32": "words", "bfloat16": "numbers"}.get(want.dtype.name, "scales")
            result[f"differing_{what}"] = differing
            if differing:
                wrong.append(f"{differing} of {want.size} {what} differ")
        else:
            have64, want64 = have.astype(np.float64), want.astype(np.float64)
            error = float(np.abs(have64 - want64).max() / np.abs(want64).max())
            limit = 2.0**-7 if want.dtype == jnp.bfloat16 else 1e-4
            result[f"max_relative_error_{i}"] = error if math.isfinite(error) else str(error)
            if not error <= limit:
                wrong.append(f"result {i} has a relative error of {error:.2e}, should be at most {limit:.1e}")
    return result | ({"error": "; ".join(wrong)} if wrong else {})
