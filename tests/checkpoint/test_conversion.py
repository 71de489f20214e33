"""From any form to any other and back: the same bytes, the same logits, all or nothing."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file

from dsjax.checkpoint import conversion
from dsjax.checkpoint.audit import compare_values, verify_checksums
from dsjax.checkpoint.conversion import convert
from dsjax.checkpoint.files import SafetensorsFile, SafetensorsWriter, Spec
from dsjax.checkpoint.forms import make_plan, open_checkpoint
from dsjax.checkpoint.huggingface import load, save_huggingface
from dsjax.checkpoint.sources import CheckpointProblems
from dsjax.model.context import context
from dsjax.model.layout import stack
from dsjax.model.transformer import hidden_states, logits
from dsjax.runtime import Runtime

GOLDEN = Path(__file__).parents[1] / "golden"


def _convert(source: Path, destination: Path, target: str, dtype: str = "keep", **options) -> Path:
    opened = open_checkpoint(source)
    try:
        convert(opened, make_plan(opened, target, dtype, **options), destination, workers=2)
    finally:
        opened.close()
    return destination


def _differences(left: Path, right: Path) -> list[str]:
    return compare_values(open_checkpoint(left), open_checkpoint(right))


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    return _convert(GOLDEN / "v3" / "hf", tmp_path_factory.mktemp("bf16") / "hf", "huggingface", "bf16")


@pytest.fixture(params=["fp32", "bf16", "fp8", "v2", "v2_lite"])
def original(request, bf16):
    folders = {"fp32": GOLDEN / "v3" / "hf", "bf16": bf16, "fp8": GOLDEN / "v3" / "hf_fp8"}
    return folders.get(request.param, GOLDEN / request.param / "hf")


def test_hugging_face_to_dsjax_and_back_is_byte_exact(original, tmp_path):
    ours = _convert(original, tmp_path / "ours", "dsjax", shard_bytes=50_000)
    assert _differences(ours, original) == []
    back = _convert(ours, tmp_path / "back", "huggingface", shard_bytes=60_000)
    assert _differences(back, original) == []
    assert len(list(back.glob("model-*-of-*.safetensors"))) > 3
    # The safetensors library sees the same bytes under the same names.
    before = dict(safetensors.deserialize((original / "model.safetensors").read_bytes()))
    after = dict(t for file in back.glob("*.safetensors") for t in safetensors.deserialize(file.read_bytes()))
    assert after == before
    assert (
        json.loads((back / "config.json").read_text()).items()
        >= {
            key: value
            for key, value in json.loads((original / "config.json").read_text()).items()
            if key not in ("torch_dtype", "dtype")
        }.items()
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_hugging_face_to_deepseek_and_back_is_byte_exact(bf16, tmp_path, ranks):
    demo = _convert(bf16, tmp_path / "demo", "deepseek", ranks=ranks)
    assert {file.name for file in demo.glob("*.safetensors")} == {
        "mtp.safetensors", *(f"model{i}-mp{ranks}.safetensors" for i in range(ranks))
    }  # fmt: skip
    ours = _convert(demo, tmp_path / "ours", "dsjax")
    assert _differences(_convert(ours, tmp_path / "back", "huggingface"), bf16) == []


def test_fp8_to_deepseek_and_back_keeps_values_and_scales(tmp_path):
    demo = _convert(GOLDEN / "v3" / "hf_fp8", tmp_path / "demo", "deepseek")
    ours = _convert(demo, tmp_path / "ours", "dsjax")
    assert _differences(_convert(ours, tmp_path / "back", "huggingface"), GOLDEN / "v3" / "hf_fp8") == []
    config = json.loads((demo / "deepseek.json").read_text())
    assert (config["dtype"], config["n_layers"], config["dim"]) == ("fp8", 2, 64)


@pytest.mark.parametrize(("wanted", "dtype"), [("fp32", "fp32"), ("bf16", "bf16")])
@pytest.mark.parametrize("through", ["huggingface", "dsjax"])
def test_fp8_multiplied_out_is_torchs_golden(tmp_path, wanted, dtype, through):
    digests = json.loads((GOLDEN / "v3" / "dequantized.json").read_text())
    out = open_checkpoint(_convert(GOLDEN / "v3" / "hf_fp8", tmp_path / "out", through, wanted))
    assert set(digests) == set(out.stored)
    for name, digest in digests.items():
        tensor = out.stored[name]
        bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == ("F32" if bias or wanted == "fp32" else "BF16")
        contents = tensor.read(0, tensor.shape[0]).tobytes()
        assert hashlib.sha256(contents).hexdigest()[:16] == digest["fp32" if bias else dtype], name


def test_quantizing_through_dsjax_is_torchs_golden(tmp_path):
    ours = open_checkpoint(_convert(GOLDEN / "v3" / "hf", tmp_path / "ours", "dsjax", "fp8"))
    golden = open_checkpoint(GOLDEN / "v3" / "hf_fp8")
    assert set(ours.stored) == set(golden.stored)
    for name, tensor in golden.stored.items():
        if tensor.dtype == "F8_E4M3" or name.endswith("scale_inv"):
            mine = ours.stored[name]
            assert mine.read(0, mine.shape[0]).tobytes() == tensor.read(0, tensor.shape[0]).tobytes(), name


def test_power_of_two_scales_of_v31_are_kept_and_made(tmp_path):
    source = shutil.copytree(GOLDEN / "v3" / "hf", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    quantization = {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    out = _convert(_convert(source, tmp_path / "ours", "dsjax", "fp8"), tmp_path / "out", "huggingface")
    opened = open_checkpoint(out)
    scales = [opened.scales(name.removesuffix("_scale_inv")) for name in opened.stored if name.endswith("_scale_inv")]
    assert len(scales) == 72
    assert all((np.exp2(np.round(np.log2(s))) == s).all() for s in scales)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"


@pytest.fixture(scope="module")
def model():
    @jax.jit
    def run(params, biases, tokens):
        ctx = context(config, tokens.shape[1])
        hidden, _ = hidden_states(params, biases, params["embed"][tokens], ctx, config=config, runtime=Runtime())
        return logits(params, hidden)

    config = open_checkpoint(GOLDEN / "v3" / "hf").config
    return run


@pytest.mark.parametrize("form", ["huggingface", "dsjax", "deepseek", "fp8"])
def test_logits_from_every_form_are_the_oracles(form, model, tmp_path):
    golden = load_file(GOLDEN / "v3" / "golden.safetensors")
    original = GOLDEN / "v3" / ("hf_fp8" if form == "fp8" else "hf")
    path = original if form == "huggingface" else _convert(original, tmp_path / "x", "dsjax" if form == "fp8" else form)
    weights = load(open_checkpoint(path))
    ours = model(
        stack(weights.params, weights.config),
        stack(weights.biases, weights.config),
        jnp.asarray(golden["input_ids"], jnp.int32),
    )
    if form == "fp8":  # Eight codes per power of two: close to the unquantized weights' logits, no more.
        assert np.abs(ours - golden["logits"]).max() < 0.5 * np.abs(golden["logits"]).max()
    else:
        assert np.abs(ours - golden["logits"]).max() < 2e-5


def test_mtp_copies_are_written_if_the_source_had_them_and_checked(tmp_path):
    with_copies = tmp_path / "with"
    opened = open_checkpoint(GOLDEN / "v3" / "hf")
    opened.add_copies()
    opened.copies = True
    convert(opened, make_plan(opened, "huggingface"), with_copies)
    names = set(load_file(with_copies / "model.safetensors"))
    assert {"model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"} <= names
    ours = _convert(with_copies, tmp_path / "ours", "dsjax")
    assert _differences(_convert(ours, tmp_path / "back", "huggingface"), with_copies) == []

    file = with_copies / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # The last tensor is a copy of the head.
    file.write_bytes(data)
    with pytest.raises(CheckpointProblems) as error:
        _convert(with_copies, tmp_path / "no", "dsjax")
    assert error.value.problems == [
        "model.layers.2.shared_head.head.weight differs from lm_head.weight, of which it is to be a copy"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "ours", "with"]


def test_mixed_formats_in_one_array_need_a_choice(tmp_path):
    source = shutil.copytree(GOLDEN / "v3" / "hf_fp8", tmp_path / "source")
    file = SafetensorsFile(source / "model.safetensors")
    arrays = {name: (tensor.dtype, tensor.read(0, tensor.shape[0])) for name, tensor in file.tensors.items()}
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    arrays[name] = ("F32", arrays[name][1].astype(np.float32))
    del arrays[f"{name}_scale_inv"]
    writer = SafetensorsWriter(source / "model.safetensors", [Spec(n, d, a.shape) for n, (d, a) in arrays.items()])
    for key, (_, array) in arrays.items():
        writer.write(key, 0, array)
    writer.close()
    with pytest.raises(CheckpointProblems) as error:
        _convert(source, tmp_path / "ours", "dsjax")
    assert error.value.problems == [
        "params/layers/1/moe/experts/gate_up: its 16 tensors are stored as F32 and F8_E4M3; "
        "choose one with --dtype bf16, fp32 or fp8"
    ]
    _convert(source, tmp_path / "ours", "dsjax", "fp8")


def test_weights_that_are_not_finite_cannot_become_fp8_and_nothing_is_left(tmp_path):
    source = shutil.copytree(GOLDEN / "v3" / "hf", tmp_path / "source")
    file = source / "model.safetensors"
    data = bytearray(file.read_bytes())
    at = data.index(load_file(file)["model.layers.0.mlp.up_proj.weight"].tobytes())
    data[at : at + 4] = np.float32(np.inf).tobytes()
    file.write_bytes(data)
    with pytest.raises(CheckpointProblems, match=r"model\.layers\.0\.mlp\.up_proj\.weight: .*not finite"):
        _convert(source, tmp_path / "out", "dsjax", "fp8")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_existing_destination_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match=r"out exists; name another folder, or remove it"):
        _convert(GOLDEN / "v3" / "hf", tmp_path / "out", "dsjax")


def test_tokenizers_and_other_files_go_along(tmp_path):
    source = shutil.copytree(GOLDEN / "v2" / "hf", tmp_path / "source")
    carried = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "modeling_deepseek.py", "LICENSE"]
    for name in carried:
        (source / name).write_text(f"contents of {name}")
    (source / "README.md").write_text("stays")
    ours = _convert(source, tmp_path / "ours", "dsjax")
    for folder in (ours, _convert(ours, tmp_path / "back", "huggingface"), _convert(ours, tmp_path / "d", "deepseek")):
        assert all((folder / name).read_text() == f"contents of {name}" for name in carried)
        assert not (folder / "README.md").exists()


def test_flipped_bytes_of_a_converted_folder_are_found_by_its_report(tmp_path):
    ours = _convert(GOLDEN / "v3" / "hf_fp8", tmp_path / "ours", "dsjax")
    assert verify_checksums(ours) == []
    assert verify_checksums(GOLDEN / "v3" / "hf_fp8") is None
    (path,) = ours.glob("*.safetensors")
    file = SafetensorsFile(path)
    bias = file.tensors["biases/mtp/0/block/moe/bias"]
    data = bytearray(path.read_bytes())
    data[bias.offset + 27] ^= 0x20
    path.write_bytes(data)
    assert verify_checksums(ours) == [f"checksum does not match: biases/mtp/0/block/moe/bias in {path.name}"]
    differing = _differences(ours, GOLDEN / "v3" / "hf_fp8")
    assert differing == ["model.layers.2.mlp.gate.e_score_correction_bias: bytes differ, first in row 6"]


def test_an_interrupted_conversion_goes_on_at_the_next_file(tmp_path, monkeypatch):
    written, original = [], conversion._FileInWork.finish

    def finish(file):
        if len(written) == 3 and not resumed:
            raise KeyboardInterrupt
        written.append(file.name)
        original(file)

    monkeypatch.setattr(conversion._FileInWork, "finish", finish)
    resumed = False
    opened = open_checkpoint(GOLDEN / "v3" / "hf")
    plan = make_plan(opened, "dsjax", shard_bytes=100_000)
    with pytest.raises(KeyboardInterrupt):
        convert(opened, plan, tmp_path / "out", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    resumed = True
    with (tmp_path / ".out.partial" / "journal.jsonl").open("a") as journal:
        journal.write('{"file": "torn li')
    report = convert(opened, plan, tmp_path / "out", workers=1)
    assert report.resumed_files == 3
    assert written == [file.name for file in plan.files], "no file is written twice"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert verify_checksums(tmp_path / "out") == []
    assert _differences(tmp_path / "out", GOLDEN / "v3" / "hf") == []


def test_what_another_source_left_is_not_gone_on_with(tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "journal.jsonl").write_text('{"fingerprint": "of another"}\n{"file": "x", "tensors": {}}\n')
    (partial / "stranger").write_text("")
    _convert(GOLDEN / "v2" / "hf", tmp_path / "out", "dsjax")
    assert not (tmp_path / "out" / "stranger").exists()
    assert _differences(tmp_path / "out", GOLDEN / "v2" / "hf") == []


KILLED = """
import sys, time
from pathlib import Path
from dsjax.checkpoint import conversion
from dsjax.convert import main
if len(sys.argv) > 1 and sys.argv[1] == "slow":
    original = conversion.Journal.add
    def add(self, *args):
        original(self, *args)
        time.sleep(0.2)
    conversion.Journal.add = add
sys.exit(main(sys.argv[2:]))
"""


def test_sigkill_in_the_middle_costs_only_the_file_in_work(tmp_path):
    arguments = [
        "from-hf",
        str(GOLDEN / "v3" / "hf"),
        str(tmp_path / "out"),
        "--shard-bytes",
        "60000",
        "--workers",
        "1",
    ]
    process = subprocess.Popen([sys.executable, "-c", KILLED, "slow", *arguments], stderr=subprocess.DEVNULL)
    partial = tmp_path / ".out.partial"
    while len(list(partial.glob("*.safetensors"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    again = subprocess.run([sys.executable, "-c", KILLED, "fast", *arguments], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert _differences(tmp_path / "out", GOLDEN / "v3" / "hf") == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_conversions_into_one_folder_do_not_mix(tmp_path, monkeypatch):
    opened = open_checkpoint(GOLDEN / "v2" / "hf")
    plan, original = make_plan(opened, "dsjax"), conversion._write_output

    def write(*arguments):
        with pytest.raises(BlockingIOError, match=r"\.out\.partial: another process is converting into it"):
            convert(opened, plan, tmp_path / "out")
        return original(*arguments)

    monkeypatch.setattr(conversion, "_write_output", write)
    convert(opened, plan, tmp_path / "out")
    assert _differences(tmp_path / "out", GOLDEN / "v2" / "hf") == []


def test_a_disk_without_room_is_told_before_the_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"243,968 bytes are to be written and 1,000 are free"):
        _convert(GOLDEN / "v2" / "hf", tmp_path / "out", "dsjax")


def test_unfinished_files_of_other_arrays_in_memory_are_not_taken(tmp_path, monkeypatch):
    weights, original, calls = load(open_checkpoint(GOLDEN / "v2" / "hf")), conversion._write_output, []

    def write(*arguments):
        calls.append(arguments)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(conversion, "_write_output", write)
    first = jax.tree.map(lambda a: a + 1, weights.params)
    with pytest.raises(KeyboardInterrupt):
        save_huggingface(tmp_path / "out", weights.config, first, weights.biases, "fp32", shard_bytes=50_000)
    report = save_huggingface(tmp_path / "out", *weights, "fp32", shard_bytes=50_000)
    assert report.notes == ["an unfinished conversion of something else was replaced"]
    assert _differences(tmp_path / "out", GOLDEN / "v2" / "hf") == []
