"""The command: what it prints, how it exits, what it leaves."""

import json
import shutil
from pathlib import Path

import pytest

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
    "no config": (("from-hf", FP8, "out", "--config", "/nowhere.json"), 1, "dsjax: [Errno 2] No such file"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_told_in_words(run, kind):
    arguments, expected, message = MISTAKES[kind]
    status, out, err = run(*arguments)
    assert (status, out) == (expected, "")
    assert err.startswith(message)


def test_an_existing_destination_is_refused(run, tmp_path):
    status, _, err = run("from-hf", FP8, tmp_path)
    assert status == 1
    assert err.endswith(f"dsjax: {tmp_path} exists; name another folder, or remove it\n")


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
