"""The kernels for Hopper on the GPU at hand: whether they are right, how fast they are, and how fast the rest is.

`python -m dsjax.bench kernels` prints JSON. What is timed has rivals, in turns with it, and every call gets operands
that the L2 cache has forgotten: medians of the same minutes are compared, not figures of different days.

Times are those of kernels on the device (CUPTI), without gaps between them: small products take less than starting
them. Where CUPTI does not answer they are wall-clock times of queued calls, and the report says so. Scales lie as
quantizers leave them, so that no transposition of them is timed; tables of groups are made anew by every call. Rivals
have no scales, or one for the whole matrix, but for torch's blockwise product.
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
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from dsjax.benchmarks.clock import ROTATED, Clock, Rival, wall_seconds
from dsjax.benchmarks.kernel_checks import LIMITS, TINY, QuantizerCase, Sizes, checks, quantizer_cases
from dsjax.config import Fp8Kernel
from dsjax.pallas.choice import resolve
from dsjax.pallas.matmul import sixteen_bits
from dsjax.pallas.matmul.config import Kind, candidates, config_for, registers_move
from dsjax.pallas.matmul.reference import TILE
from dsjax.pallas.matmul.tune import example, tune

OURS = "kernel"
MOST_SETS = 16
ITEM_SECONDS = 120
"""After which something hangs: a kernel may wait for what never comes."""
FIRST_SECONDS = {"check": 8, "tune": 40}
"""What the first item of a group is thought to take."""
OTHERS_FIRST_SECONDS = 15
TRANSPOSED_SCALES = {"dense": (1,), "dense_1d1d": (1, 3), "grouped": (1,), "masked": (1,), "wgrad": (1, 3)}
"""Which operands are scales that quantizers write transposed."""


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

    def race(quantizer: QuantizerCase) -> dict[str, Any]:
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

    for name, quantizer in quantizer_cases(bench.sizes, checked=False).items():
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
    "check": lambda bench: checks(bench.impl, bench.sizes, dry_run=bench.dry_run),
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
