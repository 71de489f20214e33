"""The command `bench`: what it refuses, and the benchmark of kernels gone through without a GPU."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax import bench
from dsjax.benchmarks import generation, kernels, overlap
from dsjax.benchmarks.clock import Clock, Rival
from dsjax.checkpoint.huggingface import save_huggingface
from dsjax.data.tokenizer import Tokenizer
from dsjax.model.layout import unstack
from dsjax.model.transformer import initial_parameters
from dsjax.pallas.matmul import scaled
from dsjax.pallas.matmul.tune import example
from dsjax.runtime import made_for
from dsjax.settings import load_config, load_model_config


def test_help_names_the_benchmarks(capsys):
    for argv in (["--help"], ["-h"]):
        with pytest.raises(SystemExit, match="0"):
            bench.main(argv)
        out = capsys.readouterr().out
        assert "  train " in out and "  kernels " in out and "  overlap " in out and "  generate " in out
    options = {"train": "--steps", "overlap": "--sms", "generate": "--batches", "kernels": "--budget"}
    for command, option in options.items():
        with pytest.raises(SystemExit, match="0"):
            bench.main([command, "--help"])
        assert option in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "no command is named: give one of train, overlap, generate, kernels"),
        (["kernel"], "unknown command 'kernel': must be one of train, overlap, generate, kernels"),
        (["train"], "no run is named"),
        (["train", "nowhere.toml"], "nowhere.toml: no such file"),
        (["overlap", "configs/tiny.toml"], "mesh.pipe = 1 with pipeline.schedule = 'dualpipe': only a pipeline"),
        (["overlap", "configs/tiny_dualpipe.toml", "--sms", "200"], "kernels.communication_sms = 200: must be between"),
        (["overlap", "configs/tiny_dualpipe.toml", "--rounds", "0"], "rounds = 0: must be at least 1"),
        (["generate"], "argument PATH is missing"),
        (["generate", "nowhere"], "nowhere: no such folder"),
        (["generate", "nowhere", "--rounds", "0"], "rounds = 0: must be at least 1"),
        (["generate", "nowhere", "--batches", "8", "0"], "batches = (8, 0): must be numbers of at least 1"),
        (["generate", "nowhere", "--torch-threads", "0"], "torch_threads = (0,): must be numbers of at least 1"),
        (["generate", "nowhere", "--cached", "-1"], "cached = -1: must be at least 0"),
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
        assert any(key.startswith(("max_relative_error", "differing_")) for key in result)
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


def machine(platform, asked):
    """What measures a process, in place of one: overlapping gains a tenth, and 20 multiprocessors are best."""

    def of_process(config, steps):
        sms = config.kernels.communication_sms
        asked.append(sms)
        apart = 1.0 + abs(sms - 20) / 100
        seconds = {"overlapped": [0.9 * apart] * steps, "one_after_the_other": [apart] * steps}
        return {"platform": platform, "device": "a device", "seconds": seconds}

    return of_process


def test_numbers_of_multiprocessors_take_turns():
    asked, config = [], load_config(["configs/tiny_dualpipe.toml"])
    result = overlap.measure(config, overlap.Overlap((0, 20), 4, 3), machine("gpu", asked))
    assert asked == [0, 20] * 3
    rows = result["by_communication_sms"]
    assert [(row["overlapped_over_one_after_the_other"], row["samples"]) for row in rows.values()] == [(0.9, 12)] * 2
    assert rows["20"]["overlapped_s"] == 0.9 < rows["0"]["overlapped_s"] and not result["note"]
    assert overlap.table(result).count("\n") == 3


def test_a_cpu_has_nothing_to_sweep():
    asked, config = [], load_config(["configs/tiny_dualpipe.toml"])
    result = overlap.measure(config, overlap.Overlap((0, 20), 4, 3), machine("cpu", asked))
    assert asked == [0] * 3 and list(result["by_communication_sms"]) == ["0"]
    assert "there are no multiprocessors" in result["note"] and overlap.table(result).endswith(result["note"])


@pytest.mark.slow
def test_overlap_on_simulated_devices(tmp_path):
    """The command itself, in processes of their own."""
    words = "--mesh.pipe 2 --mesh.local 1 --train.batch_size 4 --train.micro_batch_size 1 --data.sequence_length 16"
    options = "--model.num_hidden_layers 3 --steps 1 --rounds 1"
    command = [sys.executable, "-m", "dsjax.bench", "overlap", "configs/tiny_dualpipe.toml"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, *words.split(), *options.split()], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["by_communication_sms"].values()
    assert min(row["overlapped_s"], row["one_after_the_other_s"]) > 0 and row["samples"] == 1
    assert "there are no multiprocessors" in done.stderr


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of random weights in Hugging Face's form."""
    folder = tmp_path_factory.mktemp("weights") / "hf"
    config = replace(load_model_config("tiny"), num_hidden_layers=2, vocab_size=300, num_nextn_predict_layers=0)
    save_huggingface(folder, config, *(unstack(tree, config) for tree in initial_parameters(config, 0)), "fp32")
    Tokenizer.train(["def a(b): return b"], config.vocab_size).save(folder / "tokenizer.json")
    return folder


QUICK = ("--batches", "1", "2", "--prompt-tokens", "5", "--max-tokens", "4", "--rounds", "1")
IN_PLACE_OF_TORCH = """#!{python}
import json, sys
print(json.dumps({{"torch": "none", "transformers": "none"}}), flush=True)
for line in sys.stdin:
    wanted = json.loads(line)
    tokens = [[-1] * wanted["max_tokens"] for prompt in wanted["prompts"]]
    found = {{"seconds": 4.0 / wanted["threads"], "tokens": tokens}}
    found |= {{"margins": [[0.25, 9.0, 9.0, 9.0]] * len(tokens)}} if wanted["margins"] else {{}}
    print(json.dumps(found), flush=True)
"""


def test_generation_beside_torch(weights, tmp_path, capsys):
    python = tmp_path / "python"
    python.write_text(IN_PLACE_OF_TORCH.format(python=sys.executable))
    python.chmod(0o755)
    assert bench.main(["generate", str(weights), *QUICK, "--cached", "5", "--torch", str(python)]) == 0
    out, said = capsys.readouterr()
    result = json.loads(out)
    assert list(result["by_batch"]) == ["1", "2"] and result["versions"]["torch"] == "none"
    for batch, found in result["by_batch"].items():
        rates = found["tokens_per_s"]
        assert list(rates) == ["dsjax", "cached", "torch, 1 thread", "torch, 2 threads"]
        assert rates["torch, 1 thread"] == int(batch) and rates["torch, 2 threads"] == 2 * int(batch)
        assert found["dsjax_times_as_fast"]["torch, 1 thread"] == pytest.approx(rates["dsjax"] / int(batch))
        assert found["same_tokens"] == {"cached": 1.0, "torch, 1 thread": 0.0, "torch, 2 threads": 0.0}
        assert found["largest_margin_where_parted"] == 0.25
    assert result["idle_pages"]["cached"] >= 5 + result["idle_pages"]["dsjax"]
    assert len(said.splitlines()) == 3 and "1 tokens/s (" in said


def test_answers_part_at_the_first_difference():
    theirs = generation.Answers(1.0, [[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[9.0, 0.1, 8.0], [9.0, 9.0, 0.2], [9.0] * 3])
    assert generation.parted(generation.Answers(1.0, [[1, 0, 0], [4, 5, 0], [7, 8, 9]]), theirs) == 0.2
    assert generation.parted(theirs, theirs) == 0


@pytest.mark.parametrize(
    "script, message", [("exit 3", "its process ended"), (None, "No such file or directory; it must be a Python")]
)
def test_generation_without_torch_is_refused(weights, tmp_path, capfd, script, message):
    python = tmp_path / "python"
    if script:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    with pytest.raises(SystemExit, match="2"):
        bench.main(["generate", str(weights), *QUICK, "--torch", str(python)])
    assert message in capfd.readouterr().err.splitlines()[-1]
