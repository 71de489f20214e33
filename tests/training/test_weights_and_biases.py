"""Records go to Weights & Biases where the package is."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from dsjax.training.loop import train
from dsjax.training.metrics import read_metrics


class FakeWandb(SimpleNamespace):
    """What the sink uses of the package: runs by their id, each with what was logged."""

    def __init__(self):
        super().__init__(runs={}, opened=[])

    def init(self, *, project, id, resume, name, dir, config):
        assert resume == "allow"
        id = id or f"made-up-{len(self.runs)}"
        run = self.runs.setdefault(id, SimpleNamespace(id=id, logged=[], axes=[], ended=0))
        run.log = run.logged.append
        run.define_metric = lambda name, step_metric: run.axes.append((name, step_metric))
        run.finish = lambda: setattr(run, "ended", run.ended + 1)
        self.opened.append({"project": project, "name": name, "dir": dir, "config": config})
        return run


def test_a_resumed_run_goes_on_in_the_same_run(short_run, tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = replace(
        short_run, run=str(tmp_path / "run"), train=replace(short_run.train, steps=4, wandb="small", validate_every=4)
    )
    train(config, console=Console(quiet=True))
    assert (tmp_path / "run" / "wandb.id").read_text() == "made-up-0\n"
    train(config, console=Console(quiet=True))
    (run,) = fake.runs.values()
    assert run.ended == len(fake.opened) == 2 and set(run.axes) == {("*", "step")}
    assert fake.opened[0]["project"] == "small" and fake.opened[0]["name"] == "run"
    assert fake.opened[0]["config"]["train"]["steps"] == 4
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [logged["step"] for logged in run.logged] == [record["step"] for record in records] == [2, 4]
    for logged, record in zip(run.logged, records, strict=True):
        assert logged == {k: v for k, v in record.items() if isinstance(v, int | float)}
    assert "val_loss" in run.logged[-1] and "expert_load_max_over_mean_per_layer" not in run.logged[-1]


def test_without_the_package_the_run_says_what_to_install(short_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = replace(short_run, run=str(tmp_path / "run"), train=replace(short_run.train, wandb="small"))
    with pytest.raises(ValueError, match=r"^train.wandb: needs the package wandb.*pip install 'dsjax\[wandb\]'$"):
        train(config, console=Console(quiet=True))
    assert not (tmp_path / "run").exists()
