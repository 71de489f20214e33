"""The command: what it prints, how it exits, what it leaves."""

import json
import shutil
from pathlib import Path

import pytest

from dsjax.checkpoint import conversion
from dsjax.convert import main

GOLDEN = Path(__file__).parent / "golden"
FP8 = str(GOLDEN / "v3" / "hf_fp8")


@pytest.fixture
def run(capfd):
    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        return status, *capfd.readouterr()

    return run


def test_there_and_back_with_verification(run, tmp_path):
    status, out, _ = run("from-hf", FP8, tmp_path / "ours")
    assert status == 0
    assert out.startswith(f"{tmp_path / 'ours'}: 73 tensors, 318,072 bytes in ")
    assert run("to-hf", tmp_path / "ours", tmp_path / "back", "--shard-bytes", "100000")[0] == 0
    status, out, _ = run("verify", tmp_path / "back", "--against", FP8)
    assert status == 0
    assert out.splitlines() == [
        f"{tmp_path / 'back'}: 167 tensors are what the config calls for",
        "every byte has the checksum of its report",
        f"167 tensors are those of {FP8}, bit for bit",
    ]
    status, out, _ = run("to-deepseek", tmp_path / "ours", tmp_path / "demo", "--dtype", "bf16", "--ranks", "2")
    assert (status, out.splitlines()[-1]) == (0, "  the demo has no MTP module: its layer is in mtp.safetensors")
    assert run("from-deepseek", tmp_path / "demo", tmp_path / "again", "--no-mtp")[0] == 0
    assert json.loads((tmp_path / "again" / "dsjax.json").read_text())["model"]["num_nextn_predict_layers"] == 0


def test_verify_counts_the_tensors_of_the_release(run):
    listing = GOLDEN / "r1_tensors.json.gz"
    status, out, _ = run("verify", GOLDEN / "r1_config.json", "--listing", listing)
    assert (status, out) == (0, f"91,991 of 91,991 tensors have the names, dtypes and shapes of {listing}\n")


def test_verify_tells_every_difference_from_a_list(run, tmp_path):
    config = json.loads((GOLDEN / "r1_config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"kv_lora_rank": 256}))
    status, out, err = run("verify", tmp_path / "config.json", "--listing", GOLDEN / "r1_tensors.json.gz")
    # Of each of the 62 layers: kv_a, its norm and kv_b, and the scales of both matrices.
    assert (status, out) == (1, "")
    assert err.splitlines()[0] == f"dsjax: {tmp_path / 'config.json'}: 310 problems"
    assert "  model.layers.61.self_attn.kv_a_layernorm.weight: BF16[256], the reference has BF16[512]" in err


def test_inspect_reads_headers_only(run, tmp_path):
    status, out, _ = run("inspect", FP8)
    assert status == 0
    assert out.splitlines() == [
        FP8,
        "form        huggingface",
        "model       deepseek_v3: 238,416 parameters, router biases included",
        "layers      1 dense + 1 MoE (8 experts, 4 active) + 1 MTP",
        "tensors     167, of which 0 are copies",
        "  F32       95 tensors, 106,104 bytes",
        "  F8_E4M3   72 tensors, 211,968 bytes",
        "scales      float32, per 128x128 block",
    ]


def test_problems_are_listed_with_status_1_and_nothing_is_written(run, tmp_path):
    source = shutil.copytree(FP8, tmp_path / "source")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    status, out, err = run("from-hf", source, tmp_path / "out")
    size = file.stat().st_size
    assert (status, out) == (1, "")
    assert err == f"dsjax: {source}: 1 problem\n  model.safetensors: truncated, {size} bytes of {size + 9}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


MISTAKES = {
    "no source": (("from-hf", "/nowhere", "out"), 1, "dsjax: /nowhere: 1 problem\n  no such file or folder\n"),
    "no command": ((), 2, "dsjax: no command is named: give one of from-hf, to-hf, from-deepseek, to-deepseek, "),
    "unknown command": (("from-hg", "a", "b"), 2, "dsjax: unknown command 'from-hg': must be one of from-hf, "),
    "no destination": (("from-hf", "a"), 2, "dsjax: argument DESTINATION is missing"),
    "unknown dtype": (("to-hf", "a", "b", "--dtype", "fp4"), 2, "dsjax: dtype = 'fp4': must be "),
    "no config": (
        ("from-hf", FP8, "out", "--config", "/nowhere.json"),
        1,
        "dsjax: /nowhere.json: 1 problem\n  nowhere.json: no such file\n",
    ),
    "no listing": (
        ("verify", FP8, "--listing", "/nowhere.json"),
        1,
        "dsjax: /nowhere.json: No such file or directory\n",
    ),
    "no rank": (("to-deepseek", FP8, "out", "--ranks", "0"), 2, "dsjax: ranks = 0: must be at least 1\n"),
    "ranks below none": (("to-deepseek", FP8, "out", "--ranks", "-2"), 2, "dsjax: ranks = -2: must be at least 1\n"),
    "too many ranks": (
        ("to-deepseek", FP8, "out", "--ranks", "16", "--dtype", "bf16"),
        1,
        f"dsjax: {FP8}: 1 problem\n  8 experts cannot be divided among 16 ranks\n",
    ),
    "no worker": (("from-hf", FP8, "out", "--workers", "0"), 2, "dsjax: workers = 0: must be at least 1\n"),
    "empty shards": (("from-hf", FP8, "out", "--shard-bytes", "0"), 2, "dsjax: shard_bytes = 0: must be at least 1\n"),
    "no step": (("to-hf", FP8, "out", "--step", "-1"), 2, "dsjax: step = -1: must be at least 0\n"),
    "average of a release": (
        ("to-hf", FP8, "out", "--weights", "ema"),
        1,
        f"dsjax: {FP8}: 1 problem\n  only a training run has steps and averaged weights, and this is none\n",
    ),
    "step of a release": (("to-hf", FP8, "out", "--step", "3"), 1, f"dsjax: {FP8}: 1 problem\n  only a training run"),
    "below a file": (
        ("from-hf", FP8, f"{FP8}/config.json/out"),
        1,
        f"dsjax: {FP8}/config.json/.out.partial: Not a directory\n",
    ),
    "where nothing can be made": (
        ("from-hf", FP8, "/proc/out"),
        1,
        "dsjax: /proc/.out.partial: No such file or directory\n",
    ),
    "misspelt": (
        ("from-hf", FP8, "out", "--shard_byte", "1"),
        2,
        "dsjax: unknown option --shard_byte; did you mean --sh",
    ),
    "misspelt no": (("from-hf", FP8, "out", "--no-mpt"), 2, "dsjax: unknown option --no-mpt; did you mean --no-mtp?\n"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_told_in_words(run, kind):
    arguments, expected, message = MISTAKES[kind]
    status, out, err = run(*arguments)
    assert (status, out) == (expected, "")
    assert err.startswith(message)


def test_an_existing_destination_is_refused_before_anything_is_read(run, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for destination in (tmp_path, tmp_path / "link"):
        status, out, err = run("from-hf", "/nowhere", destination)
        assert (status, out, err) == (1, "", f"dsjax: {destination} exists; name another folder, or remove it\n")


# What a user may have in place of a file: (name in a copy of a checkpoint, contents, problem).
RUBBISH = [
    ("hf", "config.json", b"[]", "config.json: not a JSON object"),
    ("hf", "config.json", b"\xff\xfe", "config.json: not JSON: 'utf-8' codec can't decode byte 0xff"),
    ("hf", "config.json", b'{"model_type": ["a"]}', "config.json: unknown model_type ['a']; known are deepseek_v3"),
    ("hf", "config.json", {"rope_parameters": [1]}, "config.json: rope_parameters is [1], not a table"),
    ("hf", "config.json", {"quantization_config": "fp8"}, "config.json: quantization_config is 'fp8', not a table"),
    ("hf", "config.json", {"routed_scaling_factor": "a"}, "model.routed_scaling_factor = 'a': must be a finite number"),
    ("hf", "model.safetensors.index.json", b"null", "model.safetensors.index.json: not a JSON object"),
    ("hf", "model.safetensors.index.json", b"{}", "model.safetensors.index.json: has no weight_map"),
    *(
        (
            "hf",
            "model.safetensors.index.json",
            {"weight_map": {"a": name}},
            "model.safetensors.index.json: its weight_map names what is no file beside it",
        )
        for name in (3, None, "", "../../secret.bin", "/etc/passwd")
    ),
    (
        "hf",
        "model.safetensors",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "model.safetensors: a pointer of Git LFS, not the file itself: run git lfs pull",
    ),
    ("hf", "model.safetensors", None, "model.safetensors: Is a directory"),
    ("ours", "dsjax.json", b"[]", "dsjax.json: not a JSON object"),
    ("ours", "dsjax.json", {"model": None}, "dsjax.json: has no model"),
    ("ours", "dsjax.json", {"model": {}}, "dsjax.json: model: name is missing: it must be a string"),
    ("ours", "dsjax.json", {"arrays": None}, "dsjax.json: its arrays are not names of files beside it"),
    ("ours", "dsjax.json", {"arrays": {"a": "../b"}}, "dsjax.json: its arrays are not names of files beside it"),
    ("ours", "dsjax.json", {"huggingface": 3}, "dsjax.json: huggingface is not the contents of a config.json"),
    ("ours", "conversion.json", b"null", "conversion.json: not a JSON object"),
    ("ours", "conversion.json", b"{}", "conversion.json: has no checksums"),
    ("ours", "conversion.json", {"crc32": {"a": 3}}, "conversion.json: has no checksums"),
    (
        "ours",
        "conversion.json",
        {"crc32": {}},
        "weights-00001-of-00001.safetensors: conversion.json has no checksums of it",
    ),
    ("demo", "config.json", b"3", "config.json: not a JSON object"),
    ("demo", "config.json", b"{", "config.json: not JSON: Expecting property name"),
]


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    shutil.copytree(FP8, folder / "hf")
    assert main(["from-hf", FP8, str(folder / "ours")]) == 0
    assert main(["to-deepseek", FP8, str(folder / "demo")]) == 0
    return folder


@pytest.mark.parametrize("case", RUBBISH, ids=str)
def test_rubbish_is_named_in_one_line(run, forms, tmp_path, case):
    form, name, contents, problem = case
    path = shutil.copytree(forms / form, tmp_path / form)
    if contents is None:
        (path / name).unlink()
        (path / name).mkdir()
    elif isinstance(contents, dict):
        before = json.loads((path / name).read_text()) if (path / name).exists() else {}
        (path / name).write_text(json.dumps(before | contents))
    else:
        (path / name).write_bytes(contents)
    status, _, err = run("verify", path)
    assert status == 1
    assert err.splitlines()[0] == f"dsjax: {path}: 1 problem"
    assert err.splitlines()[1].startswith(f"  {problem}")
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize("contents", [b"[]", b'{"a": {"dtype": 1}}', b"nonsense", b"\x1f\x8bbroken"])
@pytest.mark.parametrize("name", ["list.json", "list.json.gz"])
def test_rubbish_as_a_listing(run, tmp_path, contents, name):
    (tmp_path / name).write_bytes(contents)
    status, out, err = run("verify", FP8, "--listing", tmp_path / name)
    assert (status, out) == (1, "")
    assert err == f"dsjax: {tmp_path / name}: not a list of tensors {{name: {{dtype, shape}}}} in JSON\n"


def test_other_files_and_shards_without_an_index(run, tmp_path):
    shutil.copy(GOLDEN / "v2" / "hf" / "config.json", tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    status, _, err = run("inspect", tmp_path / "notes.txt")
    reason = "notes.txt: not a file of weights: neither .safetensors nor .bin, .pt or .pth"
    assert (status, err) == (1, f"dsjax: {tmp_path / 'notes.txt'}: 1 problem\n  {reason}\n")
    shutil.copy(GOLDEN / "v2" / "hf" / "model.safetensors", tmp_path / "model-00001-of-00001.safetensors")
    status, _, err = run("inspect", tmp_path)
    reason = "model.safetensors.index.json: no such file, though there are shards of weights"
    assert (status, err) == (1, f"dsjax: {tmp_path}: 1 problem\n  {reason}\n")


def test_a_config_given_for_weights_that_have_one(run, forms, tmp_path):
    status, _, err = run("to-hf", forms / "ours", tmp_path / "out", "--config", f"{FP8}/config.json")
    assert (status, err.splitlines()[1]) == (1, "  has a config of its own, in dsjax.json; none can be given")


def test_a_destination_inside_the_source_goes_on_where_it_was(run, forms, tmp_path, monkeypatch):
    source, original = shutil.copytree(forms / "hf", tmp_path / "hf"), conversion._FileInWork.finish
    finished = []

    def finish(file):
        if len(finished) == 2:
            raise KeyboardInterrupt
        finished.append(file.name)
        original(file)

    arguments = ("from-hf", source, source / "out", "--shard-bytes", "50000", "--workers", "1")
    monkeypatch.setattr(conversion._FileInWork, "finish", finish)
    assert run(*arguments)[0] == 130
    monkeypatch.setattr(conversion._FileInWork, "finish", original)
    status, out, _ = run(*arguments)
    assert (status, out.splitlines()[-1][:5]) == (0, "  2 o")
    assert run("verify", source / "out", "--against", FP8)[0] == 0


def test_ctrl_c_keeps_what_is_done(run, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("dsjax.checkpoint.commands.convert", interrupted)
    status, _, err = run("from-hf", FP8, tmp_path / "out")
    assert (status, err.splitlines()[-1]) == (130, "stopped; the same command goes on where it was")


@pytest.mark.parametrize("command", ["", "from-hf", "to-hf", "from-deepseek", "to-deepseek", "inspect", "verify"])
def test_help_of_every_command(run, command):
    status, out, _ = run(*filter(None, [command]), "--help")
    assert status == 0
    assert out.startswith("usage: python -m dsjax.convert")
