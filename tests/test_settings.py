"""Settings from TOML and the command line, and back: what is read is what was written, and errors say what is right."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.config import Config, YarnConfig
from dsjax.settings import (
    from_dict,
    load_config,
    load_model_config,
    load_options,
    load_run,
    load_subcommand,
    one_line_errors,
    to_dict,
    to_toml,
)

CONFIGS = Path(__file__).parent.parent / "configs"
RUNS = sorted(CONFIGS.glob("*.toml"))
MODELS = sorted((CONFIGS / "models").glob("*.toml"))

RUN = """
[model]
name = "mine"
vocab_size = 512
[train]
steps = 10
batch_size = 4
"""


@dataclass(frozen=True)
class Options:
    """Options of a command."""

    fresh: bool = False
    """Whether to start anew."""


@dataclass(frozen=True)
class Sample:
    """Samples text."""

    source: str
    """Where from."""
    count: int
    """How many."""
    prompt: str = ""
    """Beginning."""
    temperature: float = 1.0
    """Randomness."""
    seed: int | None = None
    """Seed."""
    stop: tuple[str, ...] = ()
    """Endings."""
    form: Literal["text", "json"] = "text"
    """Form."""
    stream: bool = True
    """Whether to stream."""


@pytest.fixture
def run(tmp_path):
    """A run and a model of one's own, beside each other."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.toml").write_text((CONFIGS / "models" / "tiny.toml").read_text())
    file = tmp_path / "run.toml"
    file.write_text(RUN)
    return file


def refusal(argv):
    with pytest.raises(ValueError) as caught:
        load_config([str(word) for word in argv])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_packaged_runs_load_and_print_themselves(file, tmp_path):
    config = load_config([str(file)])
    assert config == load_config([file.stem])
    assert config.run == f"runs/{file.stem}"
    printed = tmp_path / "printed.toml"
    printed.write_text(to_toml(config))
    assert load_config([str(printed)]) == config


@pytest.mark.parametrize("file", MODELS, ids=lambda file: file.stem)
def test_packaged_models_load(file, tmp_path):
    model = load_model_config(file.stem)
    assert model.name == file.stem
    assert load_model_config(str(file)) == model
    printed = tmp_path / "other.toml"
    printed.write_text(to_toml(model))
    assert load_model_config(str(printed)) == model


def test_later_layers_win(run):
    config = load_config([str(run), "--model.hidden-size", "64", "--model.norm_topk_prob=false", "--train.steps", "7"])
    assert config.model.num_hidden_layers == 8  # the model's file
    assert config.model.vocab_size == 512  # the run's
    assert (config.model.hidden_size, config.model.norm_topk_prob, config.train.steps) == (64, False, 7)
    assert load_config([str(run), "--model.name", "v2_lite_16b"]).model.num_hidden_layers == 27


def test_forms_of_options(run):
    def train(*words):
        return load_config([*words, str(run)]).train

    assert train("--train.unroll-layers").unroll_layers
    assert train("--train.unroll_layers", "true").unroll_layers
    assert not train("--train.unroll-layers", "--train.no-unroll-layers").unroll_layers
    assert train("--train.mtp-weights", "0.2", "1").mtp_weights == (0.2, 1.0)
    assert train("--train.mtp-weights=0.2,1").mtp_weights == (0.2, 1.0)
    assert isinstance(train("--train.ema-decay", "0").ema_decay, float)
    assert load_config(["--data.source=text", "--data.path=--x", str(run)]).data.path == "--x"


def test_yarn_on_and_off(run):
    on = [str(run), "--model.rope-scaling.factor", "40", "--model.rope-scaling.original-max-position-embeddings=64"]
    assert load_config(on).model.rope_scaling == YarnConfig(factor=40.0, original_max_position_embeddings=64)
    assert load_config([*on, "--model.rope-scaling", "none"]).model.rope_scaling is None
    run.write_text(to_toml(load_config(on)))
    assert load_config([str(run)]) == load_config(on)
    assert load_config([str(run), "--model.rope-scaling", "none"]).model.rope_scaling is None


@given(
    run=st.text(min_size=1),
    rate=st.floats(min_value=1e-30, max_value=1e30),
    weights=st.tuples(st.floats(0, 1e9), st.floats(0, 1e-9)),
    mask=st.booleans(),
)
def test_any_values_survive_toml_and_dicts(tmp_path_factory, run, rate, weights, mask):
    base = load_config(["tiny"])
    config = replace(
        base,
        run=run,
        train=replace(base.train, mtp_weights=weights),
        data=replace(base.data, document_mask=mask, source="text", path=run),
        optimizer=replace(base.optimizer, learning_rate=rate),
    )
    file = tmp_path_factory.mktemp("printed") / "any.toml"
    file.write_text(to_toml(config), "utf-8", newline="")
    assert load_config([str(file)]) == config
    assert from_dict(Config, to_dict(config)) == config


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[train]\nsteps = 10\nbatch_size = 4\nstepz = 3", "unknown setting train.stepz; did you mean train.steps?"),
        ("[trian]\nsteps = 10", "unknown setting trian; did you mean train?"),
        ("steps = 10", "unknown setting steps; did you mean train.steps?"),
        ("[train]\nsteps = '10'", "train.steps = '10': must be an integer"),
        ("[train]\nsteps = true", "train.steps = True: must be an integer"),
        ("[train]\nsteps = 10.0", "train.steps = 10.0: must be an integer"),
        ("[data]\npath = 3", "data.path = 3: must be a string"),
        ("[data]\ndocument_mask = 1", "data.document_mask = 1: must be true or false"),
        ("[train]\nmtp_weights = 0.3", "train.mtp_weights = 0.3: must be a list of 2, each item a finite number"),
        ("[optimizer]\neps = nan", "optimizer.eps = nan: must be a finite number"),
        ("train = 3", "train = 3: must be a table of settings"),
        ("[train.steps]\na = 1", "train.steps = {'a': 1}: must be an integer"),
        ("[train", "Expected ']' at the end of a table declaration (at end of document)"),
    ],
)
def test_wrong_toml_names_file_setting_and_remedy(tmp_path, line, message):
    file = tmp_path / "wrong.toml"
    file.write_text(line)
    assert refusal([file]) == f"{file}: {message}"


def test_wrong_model_file_is_named(run):
    model = run.parent / "models" / "mine.toml"
    model.write_text(model.read_text() + "hiden_size = 3\n")
    assert refusal([run]) == f"{model}: unknown setting hiden_size; did you mean hidden_size?"
    model.write_bytes(b"\xff")
    assert refusal([run]) == f"{model}:1: byte 0xff is not UTF-8, as TOML is"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.stepz", "3"], "unknown option --train.stepz; did you mean --train.steps?"),
        (["--steps", "3"], "unknown option --steps; did you mean --train.steps?"),
        (["--batch-size", "3"], "unknown option --batch-size; did you mean --train.batch-size?"),
        (["--train.batch_sise", "3"], "unknown option --train.batch_sise; did you mean --train.batch-size?"),
        (
            ["--model.no-norm-topk-pro"],
            "unknown option --model.no-norm-topk-pro; did you mean --model.no-norm-topk-prob?",
        ),
        (["--train.steps"], "--train.steps has no value: it must be an integer"),
        (["--train.steps", "--fresh"], "--train.steps has no value: it must be an integer"),
        (["--train.steps", "1e3"], "train.steps = '1e3': must be an integer"),
        (["--train.steps", "0"], "train.steps = 0: must be at least 1"),
        (["--train.unroll-layers=yes"], "train.unroll_layers = 'yes': must be true or false"),
        (["--data.source", "csv"], "data.source = 'csv': must be one of 'python-stdlib', 'text', 'jsonl', 'parquet',"),
        (["more"], "unexpected argument 'more' after"),
        (["--model.name", "other"], "model.name = 'other': must be one of mine, small_gpu, tiny,"),
        (["--model.rope-scaling.factor", "4"], "model.rope_scaling.original_max_position_embeddings is missing"),
    ],
)
def test_wrong_command_line(run, words, message):
    with pytest.raises(ValueError) as caught:
        load_run([str(run), *words], Options, "train")
    assert str(caught.value).startswith(message)


def test_missing_things_are_named(run):
    assert refusal([]).startswith("no run is named: give a TOML file")
    assert refusal(["nowhere.toml"]).startswith("nowhere.toml: no such file, and no packaged run (")
    run.write_text('[model]\nname = "tiny"\n[train]\nsteps = 3\n')
    assert refusal([run]) == "train.batch_size is missing: it must be an integer"
    run.write_text("")
    assert refusal([run]).startswith("model.name = None: must be one of mine, small_gpu,")


def test_a_model_that_holds_every_size_needs_no_file(run):
    config = load_config([str(run)])
    run.write_text(to_toml(config))
    (run.parent / "models" / "mine.toml").unlink()
    assert load_config([str(run)]) == config


def test_model_by_unknown_name():
    with pytest.raises(ValueError, match=r"model\.name = 'v4': must be one of small_gpu, tiny, v2_236b"):
        load_model_config("v4")


def test_own_options_and_print_config(run, capsys):
    assert load_run([str(run), "--fresh"], Options, "train")[1] == Options(fresh=True)
    with pytest.raises(SystemExit) as stop:
        load_run([str(run), "--print-config", "--train.steps", "3"], Options, "train")
    assert stop.value.code == 0
    run.write_text(capsys.readouterr().out)
    assert load_config([str(run)]).train.steps == 3


def test_options_of_other_commands():
    words = ["a.txt", "3", "--temperature", "0", "--seed=-1", "--stop", "x", "y", "--no-stream", "--form", "json"]
    assert load_options(words, Sample, "sample") == Sample(
        source="a.txt", count=3, temperature=0.0, seed=-1, stop=("x", "y"), form="json", stream=False
    )
    assert load_options(["--count", "3", "a.txt", "--seed", "None"], Sample, "sample") == Sample("a.txt", 3)
    for words, message in [
        (["a.txt"], "argument COUNT is missing: see --help"),
        (["a.txt", "b"], "count = 'b': must be an integer"),
        (["a.txt", "3", "4"], "unexpected argument '4': an option begins with --"),
        (["a.txt", "3", "--sead", "4"], "unknown option --sead; did you mean --seed?"),
    ]:
        with pytest.raises(ValueError, match="^" + message):
            load_options(words, Sample, "sample")


def test_subcommands(capsys):
    assert load_subcommand(["sample", "a", "1"], {"sample": Sample}, "tool") == Sample("a", 1)
    with pytest.raises(ValueError, match="unknown command 'simple': must be one of sample"):
        load_subcommand(["simple"], {"sample": Sample}, "tool")
    with pytest.raises(SystemExit):
        load_subcommand(["--help"], {"sample": Sample}, "tool")
    assert "sample         Samples text." in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["tiny", "--help"]])
def test_help_fits_its_page_and_shows_every_setting(words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    yarn = ["--model.rope-scaling.factor=4", "--model.rope-scaling.original-max-position-embeddings=64"]
    for more in ([], yarn if words[1:] else []):
        with pytest.raises(SystemExit) as stop:
            load_run([*words, *more], Options, "train")
        assert stop.value.code == 0
        page = capsys.readouterr().out
        assert max(map(len, page.splitlines())) <= 100
        options = {word for line in page.splitlines() for word in line.replace(",", " ").split() if word[:2] == "--"}
        for name in ("fresh", "print-config", "run", "train.steps", "model.vocab-size", "model.rope-scaling.factor"):
            assert f"--{name}" in options
    shown = f"(default: {load_model_config('tiny').intermediate_size})"
    assert (shown in page) == (words != ["--help"])


def test_a_command_ends_with_one_line_and_status_2():
    code = (
        "import sys; from dsjax.settings import *\n"
        "with one_line_errors(): load_config(sys.argv[1:])\n"
        "print('not reached')"
    )
    done = subprocess.run([sys.executable, "-c", code, "tiny", "--train.steps", "x"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "dsjax: train.steps = 'x': must be an integer\n"


def test_a_closed_pipe_is_no_error():
    code = "from dsjax.settings import *\nwith one_line_errors(): load_run(['--help'], NoOptions, 'train')"
    command = f'set -o pipefail; {sys.executable} -c "$CODE" | head -c 1'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=os.environ | {"CODE": code})
    assert (done.stdout, done.stderr) == ("u", "")


def test_bugs_keep_their_traceback():
    with pytest.raises(KeyError), one_line_errors():
        raise KeyError("a bug")


def test_v3_is_the_released_config():
    """Of DeepSeek-R1's config.json only YaRN and the initial weights differ: this is V3 as it was pre-trained."""
    released = json.loads((Path(__file__).parent / "golden" / "r1_config.json").read_text())
    v3 = to_dict(load_model_config("v3_671b"))
    assert set(v3) - set(released) == {"name", "embedding_initializer_range"}  # ours
    assert {name for name in set(v3) & set(released) if v3[name] != released[name]} == {
        "rope_scaling",
        "initializer_range",
    }
    assert v3["rope_scaling"] is None and v3["initializer_range"] == 0.006 and not v3["embedding_initializer_range"]


def test_tiny_has_everything_and_divides_into_stages():
    tiny = load_model_config("tiny")
    assert (tiny.num_hidden_layers, tiny.first_k_dense_replace, tiny.num_nextn_predict_layers) == (8, 1, 1)
    assert tiny.n_routed_experts >= 8 and tiny.n_group >= 4 > tiny.topk_group and tiny.topk_method == "noaux_tc"


def test_v3_run_is_the_reports():
    """The shares of steps fall on the token counts of report section 4.2."""
    config = load_config(["v3_671b"])
    steps, length = config.train.steps, config.data.sequence_length
    start, full = config.train.batch_ramp_start, config.train.batch_size
    ramp = round(steps * config.train.batch_ramp_fraction)

    def tokens(share):
        return (ramp * (start + full) / 2 + (round(steps * share) - ramp) * full) * length

    near = {"rel": 1e-4}
    assert ramp * (start + full) / 2 * length == pytest.approx(469e9, **near)
    assert tokens(1) == pytest.approx(14.8e12, **near)
    assert tokens(config.optimizer.constant) == tokens(config.train.mtp_change) == pytest.approx(10e12, **near)
    assert tokens(config.optimizer.decay) == tokens(config.train.bias_stop) == pytest.approx(14.3e12, **near)
    assert tokens(config.optimizer.second_tail_start) == pytest.approx(14.633e12, **near)
    assert round(steps * config.optimizer.warmup) == 2000
    assert config.optimizer.learning_rate * config.optimizer.second_tail == pytest.approx(7.3e-6, rel=1e-5)
