"""The checkpoints of a training run as weights to export."""

import json
import shutil

import jax
import numpy as np
import pytest

from dsjax.checkpoint import native
from dsjax.checkpoint.conversion import convert
from dsjax.checkpoint.forms import make_plan, open_checkpoint
from dsjax.checkpoint.huggingface import load, load_huggingface
from dsjax.checkpoint.native import Checkpoints, NoUsableCheckpoint
from dsjax.checkpoint.runs import FOLDER
from dsjax.checkpoint.sources import CheckpointProblems
from dsjax.convert import main
from dsjax.model.layout import unstack
from dsjax.model.transformer import initial_parameters
from dsjax.settings import load_model_config, to_dict


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of `tiny` with steps 1 and 2, whose EMA is twice the weights."""
    folder, config = tmp_path_factory.mktemp("run"), load_model_config("tiny")
    with Checkpoints(folder / FOLDER) as checkpoints:
        for step in (1, 2):
            params, biases = (unstack(tree, config) for tree in initial_parameters(config, seed=step))
            state = {
                "params": params,
                "biases": biases,
                "ema": jax.tree.map(lambda a: 2 * np.asarray(a), params),
                "moments": {"mu": params},
            }
            checkpoints.save(step, state, {"config": {"model": to_dict(config)}})
    return folder, config, params, biases


def _same(left, right):
    return jax.tree.all(jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), left, right))


def test_the_newest_weights_of_a_run(run, tmp_path):
    folder, config, params, biases = run
    source = open_checkpoint(folder)
    weights = load(source)
    assert weights.config == config
    assert _same(weights.params, params)
    assert _same(weights.biases, biases)
    assert source.notes == ["weights: live, of step 2"]
    convert(source, make_plan(source, "huggingface"), tmp_path / "out")
    again = load_huggingface(tmp_path / "out")
    assert _same(again.params, params)
    source.close()


def test_averaged_weights_and_earlier_steps(run):
    folder, _, params, biases = run
    averaged = load(open_checkpoint(folder, weights="ema"))
    assert _same(averaged.params, jax.tree.map(lambda a: 2 * a, params))
    assert _same(averaged.biases, biases)
    assert not _same(load(open_checkpoint(folder / FOLDER, step=1)).params, params)


def test_an_unknown_step_and_an_unusable_state_are_named(run, tmp_path):
    folder, config, *_ = run
    with pytest.raises(CheckpointProblems) as error:
        open_checkpoint(folder, step=7)
    assert error.value.problems == ["no checkpoint of step 7; there are 1, 2"]
    with Checkpoints(tmp_path / FOLDER, keep=3) as checkpoints:
        checkpoints.save(1, {"params": {"embed": np.zeros(3)}}, {"config": {}})
        checkpoints.save(2, {"params": {"embed": np.zeros(3)}}, {"config": {"model": {"x": 1}}})
        checkpoints.save(3, {"params": {"embed": np.zeros(3)}}, {"config": {"model": to_dict(config)}})
    for arguments, problem in [
        ({"step": 1}, "its metadata has no config of a model"),
        ({"step": 2}, "its model: unknown setting x"),
        ({"weights": "ema"}, "the checkpoint has no ema/embed"),
    ]:
        with pytest.raises(CheckpointProblems) as error:
            open_checkpoint(tmp_path, **arguments)
        assert error.value.problems[0].startswith(problem)
    (tmp_path / "empty" / FOLDER / "5").mkdir(parents=True)
    with pytest.raises(CheckpointProblems):
        open_checkpoint(tmp_path / "empty")


def _flip(folder, step):
    """Flip bits all over the files of a step that hold arrays."""
    files = [path for path in (folder / FOLDER / str(step) / "state").rglob("*") if path.is_file()]
    for file in (path for path in files if path.stat().st_size > 50_000):
        data = bytearray(file.read_bytes())
        for at in range(10_000, len(data), 10_000):
            data[at] ^= 1
        file.write_bytes(data)


def _garble(folder, step):
    """Make a step's metadata unreadable."""
    (file,) = (folder / FOLDER / str(step) / "metadata").glob("metadata")
    file.write_bytes(b"{" + file.read_bytes()[:40])


def _empty(folder, step):
    """Remove the arrays of a step."""
    shutil.rmtree(folder / FOLDER / str(step) / "state")


@pytest.mark.parametrize(("damage", "at_once"), [(_flip, 1), (_flip, 1 << 26), (_garble, 1 << 26), (_empty, 1 << 26)])
def test_a_damaged_newest_step_is_passed_over_with_a_warning(run, tmp_path, caplog, monkeypatch, damage, at_once):
    monkeypatch.setattr(native, "_AT_ONCE", at_once)
    folder, config, *_ = run
    folder = shutil.copytree(folder, tmp_path / "run")
    damage(folder, 2)
    assert main(["to-hf", str(folder), str(tmp_path / "out")]) == 0
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "dsjax.checkpoint"]
    assert warning.startswith(f"checkpoint {folder / FOLDER / '2'} is damaged and not used: ")
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["notes"][:2] == ["weights: live, of step 1", "step 2 is damaged and was not used"]
    expected, _ = initial_parameters(config, seed=1)
    assert _same(load_huggingface(tmp_path / "out").params, unstack(expected, config))
    # Asked for by name, it is not replaced by another.
    assert main(["to-hf", str(folder), str(tmp_path / "no"), "--step", "2"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_every_step_is_named_if_none_is_whole(run, tmp_path, capfd):
    folder = shutil.copytree(run[0], tmp_path / "run")
    _flip(folder, 1)
    _garble(folder, 2)
    assert main(["to-hf", str(folder), str(tmp_path / "out")]) == 1
    lines = capfd.readouterr().err.splitlines()
    start = lines.index(f"dsjax: {folder / FOLDER}: 2 problems")
    assert lines[start + 1].startswith(f"  {folder / FOLDER / '2'}: metadata: ")
    assert lines[start + 2].startswith(f"  {folder / FOLDER / '1'}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_only_the_weights_that_are_wanted_must_be_whole(run, tmp_path):
    config, folder = run[1], tmp_path / "run"
    rng = np.random.default_rng(0)  # Unlike zeros or weights, these make a file of their own size.
    with Checkpoints(folder / FOLDER) as checkpoints:
        params, biases = (unstack(tree, config) for tree in initial_parameters(config, seed=3))
        state = {"params": params, "biases": biases, "moments": rng.standard_normal((4000, 1000))}
        checkpoints.save(1, state, {"config": {"model": to_dict(config)}})
    files = [path for path in (folder / FOLDER).rglob("*") if path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with Checkpoints(folder / FOLDER) as checkpoints, pytest.raises(NoUsableCheckpoint, match="match: moments"):
        checkpoints.restore(state)
    assert _same(load(open_checkpoint(folder)).params, params)


def test_the_tokenizer_goes_along_whichever_folder_is_named(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    (folder / "tokenizer.json").write_text("{}")
    for i, path in enumerate([folder, folder / FOLDER]):
        assert main(["to-hf", str(path), str(tmp_path / f"out{i}")]) == 0
        assert (tmp_path / f"out{i}" / "tokenizer.json").read_text() == "{}"


def test_what_a_run_is_not_asked_for(run):
    folder, config, *_ = run
    for path, given, problem in [
        (folder / FOLDER / "2", None, "one checkpoint of a run; name the run: dsjax.convert takes --step 2 too"),
        (folder, config, "has a config of its own; none can be given"),
    ]:
        with pytest.raises(CheckpointProblems) as error:
            open_checkpoint(path, given)
        assert error.value.problems == [problem]


def test_inspect_reads_no_arrays_and_verify_reads_all(run, tmp_path, capfd):
    folder = shutil.copytree(run[0], tmp_path / "run")
    assert main(["verify", str(folder)]) == 0
    out = capfd.readouterr().out
    assert out.splitlines()[-1] == "every array has the checksum that the run saved (weights: live, of step 2)"
    _flip(folder, 2)
    assert main(["inspect", str(folder)]) == 0
    assert "weights: live, of step 2" in capfd.readouterr().out
    assert main(["verify", str(folder), "--headers-only"]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 1
    assert main(["verify", str(folder)]) == 0
    assert "step 2 is damaged and was not used" in capfd.readouterr().out
