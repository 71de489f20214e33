"""The kernels for Hopper on the GPU at hand: whether they are right, how fast they are, and how fast the rest is.

`python -m dsjax.bench kernels` prints JSON. What is timed has rivals, in turns with it, and every call gets operands
that the L2 cache has forgotten: medians of the same minutes are compared, not figures of different days.

Times are those of kernels on the device (CUPTI), without gaps between them: small products take less than starting
them. Where CUPTI does not answer they are wall-clock times of queued calls, and the report says so. Scales lie as
quantizers leave them, so that no transposition of them is timed; tables of groups are made anew by every call. Rivals
have no scales, or one for the whole matrix, but for torch's blockwise product.

Expected products are computed in float64 from one row and one column of every 64, so that no tile goes unseen; expected
codes by the definition on the CPU, because XLA's divisions on a GPU are approximate.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from dsjax.config import Fp8Kernel
from dsjax.pallas.choice import NUM_SMS, resolve
from dsjax.pallas.matmul import sixteen_bits
from dsjax.pallas.matmul.config import Kind, candidates, config_for, registers_move
from dsjax.pallas.matmul.reference import TILE
from dsjax.pallas.matmul.tune import example, tune
from dsjax.pallas.quantize import api as quantizers

Groups = tuple[tuple[int, int], ...]
OURS = "kernel"
ROTATED = 256 * 2**20
"""Bytes of operands that calls take in turns: five times the L2 cache."""
MOST_SETS = 16
ITEM_SECONDS = 120
"""After which something hangs: a kernel may wait for what never comes."""
FIRST_SECONDS = {"check": 8, "tune": 40}
"""What the first item of a group is thought to take."""
OTHERS_FIRST_SECONDS = 15
TRANSPOSED_SCALES = {"dense": (1,), "dense_1d1d": (1, 3), "grouped": (1,), "masked": (1,), "wgrad": (1, 3)}
"""Which operands are scales that quantizers write transposed."""
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
    cuts=2,
)
"""For a dry run."""


@dataclass
class Rival:
    """Something that is timed: a function, and operands that its calls take in turns."""

    call: Callable[..., Any]
    sets: Sequence[tuple[Any, ...]]
    carried: Any = None
    """What every call takes before its operands and returns changed, in place."""
    wait: Callable[[Any], Any] = jax.block_until_ready
    done: int = 0

    def run(self, calls: int) -> None:
        """Call it so often, and wait."""
        result = None
        for _ in range(calls):
            operands = self.sets[self.done % len(self.sets)]
            self.done += 1
            if self.carried is None:
                result = self.call(*operands)
            else:
                result = self.carried = self.call(self.carried, *operands)
        self.wait(result)


class Clock:
    """Gives the seconds that a device works."""

    def __init__(self, on_gpu: bool):
        self.cupti = _cupti() if on_gpu else None
        self.name = "CUPTI: kernels on the device" if self.cupti else "wall clock of queued calls"
        self.flush, self.flushes = None, set()
        if self.cupti:
            xor, words = jax.jit(lambda words: words ^ 1), jnp.zeros(ROTATED // 4, jnp.uint32)
            self.flush = partial(xor, words)
            jax.block_until_ready(self.flush())
            self.flushes = {name for name, _ in _kernels_of(self.cupti, lambda: jax.block_until_ready(self.flush()))}

    def __call__(self, run: Callable[[int], Any], calls: int) -> float:
        """Return the seconds of one call, `run(calls)` being that many that it waits for."""
        if self.cupti is None:
            return wall_seconds(run, calls)
        return _sum(_kernels_of(self.cupti, lambda: run(calls))) / calls

    def flushed(self, call: Callable[[], Array], calls: int) -> float:
        """Return the seconds of a call on operands that are always the same, behind others that fill the cache; on the
        wall clock nothing can be told apart, and nothing is between."""

        def run() -> None:
            for _ in range(calls):
                self.flush()
                result = call()
            jax.block_until_ready(result)

        if self.cupti is None:
            return self(Rival(call, [()]).run, calls)
        found = _kernels_of(self.cupti, run)
        return _sum([(name, milliseconds) for name, milliseconds in found if name not in self.flushes]) / calls


def wall_seconds(run: Callable[[int], Any], calls: int) -> float:
    """Return the wall-clock time of one of some calls, which are queued and waited for together."""
    begin = time.perf_counter()
    run(calls)
    return (time.perf_counter() - begin) / calls


def _sum(kernels: list[tuple[str, float]]) -> float:
    seconds = sum(milliseconds for _, milliseconds in kernels) / 1e3
    if seconds <= 0:
        raise RuntimeError("CUPTI saw no kernel")
    return seconds


def _cupti() -> Any:
    """Return JAX's binding to CUPTI, None if it does not see kernels here."""
    try:
        from jax.experimental.mosaic.gpu import profiler

        binding = profiler.mosaic_gpu_lib._mosaic_gpu_ext
        add, x = jax.jit(lambda x: x + 1), jnp.zeros(2**20)
        jax.block_until_ready(add(x))
        _sum(_kernels_of(binding, lambda: jax.block_until_ready(add(x))))
        return binding
    except Exception:  # not installed, not permitted, or of another version: there is another clock
        return None


def _kernels_of(cupti: Any, run: Callable[[], Any]) -> list[tuple[str, float]]:
    """Return names and milliseconds of the kernels that `run` starts and waits for."""
    cupti._cupti_init()
    try:
        run()
    finally:
        kernels = cupti._cupti_get_timings(False)
    return kernels


class Bench:
    """One run: what it has found, and the time that it has left."""

    def __init__(self, *, budget: float, repeats: int, only: Sequence[str], torch: bool, dry_run: bool):
        self.begin, self.budget, self.repeats = time.perf_counter(), budget, repeats
        self.only, self.dry_run = only, dry_run
        self.impl: Fp8Kernel = "xla" if dry_run else "mosaic"
        self.sizes = TINY if dry_run else Sizes()
        self.clock = Clock(on_gpu=not dry_run)
        self.torch, self.torch_says = _torch() if torch and not dry_run else (None, "not asked")
        self.longest: dict[str, float] = {}
        self.results: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.skipped: list[str] = []

    def run(self) -> dict[str, Any]:
        """Measure, and return the report."""
        for group, items in GROUPS.items():
            if self.only and group not in self.only:
                continue
            try:
                for name, measure in items(self):
                    self._item(group, name, measure)
            except Exception as error:  # of the list itself; what was found is still printed
                self.failures.append(f"{group}: {_line(error)}")
        return self.report()

    def report(self) -> dict[str, Any]:
        """Return what was found until now."""
        return {
            "device": "cpu" if self.dry_run else jax.local_devices()[0].device_kind,
            "jax": jax.__version__,
            "jaxlib": importlib.metadata.version("jaxlib"),
            "torch": self.torch_says,
            "setmaxnreg": "kept" if registers_move() else "ignored: nvjitlink is installed",
            "clock": self.clock.name,
            "repeats": self.repeats,
            "dry_run": self.dry_run,
            "seconds": round(time.perf_counter() - self.begin, 1),
            "not_a_rival": "jax.nn.scaled_matmul: multiplies dequantized numbers, but on Blackwell with scales of E8M0",
            "results": self.results,
            "failures": self.failures,
            "skipped": self.skipped,
        }

    def _item(self, group: str, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        begin, label = time.perf_counter(), f"{group}: {name}"
        left = self.budget - (begin - self.begin)
        first = min(FIRST_SECONDS.get(group, OTHERS_FIRST_SECONDS), self.budget / 2)
        if left < self.longest.get(group, first) or left < 0:
            self.skipped.append(label)
            return
        watch = threading.Timer(ITEM_SECONDS, self._hangs, [label])
        watch.daemon = True
        watch.start()
        try:
            found = measure()
        except Exception as error:  # one kernel's failure is no reason not to look at the others
            found = {"error": _line(error)}
        finally:
            watch.cancel()
        seconds = time.perf_counter() - begin
        self.longest[group] = max(self.longest.get(group, 0.0), seconds)
        self.results.append({"group": group, "name": name, **found, "took_s": round(seconds, 2)})
        wrong = [error for rival, error in found.get("errors", {}).items() if rival.startswith(OURS)]
        failed = found.get("error") or "; ".join(wrong)
        if failed:
            self.failures.append(f"{label}: {failed}")
        _say(f"{time.perf_counter() - self.begin:6.1f} s  {label}{f'  FAILED: {failed}' if failed else ''}")

    def _hangs(self, label: str) -> None:
        """End the process, which waits for a kernel, with what was found."""
        self.failures.append(f"{label}: hangs, or takes more than {ITEM_SECONDS} s; what follows was not run")
        finish(self.report())
        os._exit(1)

    def race(self, builders: dict[str, Callable[[], Rival]], **amounts: float) -> dict[str, Any]:
        """Time rivals in turns; the first is ours.

        Args:
            amounts: `flops` or `nbytes` of a call.
        """
        rivals, errors = {}, {}
        for name, build in builders.items():
            try:
                rivals[name] = build()
                rivals[name].run(3)
            except Exception as error:  # of a rival: what this version does not support
                rivals.pop(name, None)
                errors[name] = _line(error)
        samples: dict[str, list[float]] = {name: [] for name in rivals}
        for _ in range(self.repeats):
            for name, rival in rivals.items():
                if name in errors:
                    continue
                try:
                    samples[name].append(self.clock(rival.run, max(4, len(rival.sets))))
                except Exception as error:
                    errors[name] = _line(error)
        medians = {name: statistics.median(times) for name, times in samples.items() if name not in errors}
        found: dict[str, Any] = {"us": {name: round(s * 1e6, 2) for name, s in medians.items()}}
        # What starting them adds: beside large products nothing, or the other clock is wrong.
        found["wall_us"] = {name: round(wall_seconds(rivals[name].run, 16) * 1e6, 2) for name in medians}
        found["fastest_us"] = {name: round(min(samples[name]) * 1e6, 2) for name in medians}
        for amount, (title, unit) in {"flops": ("tflops", 1e12), "nbytes": ("gb_per_s", 1e9)}.items():
            if amount in amounts:
                found[title] = {name: round(amounts[amount] / s / unit, 1) for name, s in medians.items()}
        if ours := medians.get(OURS):
            found["times_as_fast_as"] = {name: round(s / ours, 3) for name, s in medians.items() if name != OURS}
        return found | ({"errors": errors} if errors else {})

    def sets(self, arrays: Sequence[Array]) -> list[tuple[Array, ...]]:
        """Return these operands and copies of them, so many that the first are out of the cache when their turn
        comes again."""
        nbytes = sum(array.nbytes for array in arrays)
        count = 2 if self.dry_run else max(2, min(MOST_SETS, -(-ROTATED // nbytes)))
        return [tuple(arrays), *(tuple(jnp.array(array, copy=True) for array in arrays) for _ in range(count - 1))]

    def of_jax(self, function: Callable[..., Any], arrays: Sequence[Array], into: Array | None = None) -> Rival:
        """Return a compiled function with its operands; `into` is its first argument, given away."""
        donated = {} if into is None else {"donate_argnums": 0}
        given = arrays if into is None else (into, *arrays)
        compiled = jax.jit(function, **donated).lower(*given).compile()
        return Rival(compiled, self.sets(arrays), carried=into)

    def product(self, kind: Kind, m: int, n: int, k: int, groups: int = 1, *, adds: bool = False, **how: Any) -> Rival:
        """Return the kernel on random operands; see `tune.example`."""
        arrays, function, _ = example(kind, m, n, k, groups)
        swapped = TRANSPOSED_SCALES.get(kind, ())

        def swap(arrays: Sequence[Array]) -> list[Array]:
            return [array.swapaxes(-1, -2) if i in swapped else array for i, array in enumerate(arrays)]

        def run(*arrays: Array, **into: Array) -> Array:
            return function(*swap(arrays), impl=self.impl, **how, **into)

        if not adds:
            return self.of_jax(run, swap(arrays))
        into = jnp.zeros((groups, m, n), jnp.float32)
        return self.of_jax(lambda into, *arrays: run(*arrays, into=into), swap(arrays), into)


# What is checked.


def _checks(bench: Bench) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    sizes, tokens = bench.sizes, bench.sizes.rows[0]
    few_groups = sizes.grouped[0][0]
    rows = few_groups * TILE if bench.dry_run else tokens
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
        yield name, partial(_check_product, bench.impl, kind, *shape, **how)
    for name, quantizer in _quantizers(sizes, checked=True).items():
        yield name, partial(_check_quantizer, bench.impl, quantizer)


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
class _Quantizer:
    """A quantizer and its inputs' shapes."""

    function: Callable[..., Any]
    """Of its inputs, and `impl`."""
    inputs: tuple[tuple[tuple[int, ...], Any], ...]
    """Shapes and types; codes, and the scales behind them, are drawn as such."""
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


def _quantizers(sizes: Sizes, checked: bool) -> dict[str, _Quantizer]:
    tokens, width, hidden = sizes.rows[0], sizes.width, sizes.hidden
    (groups, rows), (n, k) = sizes.grouped[-1], sizes.experts[0]
    bf16, f32, e4m3 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn
    x, swiglu_rows = ((tokens, width), bf16), tokens if checked else groups * rows
    both, weights = ((swiglu_rows, 2 * hidden), bf16), ((swiglu_rows,), f32)
    matrices = (n, k) if checked else (groups, n, k)
    power = {"power_of_two": True}
    codes = (((tokens, width), e4m3), ((tokens, width // TILE), f32))

    def norm(x: Array, gain: Array, **how: Any) -> Any:
        return quantizers.rms_norm_tiles(x, gain, 1e-6, **how)

    def name(what: str, shape: Sequence[int]) -> str:
        return f"{what} {' x '.join(map(str, shape))}"

    found = {
        name("tiles", x[0]): _Quantizer(quantizers.tiles, (x,), results=(1,)),
        name("tiles, powers of two,", x[0]): _Quantizer(
            quantizers.tiles, (x,), results=(1,), timed=False, options=power
        ),
        name("tiles_transposed", x[0]): _Quantizer(quantizers.tiles_transposed, (x,), results=(1,)),
        name("requantize_transposed", x[0]): _Quantizer(
            quantizers.requantize_transposed, codes, transposed=(1,), results=(1,), options=power
        ),
        name("blocks", matrices): _Quantizer(quantizers.blocks, ((matrices, f32),)),
        name("rms_norm_tiles", x[0]): _Quantizer(norm, (x, ((width,), f32)), exact=False),
        name("swiglu_tiles", both[0]): _Quantizer(quantizers.swiglu_tiles, (both, weights), exact=False, results=(1,)),
        name("swiglu_backward", both[0]): _Quantizer(
            quantizers.swiglu_backward, (both, weights, ((swiglu_rows, hidden), bf16)), exact=False
        ),
        name("transpose", matrices): _Quantizer(quantizers.transpose, ((matrices, e4m3),)),
    }
    return {name: quantizer for name, quantizer in found.items() if checked or quantizer.timed}


def _draw(quantizer: _Quantizer, rng: np.random.Generator) -> list[np.ndarray]:
    """Return inputs whose tiles differ in magnitude."""
    arrays = []
    for shape, dtype in quantizer.inputs:
        values = rng.standard_normal(shape, np.float32)
        if dtype == jnp.float8_e4m3fn:
            values *= 100
        elif any(x == jnp.float8_e4m3fn for _, x in quantizer.inputs):  # scales, of what is requantized powers of two
            values = np.exp2(rng.integers(-8, 8, shape)).astype(np.float32)
        elif len(shape) > 1 and shape[-1] % TILE == 0:
            spread = np.exp2(rng.uniform(-6, 2, (*shape[:-1], shape[-1] // TILE))).astype(np.float32)
            values *= np.repeat(spread, TILE, axis=-1)
        arrays.append(values.astype(dtype))
    return arrays


def _check_quantizer(impl: Fp8Kernel, quantizer: _Quantizer) -> dict[str, Any]:
    inputs = _draw(quantizer, np.random.default_rng(0))
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
            result["differing_scales"] = differing
            if differing:
                wrong.append(f"{differing} of {want.size} scales differ")
        else:
            have64, want64 = have.astype(np.float64), want.astype(np.float64)
            error = float(np.abs(have64 - want64).max() / np.abs(want64).max())
            limit = 2.0**-7 if want.dtype == jnp.bfloat16 else 1e-4
            result[f"max_relative_error_{i}"] = error if math.isfinite(error) else str(error)
            if not error <= limit:
                wrong.append(f"result {i} has a relative error of {error:.2e}, should be at most {limit:.1e}")
    return result | ({"error": "; ".join(wrong)} if wrong else {})


# What is timed.


def _dot(*contract: int, dtype: Any = jnp.bfloat16) -> Callable[[Array, Array], Array]:
    def dot(a: Array, b: Array) -> Array:
        batch = tuple(range(a.ndim - 2))
        return lax.dot_general(a, b, (((contract[0],), (contract[1],)), (batch, batch)), preferred_element_type=dtype)

    return dot


def _normal(dtype: Any, *shape: int) -> Array:
    return jax.random.normal(jax.random.key(len(shape)), shape, jnp.bfloat16).astype(dtype)


def _products(bench: Bench) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for m in bench.sizes.rows:
        for n, k in bench.sizes.dense:
            yield f"{m} x {n} x {k}", partial(_race_dense, bench, m, n, k)


def _race_dense(bench: Bench, m: int, n: int, k: int) -> dict[str, Any]:
    def by_xla(dtype: Any) -> Rival:
        return bench.of_jax(_dot(1, 1), (_normal(dtype, m, k), _normal(dtype, n, k)))

    rivals: dict[str, Callable[[], Rival]] = {
        OURS: lambda: bench.product("dense", m, n, k),
        "XLA bf16": lambda: by_xla(jnp.bfloat16),
        "XLA fp8": lambda: by_xla(jnp.float8_e4m3fn),
    }
    if bench.torch:
        rivals["torch per tensor"] = lambda: _torch_product(bench, m, n, k, blocks=False)
        rivals["torch blockwise"] = lambda: _torch_product(bench, m, n, k, blocks=True)
    return bench.race(rivals, flops=2 * m * n * k)


def _torch() -> tuple[Any, str]:
    """Return torch, None where it has no GPU, and what to say of it."""
    try:
        import torch  # ty: ignore

        if torch.cuda.is_available():
            return torch, f"{torch.__version__}, CUDA {torch.version.cuda}"
        return None, f"{torch.__version__} without CUDA"
    except Exception as error:  # also what its libraries do not like about JAX's
        return None, f"not here: {_line(error)}"


def _torch_product(bench: Bench, m: int, n: int, k: int, *, blocks: bool) -> Rival:
    torch = bench.torch

    def operands() -> tuple[Any, ...]:
        a, b = (torch.randn(size, k, device="cuda").to(torch.float8_e4m3fn) for size in (m, n))
        if not blocks:
            return a, b.t(), torch.ones((), device="cuda"), torch.ones((), device="cuda")
        # Scales of rows lie one beside the other; those of blocks as the matrix does.
        of_a = torch.ones(-(-k // TILE), m, device="cuda").t()
        return a, b.t(), of_a, torch.ones(-(-n // TILE), -(-k // TILE), device="cuda").t()

    def call(a: Any, b: Any, of_a: Any, of_b: Any) -> Any:
        how = {"scale_a": of_a, "scale_b": of_b, "out_dtype": torch.bfloat16, "use_fast_accum": not blocks}
        return torch._scaled_mm(a, b, **how)

    count = max(2, min(MOST_SETS, -(-ROTATED // ((m + n) * k))))
    return Rival(call, [operands() for _ in range(count)], wait=lambda _: torch.cuda.synchronize())


def _experts(bench: Bench) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Products of equal groups; a batched BF16 product of them, which knows that they are, is the rival."""

    def race(kind: Kind, groups: int, rows: int, n: int, k: int) -> dict[str, Any]:
        m = rows if kind == "masked" else groups * rows
        batched = (_normal(jnp.bfloat16, groups, rows, k), _normal(jnp.bfloat16, groups, n, k))
        rivals = {
            OURS: lambda: bench.product(kind, m, n, k, groups),
            "XLA bf16, batched": lambda: bench.of_jax(_dot(2, 2), batched),
        }
        return bench.race(rivals, flops=2 * groups * rows * n * k)

    for kind, cases in (("grouped", bench.sizes.grouped), ("masked", bench.sizes.masked)):
        for groups, rows in cases:
            for n, k in bench.sizes.experts:
                yield f"{kind} {groups} x {rows} x {n} x {k}", partial(race, kind, groups, rows, n, k)


def _gradients(bench: Bench) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    def race(groups: int, rows: int, n: int, k: int) -> dict[str, Any]:
        batched = (_normal(jnp.bfloat16, groups, rows, n), _normal(jnp.bfloat16, groups, rows, k))
        rivals = {
            OURS: lambda: bench.product("wgrad", n, k, groups * rows, groups),
            "kernel, adding": lambda: bench.product("wgrad", n, k, groups * rows, groups, adds=True),
            "XLA bf16, batched": lambda: bench.of_jax(_dot(1, 1, dtype=jnp.float32), batched),
        }
        return bench.race(rivals, flops=2 * groups * rows * n * k)

    for groups, rows in bench.sizes.grouped:
        for n, k in bench.sizes.experts:
            yield f"wgrad {groups} x {n} x {k} over {rows} rows", partial(race, groups, rows, n, k)


def _bf16(bench: Bench) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    groups, rows = bench.sizes.grouped[-1]

    def of(*shapes: tuple[int, int]) -> tuple[Array, ...]:
        return tuple(_normal(jnp.bfloat16, groups, *shape) for shape in shapes)

    def forward(n: int, k: int) -> dict[str, Any]:
        rivals = {
            OURS: lambda: bench.product("grouped_16bit", groups * rows, n, k, groups),
            "XLA bf16, batched": lambda: bench.of_jax(_dot(2, 2), of((rows, k), (n, k))),
        }
        return bench.race(rivals, flops=2 * groups * rows * n * k)

    def backward(n: int, k: int) -> dict[str, Any]:
        _, w, group_of_tile = example("grouped_16bit", groups * rows, n, k, groups)[0]
        arrays = (_normal(jnp.bfloat16, groups * rows, n), w, group_of_tile)
        kernel = partial(sixteen_bits.grouped_matmul, contract=1, impl=bench.impl)
        rivals = {
            OURS: lambda: bench.of_jax(kernel, arrays),
            "XLA bf16, batched": lambda: bench.of_jax(_dot(2, 1), of((rows, n), (n, k))),
        }
        return bench.race(rivals, flops=2 * groups * rows * n * k)

    def wgrad(n: int, k: int) -> dict[str, Any]:
        rivals = {
            OURS: lambda: bench.product("wgrad_16bit", n, k, groups * rows, groups),
            "kernel, adding": lambda: bench.product("wgrad_16bit", n, k, groups * rows, groups, adds=True),
            "XLA bf16, batched": lambda: bench.of_jax(_dot(1, 1, dtype=jnp.float32), of((rows, n), (rows, k))),
        }
        return bench.race(rivals, flops=2 * groups * rows * n * k)

    for n, k in bench.sizes.experts:
        for what, race in (("forward", forward), ("gradient of inputs", backward), ("gradient of weights", wgrad)):
            yield f"{what} {groups} x {rows} x {n} x {k}", partial(race, n, k)


def _quantizing(bench: Bench) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Bytes read and written, beside a copy that reads and writes as many."""

    def race(quantizer: _Quantizer) -> dict[str, Any]:
        inputs = [
            jnp.ones(shape[::-1]) if i in quantizer.transposed else _normal(dtype, *shape)
            for i, (shape, dtype) in enumerate(quantizer.inputs)
        ]
        outputs = jax.eval_shape(partial(quantizer, impl="xla", swap=True), *inputs)
        nbytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*inputs, *outputs))
        # XLA copies by the driver, which CUPTI counts as no kernel; a changed bit costs nothing.
        words = jnp.zeros(nbytes // 8, jnp.uint32)
        rivals = {
            OURS: lambda: bench.of_jax(partial(quantizer, impl=bench.impl, swap=True), inputs),
            "copy": lambda: bench.of_jax(lambda words: words ^ 1, [words]),
            "XLA": lambda: bench.of_jax(partial(quantizer, impl="xla", swap=True), inputs),
        }
        return bench.race(rivals, nbytes=nbytes)

    for name, quantizer in _quantizers(bench.sizes, checked=False).items():
        yield name, partial(race, quantizer)


def _sms(bench: Bench) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    m, (n, k), (fewer, all_of_them) = bench.sizes.rows[0], bench.sizes.experts[0], bench.sizes.num_sms

    def race() -> dict[str, Any]:
        rivals = {
            OURS: lambda: bench.product("dense", m, n, k, num_sms=all_of_them),
            f"kernel on {fewer} SMs": lambda: bench.product("dense", m, n, k, num_sms=fewer),
        }
        return bench.race(rivals, flops=2 * m * n * k)

    yield f"{m} x {n} x {k}, {all_of_them} SMs", race


def _cuts(bench: Bench) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    sizes = bench.sizes
    tokens, few = sizes.rows[0], sizes.rows[-1]
    groups, rows = sizes.grouped[-1]
    (n, k), (n2, k2) = sizes.experts[0], sizes.experts[-1]
    jobs: list[tuple[Kind, int, int, int, int]] = [
        ("dense", tokens, n, k, 1),
        ("grouped", groups * rows, n, k, groups),
        ("wgrad", n, k, groups * rows, groups),
        ("dense", few, *sizes.dense[0], 1),
        ("grouped_16bit", groups * rows, n, k, groups),
        ("masked", sizes.masked[-1][1], n, k, sizes.masked[-1][0]),
        *(("dense", tokens, *shape, 1) for shape in sizes.dense[1:4]),
        ("grouped", groups * rows, n2, k2, groups),
        ("wgrad", n2, k2, groups * rows, groups),
        ("wgrad_16bit", n, k, groups * rows, groups),
    ]
    for kind, *shape, of_groups in jobs if not bench.dry_run else jobs[:1]:
        what = f"{kind} {' x '.join(map(str, shape))}, {of_groups} group{'s' if of_groups > 1 else ''}"
        yield what, partial(_tune, bench, kind, *shape, of_groups)


def _tune(bench: Bench, kind: Kind, m: int, n: int, k: int, groups: int) -> dict[str, Any]:
    """Time every cut, and compare its results with those of the cut that is chosen."""
    _, _, out_dtype = example(kind, min(m, 128), 128, 128)
    chosen = config_for(kind, m, n, jnp.dtype(out_dtype))
    cuts = [chosen, *(cut for cut in candidates(kind, jnp.dtype(out_dtype)) if cut != chosen)][: bench.sizes.cuts]
    results: list[Array] = []

    def timer(run: Callable[[], Array]) -> float:
        results.append(jax.block_until_ready(run()))
        if len(results) > 1:
            first, other = (result.astype(jnp.float32) for result in (results[0], results.pop()))
            difference = float(jnp.abs(first - other).max() / jnp.abs(first).max())
            if not difference <= LIMITS["bf16"]:
                raise ValueError(f"differs by {difference:.2e} from the cut that is chosen")
        return statistics.median(bench.clock.flushed(run, 4) for _ in range(bench.repeats))

    timings = tune(kind, m, n, k, groups, configs=cuts, impl=bench.impl, timer=timer)
    errors = {str(timing.config): timing.error for timing in timings if timing.error}
    best, by_cut = timings[0], {timing.config: timing for timing in timings}
    found = {
        "best": asdict(best.config) | {"tflops": round(best.tflops, 1)},
        "chosen": asdict(chosen) | {"tflops": round(by_cut[chosen].tflops, 1)},
        "chosen_over_best": round(by_cut[chosen].seconds / best.seconds, 3) if not by_cut[chosen].error else None,
        "cuts": [
            f"{t.config.tile_m} x {t.config.tile_n}, {t.config.stages} stages, cluster {t.config.cluster}: "
            f"{t.tflops:.1f} TFLOP/s"
            for t in timings
            if not t.error
        ],
    }
    return found | ({"error": json.dumps(errors)} if errors else {})


GROUPS: dict[str, Callable[[Bench], Iterator[tuple[str, Callable[[], dict[str, Any]]]]]] = {
    "check": _checks,
    "products": _products,
    "quantizers": _quantizing,
    "experts": _experts,
    "gradients": _gradients,
    "sms": _sms,
    "bf16": _bf16,
    "tune": _cuts,
}
"""In the order in which they run: what a budget cuts off comes last."""


def measure(*, budget: float, repeats: int, only: Sequence[str], torch: bool, dry_run: bool) -> dict[str, Any]:
    """Run what is asked for, and return the report.

    Args:
        budget: seconds; what does not fit is skipped.
        only: names of `GROUPS`; all of them by default.
        torch: whether torch is a rival, where it is installed.
        dry_run: go through everything with tiny shapes, by the definitions on a CPU.

    Raises:
        ValueError: there is no Hopper GPU.
    """
    if not dry_run:
        try:
            resolve("mosaic")
        except ValueError:
            raise ValueError(
                f"bench kernels needs a Hopper GPU (H100, H200, H800), here is {jax.local_devices()[0].device_kind}; "
                "--dry-run goes through everything with tiny shapes on a CPU"
            ) from None
    # What a GPU makes of the definitions is not to the bit what they say.
    device = jax.default_device(jax.local_devices(backend="cpu")[0]) if dry_run else contextlib.nullcontext()
    with device:
        return Bench(budget=budget, repeats=repeats, only=only, torch=torch, dry_run=dry_run).run()


def finish(report: dict[str, Any]) -> int:
    """Print a report, JSON first and tables for people on stderr; return the exit status: 1 if something failed."""
    print(json.dumps(report, indent=2), flush=True)
    _say("\n".join(tables(report)))
    return 1 if report["failures"] else 0


def tables(report: dict[str, Any]) -> Iterator[str]:
    """Write a report for people."""
    heads = {key: report[key] for key in ("device", "jax", "torch", "setmaxnreg", "clock", "seconds")}
    yield "\n" + "; ".join(f"{key} {value}" for key, value in heads.items())
    for group in dict.fromkeys(result["group"] for result in report["results"]):
        yield f"\n{group}"
        for result in report["results"]:
            if result["group"] == group:
                yield f"  {result['name']:<48} {_figures(result)}"
    for title in ("failures", "skipped"):
        yield f"\n{title}: {len(report[title])}"
        yield from (f"  {line}" for line in report[title])


def _figures(result: dict[str, Any]) -> str:
    if "best" in result:
        best = result["best"]
        cut = f"{64 * best['warpgroups']} x {best['tile_n']}, {best['stages']} stages, cluster {best['cluster']}"
        return f"best {best['tflops']} TFLOP/s with {cut}; chosen {result['chosen']['tflops']}"
    unit = next((unit for unit in ("tflops", "gb_per_s") if unit in result), None)
    if unit is None:
        left_out = ("group", "name", "took_s", "limit", "codes")
        kept = {key: value for key, value in result.items() if key not in left_out}
        words = (f"{value:.1e}" if isinstance(value, float) else str(value) for value in kept.values())
        return ", ".join(map(" ".join, zip(kept, words, strict=True)))
    ratios = result.get("times_as_fast_as", {})
    words = [
        f"{name} {value:g}{f' ({ratios[name]:.2f}x)' if name in ratios else ''}" for name, value in result[unit].items()
    ]
    failed = [f"{name}: {error[:80]}" for name, error in result.get("errors", {}).items()]
    return f"{'TFLOP/s' if unit == 'tflops' else 'GB/s'}: {', '.join([*words, *failed])}"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
