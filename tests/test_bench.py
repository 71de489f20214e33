"""The command `bench`: what it refuses, and the benchmark of kernels gone through without a GPU."""

import json
import time
from types import SimpleNamespace
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax import bench
from dsjax.benchmarks import kernels
from dsjax.benchmarks.clock import Clock, Rival
from dsjax.pallas.matmul import scaled
from dsjax.pallas.matmul.tune import example
from dsjax.runtime import made_for


def test_help_names_the_benchmarks(capsys):
    for argv in (["--help"], ["-h"]):
        with pytest.raises(SystemExit, match="0"):
            bench.main(argv)
        out = capsys.readouterr().out
        assert "  train " in out and "  kernels " in out
    for command, option in (("train", "--steps"), ("kernels", "--budget")):
        with pytest.raises(SystemExit, match="0"):
            bench.main([command, "--help"])
        assert option in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "no command is named: give one of train, kernels"),
        (["kernel"], "unknown command 'kernel': must be one of train, kernels"),
        (["train"], "no run is named"),
        (["train", "nowhere.toml"], "nowhere.toml: no such file"),
        (["kernels"], "needs a Hopper GPU"),
        (["kernels", "--repeats", "0"], "repeats = 0: must be at least 1"),
        (["kernels", "--only", "everything"], "only = ('everything',): must be a list, each item one of 'check'"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(argv)
    out, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1 and not out


def test_groups_are_those_that_can_be_asked_for():
    (names, _) = get_args(get_type_hints(bench.Kernels)["only"])
    assert list(get_args(names)) == list(kernels.GROUPS)


def run(capsys, *options):
    """Exit status, report, and what was said on stderr."""
    status = bench.main(["kernels", "--dry-run", "--repeats", "1", *options])
    out, said = capsys.readouterr()
    return status, json.loads(out), said


def test_a_dry_run_goes_through_everything(capsys):
    status, report, said = run(capsys)
    assert status == 0 and not report["failures"] and not report["skipped"]
    by_group = {group: [r for r in report["results"] if r["group"] == group] for group in kernels.GROUPS}
    assert all(by_group.values())
    for result in by_group.pop("check"):
        assert "max_relative_error" in result or "differing_codes" in result or "max_relative_error_0" in result
    (tuned,) = by_group.pop("tune")
    assert len(tuned["cuts"]) == 2 and tuned["chosen_over_best"] >= 1
    for group, results in by_group.items():
        for result in results:
            assert "errors" not in result and result["us"][kernels.OURS] > 0
            assert set(result["us"]) == {kernels.OURS, *result["times_as_fast_as"]} and len(result["us"]) > 1
            assert ("gb_per_s" if group == "quantizers" else "tflops") in result
    assert all(f"\n{group}\n" in said for group in kernels.GROUPS)
    assert said.rstrip().endswith("skipped: 0")


def test_a_wrong_kernel_fails_and_the_others_are_looked_at(capsys, monkeypatch):
    product = scaled.scaled_matmul

    def wrong(a, *rest, **how):
        y = product(a, *rest, **how)
        return y.at[-1, -1].mul(3) if how.get("rows") == 1 else jnp.full_like(y, jnp.nan)

    monkeypatch.setattr(scaled, "scaled_matmul", wrong)
    status, report, said = run(capsys, "--only", "check")
    assert status == 1
    assert {failure.split()[1] for failure in report["failures"]} == {"scaled_matmul"} and len(report["failures"]) == 4
    assert "relative error nan" in report["failures"][0]
    assert sum("error" not in result for result in report["results"]) == len(report["results"]) - 4
    assert "\nfailures: 4\n" in said


def test_what_does_not_fit_into_the_budget_is_named(capsys):
    status, report, said = run(capsys, "--budget", "0", "--only", "sms", "tune")
    assert status == 0 and not report["results"]
    assert [label.partition(":")[0] for label in report["skipped"]] == ["sms", "tune"]
    assert "skipped: 2\n  sms: " in said


def idle_bench():
    return kernels.Bench(budget=100, repeats=2, only=(), torch=False, dry_run=True)


def test_rivals_take_turns_and_may_fail():
    turns = []

    def rival(name):
        return Rival(lambda: turns.append(name), [()])

    def unsupported():
        raise RuntimeError("not in this version")

    found = idle_bench().race({kernels.OURS: lambda: rival("a"), "b": lambda: rival("b"), "c": unsupported}, flops=1e6)
    warm_up, timed = turns[:6], turns[6:]
    assert warm_up == ["a"] * 3 + ["b"] * 3 and timed[:16] == (["a"] * 4 + ["b"] * 4) * 2
    assert found["errors"] == {"c": "RuntimeError: not in this version"}
    assert set(found["us"]) == {kernels.OURS, "b"}


def test_calls_get_operands_in_turns_or_give_them_back():
    given = []
    Rival(given.append, [(1,), (2,), (3,)]).run(4)
    assert given == [1, 2, 3, 1]
    adding = Rival(lambda total, x: total + x, [(1,), (10,)], carried=0)
    adding.run(3)
    assert adding.carried == 12


def test_the_clock_adds_up_kernels_and_leaves_out_what_empties_the_cache():
    launched = []
    cupti = SimpleNamespace(_cupti_init=launched.clear, _cupti_get_timings=lambda finalize: list(launched))
    clock = Clock(on_gpu=False)
    clock.cupti, clock.flushes = cupti, {"xor"}
    clock.flush = lambda: launched.append(("xor", 100.0))

    def call():
        launched.extend([("transpose", 0.5), ("product", 1.5)])

    assert clock(lambda calls: [call() for _ in range(calls)], 3) == pytest.approx(2e-3)
    assert clock.flushed(call, 3) == pytest.approx(2e-3)
    with pytest.raises(RuntimeError, match="saw no kernel"):
        clock(lambda calls: None, 3)


def test_a_kernel_that_hangs_ends_the_run_with_what_was_found(capsys, monkeypatch):
    ended = []
    monkeypatch.setattr(kernels, "ITEM_SECONDS", 0.05)
    monkeypatch.setattr(kernels.os, "_exit", ended.append)
    idle_bench()._item("check", "waits for ever", lambda: time.sleep(0.5) or {})
    assert ended == [1]
    (failure,) = json.loads(capsys.readouterr().out)["failures"]
    assert "waits for ever: hangs" in failure


@pytest.mark.parametrize("group", ["products", "quantizers", "experts", "gradients", "sms", "bf16"])
def test_what_is_timed_on_a_gpu_lowers(group, monkeypatch):
    """Every function of the real benchmark, with its real shapes, for CUDA; nothing is computed."""

    def nothing(shape, dtype):
        return np.broadcast_to(np.zeros((), dtype), shape)

    def shaped(*args):
        made = []

        def arrays():
            values, *rest = example(*args)
            made.extend(rest)
            return values

        return tuple(nothing(a.shape, a.dtype) for a in jax.eval_shape(arrays)), *made

    kinds = []

    def lower(function, arrays, into=None):
        given = arrays if into is None else (nothing(into.shape, into.dtype), *arrays)
        text = jax.jit(function).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
        kinds.append(text.count("mosaic_gpu_v2"))
        return Rival(lambda: None, [()])

    idle = idle_bench()
    idle.impl, idle.sizes, idle.dry_run, idle.of_jax = "mosaic", kernels.Sizes(), False, lower
    monkeypatch.setattr(kernels, "example", shaped)
    monkeypatch.setattr(kernels, "_normal", lambda dtype, *shape: nothing(shape, dtype))
    with made_for("gpu"):
        for name, measure in kernels.GROUPS[group](idle):
            kinds.clear()
            assert "errors" not in measure(), name
            assert kinds[0] == 1 and set(kinds) <= {0, 1}, name
