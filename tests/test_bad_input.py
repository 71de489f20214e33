"""What users do wrong, through the commands: one line that says what and where, and nothing is lost by it.

Each case is a command line on a folder of its own, `here`, with a run of two steps and its weights in Hugging Face's
form, of which it spoils something first. `{here}` and `{shared}`, where the text is, stand for their paths.
"""

import contextlib
import fcntl
import gzip
import hashlib
import importlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zstandard
from safetensors.numpy import load_file, save_file

from dsjax import train
from dsjax.parallel import hosts

RUN = """
[model]
name = "own"
vocab_size = 300
hidden_size = 16
num_hidden_layers = 2
first_k_dense_replace = 1
intermediate_size = 16
moe_intermediate_size = 8
num_attention_heads = 2
q_lora_rank = 8
kv_lora_rank = 8
qk_nope_head_dim = 4
qk_rope_head_dim = 4
v_head_dim = 4
n_routed_experts = 4
num_experts_per_tok = 2
n_group = 2
topk_group = 1
[data]
source = "text"
path = "{shared}/text"
cache = "{shared}/cache"
sequence_length = 16
[train]
steps = 2
batch_size = 2
validate_every = 2
validation_sequences = 2
log_every = 1
remat = "none"
ema_decay = 0.9
[checkpoint]
every = 1
"""
STEPS = (1, 2)


@dataclass(frozen=True)
class Case:
    """A mistake and what is said of it."""

    words: str
    """The command line: a command, and its words."""
    said: str
    """The beginning of the line, behind `dsjax: `; all of it where it ends with a newline."""
    spoil: Callable[[Path], object] = lambda here: None
    status: int = 2
    begins: bool = False
    """Whether the folder of a new run is made before the mistake is seen."""


def call(command: str, *words: object) -> tuple[int, str]:
    """Run a command in this process, and return its exit status and what it wrote to stderr."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = importlib.import_module(f"dsjax.{command}").main([str(word) for word in words])
        except SystemExit as end:
            status = end.code
    return int(status or 0), errors.getvalue()


def alone(patch: pytest.MonkeyPatch) -> None:
    """Let commands think that they have this process to themselves."""
    patch.setattr(hosts, "_joined", None)
    patch.setattr(train, "keep_freed_memory", lambda: None)
    patch.setattr(train, "leave", sys.exit)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """Text, a run of two steps on it, and its weights in one file and in three."""
    shared = tmp_path_factory.mktemp("shared")
    (shared / "text").mkdir()
    for document in range(10):
        (shared / "text" / f"{document}.txt").write_text("".join(f"{i}: {i * document}\n" for i in range(60)))
    (shared / "run.toml").write_text(RUN.format(shared=shared))
    with pytest.MonkeyPatch.context() as patch:
        alone(patch)
        assert call("train", shared / "run.toml", "--run", shared / "run") == (0, "")
    for name, *options in (("hf",), ("shards", "--shard-bytes", "20000")):
        assert call("convert", "to-hf", shared / "run", shared / name, *options)[0] == 0
    return shared


@pytest.fixture
def here(shared, tmp_path, monkeypatch) -> Path:
    """A copy for one case."""
    alone(monkeypatch)
    monkeypatch.chdir(tmp_path)
    for name in ("run", "hf", "shards"):
        shutil.copytree(shared / name, tmp_path / name)
    settings = (shared / "run" / "config.toml").read_text()
    (tmp_path / "run" / "config.toml").write_text(settings.replace(f"{shared}/run", f"{tmp_path}/run"))
    shutil.copy(shared / "run.toml", tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file but TensorBoard's, which every start begins."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "tensorboard")
    return {str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


def check(case: Case, here: Path, shared: Path) -> None:
    """Make the mistake; look at what is said, and at what is left."""
    case.spoil(here)
    before, folders = contents(here / "run"), {path.name for path in here.iterdir()}
    command, *words = case.words.format(here=here, shared=shared).split(" ")
    status, errors = call(command, *words)
    assert status == case.status, errors
    assert errors.startswith("dsjax: " + case.said.format(here=here, shared=shared)), errors
    assert errors.count("\n") == 1 and errors.endswith("\n")
    assert contents(here / "run") == before
    assert {path.name for path in here.iterdir()} - folders == ({"new"} if case.begins else set())


NEW = "train {here}/run.toml --run {here}/new"
AGAIN = "train {here}/run.toml --run {here}/run"


def write(name: str, text: str | bytes) -> Callable[[Path], object]:
    """Write a file."""
    data = text.encode() if isinstance(text, str) else text
    return lambda here: (here / name).write_bytes(data.replace(b"{here}", str(here).encode()))


def edit(name: str, change: Callable[[str], str]) -> Callable[[Path], object]:
    """Change a text."""
    return lambda here: (here / name).write_text(change((here / name).read_text()))


def remove(*names: str) -> Callable[[Path], object]:
    """Take files or folders away."""

    def remove(here: Path) -> None:
        for name in names:
            shutil.rmtree(here / name) if (here / name).is_dir() else (here / name).unlink()

    return remove


def replaced(old: str, new: str) -> Callable[[Path], object]:
    """Change the run's TOML file."""
    assert old in RUN
    return edit("run.toml", lambda text: text.replace(old, new, 1))


# Configs.

TOML = "{here}/run.toml"
CONFIGS = {
    "no such file": Case(
        "train {here}/rum.toml", "{here}/rum.toml: no such file, and no packaged run (small_gpu, tiny"
    ),
    "the run's folder in place of its file": Case(
        "train {here}/run", "{here}/run: a folder; name a run's TOML file, such as {here}/run/config.toml\n"
    ),
    "a text": Case("train {shared}/text/0.txt", "{shared}/text/0.txt: Expected '=' after a key"),
    "an open quote": Case(
        NEW, TOML + ": Illegal character '\\n' (at line 21, column 15)\n", replaced('"text"', '"text')
    ),
    "another encoding": Case(
        NEW,
        TOML + ":2: byte 0xf6 is not UTF-8, as TOML is\n",
        lambda here: write("run.toml", b"\n# gr\xf6\xdfer")(here),
    ),
    "binary": Case(NEW, TOML + ":1: byte 0x89 is not UTF-8", write("run.toml", b"\x89PNG\r\n\x1a\n")),
    "a section twice": Case(
        NEW, TOML + ": Cannot declare ('train',) twice", edit("run.toml", lambda text: text + "[train]\nsteps = 3\n")
    ),
    "a section that does not exist": Case(
        NEW, TOML + ": unknown setting optimiser; did you mean optimizer?\n", replaced("[checkpoint]", "[optimiser]")
    ),
    "a misspelt key": Case(
        NEW, TOML + ": unknown setting train.batchsize; did you mean train.batch_size?\n", replaced("batch_s", "batchs")
    ),
    "a key of another section": Case(
        NEW, TOML + ": unknown setting data.seed; did you mean train.seed?\n", replaced("[data]", "[data]\nseed = 1")
    ),
    "a text for a number": Case(
        NEW, TOML + ": train.batch_size = '2': must be an integer\n", replaced("batch_size = 2", 'batch_size = "2"')
    ),
    "not a number": Case(NEW, TOML + ": train.ema_decay = nan: must be a finite number\n", replaced("0.9", "nan")),
    "no model of that name": Case(
        "train {here}/own.toml",
        "model.name = 'deepseek': must be one of small_gpu, tiny, v2_236b, v2_lite_16b, v3_671b, or [model] must hold "
        "every size itself, and lacks vocab_size, hidden_size, num_hidden_layers ...\n",
        write("own.toml", '[model]\nname = "deepseek"\n[train]\nsteps = 1\nbatch_size = 1\n'),
    ),
    "a size is missing": Case(
        NEW,
        "model.name = 'own': must be one of small_gpu, tiny, v2_236b, v2_lite_16b, v3_671b, or [model] must hold every "
        "size itself, and lacks hidden_size\n",
        replaced("hidden_size = 16\n", ""),
    ),
    "a broken file of the model": Case(
        NEW,
        "{here}/models/own.toml: Invalid value (at line 1, column 14)\n",
        lambda here: ((here / "models").mkdir(), write("models/own.toml", "vocab_size = many\n")(here)),
    ),
    "no steps": Case(NEW, "train.steps = 0: must be at least 1\n", replaced("steps = 2", "steps = 0")),
    "a batch that the mesh does not divide": Case(
        NEW + " --mesh.data 4",
        "train.batch_size = 2: must be divisible by mesh.data x mesh.node x mesh.local = 4 x 1 x 1 = 4, so that every "
        "device gets as many sequences\n",
    ),
    "experts that the mesh does not divide": Case(
        NEW + " --mesh.local 3 --train.batch-size 3",
        "mesh.node x mesh.local = 1 x 3 = 3: must divide model.n_routed_experts = 4, so that every device holds as",
    ),
    "more devices than there are": Case(
        NEW + " --mesh.data 16 --train.batch-size 16",
        "mesh: each process needs 16 devices and has 8: start Python with JAX_",
    ),
    "more stages than layers": Case(
        NEW + " --mesh.pipe 2 --train.micro-batch-size 1", "mesh.pipe: 2 stages of a model with 1 MoE layers: every"
    ),
    "too few micro-batches for the pipeline": Case(
        NEW + " --mesh.pipe 2 --train.micro-batch-size 1 --model.num-hidden-layers 9",
        "mesh.pipe = 2 ranks with 2 micro-batches of train.micro_batch_size: micro_batches = 2: DualPipe needs it even "
        "and at least 4 (twice the ranks); nearest: 4\n",
    ),
    "FP8 with a width that cannot": Case(
        NEW + " --precision fp8 --model.num-attention-heads 3",
        "precision = 'fp8': model.num_attention_heads x model.v_head_dim = 12 must be divisible by 8",
    ),
    "FP8 kernels on a CPU": Case(
        NEW + " --precision fp8 --kernels.fp8 mosaic",
        "kernels.fp8 = 'mosaic': they need a Hopper GPU (H100, H200, H800); 'xla' runs everywhere\n",
    ),
    "kernels for experts on a CPU": Case(
        NEW + " --precision bf16 --kernels.grouped-matmul mosaic",
        "kernels.grouped_matmul = 'mosaic' needs a Hopper GPU (H100, H200, H800), bfloat16 and alignment = 128; ",
    ),
    "attention of NVIDIA's on a CPU": Case(
        NEW + " --kernels.attention cudnn",
        "kernels.attention = 'cudnn' needs an NVIDIA GPU and bfloat16 or float16 inputs, not cpu with float32; "
        "'chunked' runs everywhere\n",
    ),
    "attention of a TPU on a CPU": Case(
        NEW + " --kernels.attention splash",
        "kernels.attention = 'splash' needs a TPU, not cpu; 'chunked' runs everywhere\n",
    ),
    "no room for a byte": Case(
        NEW + " --model.vocab-size 100", "model.vocab_size = 100: a byte-level tokenizer needs at least 262\n"
    ),
    "a trace of steps that there are not": Case(
        NEW + " --profile 1:5", "profile = '1:5': must be steps of the run, which has train.steps = 2\n"
    ),
    "no chip of that name": Case("plan {here}/run.toml --chip h900", "chip = 'h900': must be one of 'h800', 'h100',"),
    "no benchmark of that name": Case(
        "bench trian", "unknown command 'trian': must be one of train, overlap, generate, kernels\n"
    ),
}

# Data.


def lines(last: str = "", field: str = "text") -> str:
    return "".join(json.dumps({field: f"document {i} " * 30}) + "\n" for i in range(20)) + last


def tokens(array: np.ndarray, cut: int | None = None) -> Callable[[Path], object]:
    """Write an array of token ids, or the beginning of its file."""
    data = io.BytesIO()
    np.save(data, array)
    return write("data.npy", data.getvalue()[:cut])


def data(name: str, source: str = "text", more: str = "") -> str:
    return f"{NEW} --data.source {source} --data.path {{here}}/{name}{more}"


def vanished(here: Path) -> None:
    (here / "some").mkdir()
    (here / "some" / "1.txt").symlink_to(here / "nothing")


def edited_tokenizer(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def edited(here: Path) -> None:
        tokenizer = json.loads((here / "run" / "tokenizer.json").read_text())
        change(tokenizer)
        (here / "tokenizer.json").write_text(json.dumps(tokenizer))

    return edited


TOKENS = data("data.npy", "tokens", " --data.fim-rate 0")
TOKENIZER = NEW + " --data.tokenizer {here}/tokenizer.json"
TOO_FEW = "fewer than one window of data.sequence_length + 1 = 17; use more text, a shorter sequence or another data."
DATA = {
    "no data": Case(data("nowhere"), "data.path = '{here}/nowhere': no such file or folder\n"),
    "nobody's home": Case(
        NEW + " --data.path ~nobody-here/x", "data.path = '~nobody-here/x': nobody here has that home"
    ),
    "an empty folder": Case(
        data("none"), "data.path = '{here}/none': the folder holds no file\n", lambda here: (here / "none").mkdir()
    ),
    "a folder of other files": Case(
        NEW + " --data.source jsonl", "data.path = '{shared}/text': the folder holds no .jsonl file\n"
    ),
    "an empty file": Case(data("a.txt"), "data.path = '{here}/a.txt': the source is empty\n", write("a.txt", "")),
    "a link to nothing": Case(data("some"), "{here}/some/1.txt: No such file or directory\n", vanished),
    "a disk that fails": Case(NEW + " --data.path /proc/self/mem", "/proc/self/mem: Input/output error\n"),
    "too little to train on": Case(
        data("a.txt"), "data.path = '{here}/a.txt': 4 tokens for train, " + TOO_FEW, write("a.txt", "a few words\n")
    ),
    "too little to validate on": Case(
        NEW + " --data.validation-fraction 1e-9",
        "data.path = '{shared}/text': 0 tokens for validation, " + TOO_FEW,
    ),
    "longer sequences than there is text": Case(
        NEW + " --data.sequence-length 100000",
        "data.path = '{shared}/text': 2820 tokens for train, fewer than one window of data.sequence_length + 1 = 1000",
    ),
    "a picture": Case(
        data("a.txt"),
        "{here}/a.txt:1: byte 0x89 is not UTF-8; every text must be UTF-8\n",
        write("a.txt", b"\x89PNG\r\n\x1a\n" * 50),
    ),
    "a cut .gz": Case(
        data("a.txt.gz"),
        "{here}/a.txt.gz: damaged .gz data: Compressed file ended before the end-of-stream marker was reached\n",
        write("a.txt.gz", gzip.compress(lines().encode())[:-20]),
    ),
    "a cut .zst": Case(
        data("a.txt.zst"),
        "{here}/a.txt.zst: damaged .zst data: the file ends within a frame\n",
        write("a.txt.zst", zstandard.compress(lines().encode())[:-20]),
    ),
    "a cut line of JSON": Case(
        data("a.jsonl", "jsonl"),
        "{here}/a.jsonl:21: not JSON: Unterminated string starting at (column 10)\n",
        write("a.jsonl", lines('{"text": "half')),
    ),
    "JSON with another field": Case(
        data("a.jsonl", "jsonl"),
        "{here}/a.jsonl:1: no field 'text', only 'content'; set data.text_field\n",
        write("a.jsonl", lines(field="content")),
    ),
    "JSON with a number": Case(
        data("a.jsonl", "jsonl"),
        "{here}/a.jsonl:21: field 'text' is of type int, not a string\n",
        write("a.jsonl", lines('{"text": 3}\n')),
    ),
    "no Parquet": Case(
        data("a.parquet", "parquet"), "{here}/a.parquet: damaged or not a Parquet file: ", write("a.parquet", lines())
    ),
    "arrays without a tokenizer": Case(
        data("data.npy", "tokens"),
        "data.fim_rate = 0.1: without data.tokenizer it must be 0\n",
        tokens(np.ones(500, np.int32)),
    ),
    "floats for ids": Case(TOKENS, "{here}/data.npy: token ids of type float64, not integers\n", tokens(np.ones(500))),
    "ids of another vocabulary": Case(
        TOKENS,
        "{here}/data.npy[300]: token id 300 is not in the model's vocabulary, 0 to 299\n",
        tokens(np.arange(500)),
    ),
    "ids of two dimensions": Case(
        TOKENS,
        "{here}/data.npy: token ids of shape (10, 50), not one-dimensional\n",
        tokens(np.ones((10, 50), np.int32)),
    ),
    "a cut array": Case(
        TOKENS, "{here}/data.npy: damaged or not a .npy array: mmap length", tokens(np.ones(500, np.int32), -100)
    ),
    "no tokenizer": Case(TOKENIZER, "data.tokenizer = '{here}/tokenizer.json': no such file\n"),
    "a broken tokenizer": Case(
        TOKENIZER,
        "{here}/tokenizer.json: not a Hugging Face tokenizer.json: Expecting property name enclosed in double quotes",
        write("tokenizer.json", "{"),
    ),
    "a tokenizer with more ids than the model": Case(
        TOKENIZER + " --model.vocab-size 280",
        "data.tokenizer = '{here}/tokenizer.json' has ids up to 299; model.vocab_size = 280 must be at least 300\n",
        edited_tokenizer(lambda tokenizer: None),
    ),
    "a cache that is a file": Case(
        NEW + " --data.cache {here}/run.toml",
        "data.cache = '{here}/run.toml': File exists; name a folder, which is made if it is absent\n",
    ),
    "a cache where no folder can be": Case(
        NEW + " --data.cache /proc/dsjax", "data.cache = '/proc/dsjax': No such file or directory; name a folder, which"
    ),
}

# Folders of runs and their checkpoints.


def biggest(here: Path, step: int) -> Path:
    """The largest file of a checkpoint's arrays."""
    files = (here / "run" / "checkpoints" / str(step) / "state").rglob("d/*")
    return max(files, key=lambda path: path.stat().st_size)


def flip(here: Path, *steps: int) -> None:
    """Change a bit of arrays."""
    for step in steps:
        data = bytearray(biggest(here, step).read_bytes())
        data[len(data) // 2] ^= 1
        biggest(here, step).write_bytes(data)


def cut(here: Path, *steps: int) -> None:
    """Leave the beginnings of all arrays."""
    for step in steps:
        for file in (here / "run" / "checkpoints" / str(step) / "state").glob("**/d/*"):
            file.write_bytes(file.read_bytes()[:100])


def without(part: str) -> Callable[[Path], object]:
    return remove(*(f"run/checkpoints/{step}/{part}" for step in STEPS))


def of_a_newer_version(here: Path) -> None:
    """Give the checkpoints a setting that this version does not know."""
    for step in STEPS:
        file = here / "run" / "checkpoints" / str(step) / "metadata" / "metadata"
        saved = json.loads(json.loads(file.read_text())["contents"])
        saved["metadata"]["config"]["train"]["warp"] = 9
        text = json.dumps(saved, sort_keys=True)
        file.write_text(json.dumps({"checksum": zlib.crc32(text.encode()), "contents": text}))


def in_place_of(name: str) -> Callable[[Path], object]:
    """Put a file where a folder is."""
    return lambda here: (shutil.rmtree(here / name), (here / name).write_text("x"))


ITS = "run = '{here}/run': its checkpoint was made "
REMEDY = "; begin anew with --fresh --overwrite\n"
NO_USABLE = "no usable checkpoint in {here}/run/checkpoints; tried: {here}/run/checkpoints/2: "
FOLDERS = {
    "a file in place of the folder": Case(
        AGAIN, "run = '{here}/run': cannot write in {here}/run: Not a directory\n", in_place_of("run")
    ),
    "something else in the folder": Case(
        AGAIN,
        "run = '{here}/run': the folder holds something else than a run; name another\n",
        remove("run/config.toml"),
    ),
    "a used folder": Case(
        AGAIN + " --fresh", "run = '{here}/run': a run is there, which --fresh would lose; add --over"
    ),
    "no folder can be there": Case(
        "train {here}/run.toml --run /proc/a/b", "run = '/proc/a/b': cannot write in /proc: No such file or directory\n"
    ),
    "no room for a checkpoint": Case(
        NEW + " --model.hidden-size 100000000", "run = '{here}/new': a checkpoint has 1 TB and "
    ),
    "more steps than before": Case(
        AGAIN + " --train.steps 3", ITS + "with other settings (train.steps: 2 in the checkpoint, 3 now); set them back"
    ),
    "another model": Case(
        AGAIN + " --model.hidden-size 32", ITS + "with other settings (model.hidden_size: 16 in the checkpoint, 32 now)"
    ),
    "other data": Case(
        AGAIN + " --data.path {shared}/text/1.txt", ITS + "from other data than the source gives now; put"
    ),
    "settings of a newer version": Case(
        AGAIN, ITS + "with other settings (train.warp: 9 in the checkpoint, absent now)", of_a_newer_version
    ),
    "a flipped bit in every checkpoint": Case(
        AGAIN,
        "run = '{here}/run': " + NO_USABLE + "checksum does not match: ",
        lambda here: flip(here, *STEPS),
    ),
    "cut arrays in every checkpoint": Case(
        AGAIN,
        "run = '{here}/run': " + NO_USABLE + "state: OUT_OF_RANGE: Error ",
        lambda here: cut(here, *STEPS),
    ),
    "no arrays in any checkpoint": Case(
        AGAIN,
        "run = '{here}/run': " + NO_USABLE + 'state: Item "state" was not found in the checkpoint. Available items: '
        "['metadata']; {here}/run/checkpoints/1: state: Item \"state\" was not found in the checkpoint. Available "
        "items: ['metadata']" + REMEDY,
        without("state"),
    ),
    "no metadata in any checkpoint": Case(
        AGAIN, "run = '{here}/run': " + NO_USABLE + 'metadata: Item "metadata" was not found', without("metadata")
    ),
    "a file in place of the checkpoints": Case(
        AGAIN, "{here}/run/checkpoints: Not a directory\n", in_place_of("run/checkpoints")
    ),
    "a broken line of metrics": Case(
        AGAIN,
        "{here}/run/metrics.jsonl:1: not a line of metrics; delete it: '{{\"step\": 1,'\n",
        edit("run/metrics.jsonl", lambda text: text[:11] + "\n" + text),
    ),
    "a file in place of the pictures": Case(
        AGAIN,
        "run = '{here}/run': {here}/run/pictures: File exists; saved last: step 2\n",
        lambda here: in_place_of("run/pictures")(here),
        status=1,
    ),
}

# Weights.


def weights(change: Callable[[dict], object]) -> Callable[[Path], object]:
    """Change the tensors of the file."""

    def changed(here: Path) -> None:
        tensors = load_file(here / "hf" / "model.safetensors")
        change(tensors)
        save_file(tensors, here / "hf" / "model.safetensors")

    return changed


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Change the bytes of the file of weights."""
    return lambda here: (here / "hf/model.safetensors").write_bytes(
        change((here / "hf/model.safetensors").read_bytes())
    )


def json_with(name: str, **entries: object) -> Callable[[Path], object]:
    return edit(name, lambda text: json.dumps(json.loads(text) | entries))


HF = "convert from-hf {here}/hf {here}/out"
SHARDS = "convert from-hf {here}/shards {here}/out"
WITH = NEW + " --train.initial-weights {here}/"
NO_WEIGHTS = "no weights: none of model.safetensors.index.json, pytorch_model.bin.index.json, model.safetensors, "
WEIGHTS = {
    "no initial weights": Case(
        WITH + "nowhere", "train.initial_weights = '{here}/nowhere': no such file or folder\n", begins=True
    ),
    "initial weights of another model": Case(
        WITH + "hf --model.hidden-size 32",
        "train.initial_weights = '{here}/hf': another model's; model.hidden_size: 16 in the weights, 32 now\n",
        begins=True,
    ),
    "half of the initial weights": Case(
        WITH + "shards",
        "train.initial_weights = '{here}/shards': model-00002-of-00003.safetensors: no such file\n",
        remove("shards/model-00002-of-00003.safetensors"),
        begins=True,
    ),
    "initial weights of a run that has saved none": Case(
        WITH + "run",
        "train.initial_weights = '{here}/run': the run has no checkpoint yet\n",
        remove("run/checkpoints"),
        begins=True,
    ),
    "initial weights of one checkpoint": Case(
        WITH + "run/checkpoints/2",
        "train.initial_weights = '{here}/run/checkpoints/2': one checkpoint of a run; name the run: dsjax.convert "
        "takes --step 2 too\n",
        begins=True,
    ),
    "generate from nowhere": Case("generate {here}/nowhere", "{here}/nowhere: no such folder\n"),
    "generate from a text": Case(
        "generate {shared}/text", "{shared}/text: 2 problems: config.json: no such file; " + NO_WEIGHTS
    ),
    "generate from an empty run": Case(
        "generate {here}/run",
        "{here}/run: the run has no checkpoint yet\n",
        remove("run/checkpoints/1", "run/checkpoints/2"),
    ),
    "generate from a spoilt run": Case("generate {here}/run", NO_USABLE + "metadata: Item", without("metadata")),
    "generate with another config": Case(
        "generate {here}/run",
        "{here}/run/config.toml is not of this checkpoint: model.hidden_size: 16 in the checkpoint, 32 now\n",
        edit("run/config.toml", lambda text: text.replace("hidden_size = 16", "hidden_size = 32")),
    ),
    "generate without a tokenizer": Case(
        "generate {here}/run", "{here}/run: no tokenizer.json, without which a prompt", remove("run/tokenizer.json")
    ),
    "generate below zero": Case(
        "generate {here}/run --temperature -1", "temperature = -1.0: must be at least 0, and finite\n"
    ),
    "generate with a misspelt option": Case(
        "generate {here}/run --temprature 1", "unknown option --temprature; did you mean --temperature?\n"
    ),
    "generate from cut weights": Case(
        "generate {here}/hf",
        "{here}/hf: 1 problem: model.safetensors: truncated, ",
        rewrite(lambda data: data[:-5]),
    ),
    "the destination is there": Case(
        "convert from-hf {here}/hf {here}/run", "{here}/run exists; name another folder, or remove it\n", status=1
    ),
    "nothing can be written there": Case(
        "convert from-hf {here}/hf {here}/run.toml/x", "{here}/run.toml/.x.partial: Not a directory\n", status=1
    ),
}
PROBLEMS = {
    "no config": Case(HF, "config.json: no such file", remove("hf/config.json")),
    "a broken config": Case(HF, "config.json: not JSON: Expecting property name", write("hf/config.json", "{")),
    "another architecture": Case(
        HF, "config.json: unknown model_type 'llama'; known are", json_with("hf/config.json", model_type="llama")
    ),
    "a wrong size": Case(
        HF, "model.num_experts_per_tok = 9: must be at most", json_with("hf/config.json", num_experts_per_tok=9)
    ),
    "a bad header": Case(
        HF,
        "model.safetensors: not a safetensors file (JSONDecodeError",
        rewrite(lambda data: data[:8] + b"x" + data[9:]),
    ),
    "a huge header": Case(
        HF,
        "model.safetensors: not a safetensors file (a header of 1099511627776 bytes)",
        rewrite(lambda data: struct.pack("<Q", 2**40) + data[8:]),
    ),
    "cut weights": Case(HF, "model.safetensors: truncated, ", rewrite(lambda data: data[:-100])),
    "an empty file": Case(HF, "model.safetensors: truncated, 0 bytes are not even a header", rewrite(lambda data: b"")),
    "a pointer": Case(
        HF,
        "model.safetensors: a pointer of Git LFS, not the file itself: run git lfs pull",
        rewrite(lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"),
    ),
    "a missing shard": Case(
        SHARDS, "model-00002-of-00003.safetensors: no such file", remove("shards/model-00002-of-00003.safetensors")
    ),
    "a missing index": Case(
        SHARDS,
        "model.safetensors.index.json: no such file, though there are shards of weights",
        remove("shards/model.safetensors.index.json"),
    ),
    "an index that leads elsewhere": Case(
        SHARDS,
        "model.safetensors.index.json: its weight_map names what is no file beside it",
        json_with("shards/model.safetensors.index.json", weight_map={"model.norm.weight": "../hf/model.safetensors"}),
    ),
    "a missing tensor": Case(
        HF, "missing: model.norm.weight [16]", weights(lambda tensors: tensors.pop("model.norm.weight"))
    ),
    "a tensor too many": Case(
        HF, "unexpected: model.strange [3]", weights(lambda t: t.update({"model.strange": np.ones(3, np.float32)}))
    ),
    "a wrong shape": Case(
        HF,
        "wrong shape: model.norm.weight is [3], the config says [16]",
        weights(lambda tensors: tensors.update({"model.norm.weight": np.ones(3, np.float32)})),
    ),
    "a run that has saved nothing": Case(
        "convert to-hf {here}/run {here}/out", "the run has no checkpoint yet", remove("run/checkpoints")
    ),
}

CASES = CONFIGS | DATA | FOLDERS | WEIGHTS


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_one_line(case, here, shared):
    check(case, here, shared)


@pytest.mark.parametrize("case", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_conversions_list_what_is_wrong(case, here, shared):
    """They have a line for each problem, and write nothing."""
    case.spoil(here)
    before = {path.name for path in here.iterdir()}
    command, *words = case.words.format(here=here).split(" ")
    status, errors = call(command, *words)
    assert (status, errors.splitlines()[0]) == (1, f"dsjax: {words[1]}: 1 problem")
    assert errors.splitlines()[1].startswith("  " + case.said) and errors.count("\n") == 2, errors
    assert {path.name for path in here.iterdir()} == before


def test_a_folder_that_another_process_uses(here, shared):
    used = os.open(here / "run", os.O_RDONLY)
    try:
        fcntl.flock(used, fcntl.LOCK_EX)
        said = "run = '{here}/run': another process is running it; stop that one, or name another folder\n"
        check(Case(AGAIN, said), here, shared)
    finally:
        os.close(used)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["text", "run"])
def test_no_permission(name, here, shared):
    def forbid(here):
        (here / "text").mkdir()
        (here / "text" / "a.txt").write_text("a")
        (here / "text" / "a.txt").chmod(0)
        (here / "locked").mkdir(0o500)

    said = {"text": "{here}/text/a.txt: Permission denied\n", "run": "run = '{here}/locked/run': cannot write in"}
    words = {"text": data("text"), "run": "train {here}/run.toml --run {here}/locked/run"}
    check(Case(words[name], said[name], forbid), here, shared)


def test_a_mark_of_the_encoding_is_no_mistake(here):
    (here / "run.toml").write_bytes(b"\xef\xbb\xbf" + (here / "run.toml").read_bytes())
    assert call("train", here / "run.toml", "--print-config") == (0, "")


def test_a_run_goes_on_once_the_mistake_is_mended(here):
    """In a folder that a start with wrong weights has made, and in one whose last checkpoint is damaged."""
    words = ("train", here / "run.toml", "--run", here / "new")
    assert call(*words, "--train.initial-weights", here / "nowhere")[0] == 2
    assert call(*words, "--train.initial-weights", here / "hf") == (0, "")
    cut(here, 2)
    status, errors = call("generate", here / "run", "--max-tokens", "1")
    assert status == 0
    assert f"dsjax: step 1 of {here / 'run'}\n" in errors
    assert call("train", here / "run.toml", "--run", here / "run")[0] == 0
    assert f"dsjax: step 2 of {here / 'run'}\n" in call("generate", here / "run", "--max-tokens", "1")[1]


# Environments.

ENVIRONMENTS = {
    "a flag that XLA does not know": (
        {"XLA_FLAGS": "--xla_warp=true"},
        "XLA_FLAGS = '--xla_warp=true': unknown flag: --xla_warp=true\n",
    ),
    "a value that XLA does not understand": (
        {"XLA_FLAGS": "--xla_cpu_enable_fast_math=perhaps"},
        "XLA_FLAGS = '--xla_cpu_enable_fast_math=perhaps': couldn't interpret value perhaps for flag xla_cpu_enable_",
    ),
    "an open quote": ({"XLA_FLAGS": "--xla_dump_to='a"}, 'XLA_FLAGS = "--xla_dump_to=\'a": no closing quotation\n'),
    "no number of the process": (
        {"DSJAX_PROCESSES": "2"},
        "DSJAX_PROCESS is missing: it must be the number of this process, from 0 to 1\n",
    ),
    "a number that is too high": (
        {"DSJAX_PROCESSES": "2", "DSJAX_PROCESS": "2", "DSJAX_COORDINATOR": "a:1"},
        "DSJAX_PROCESS = 2: must be from 0 to 1, as DSJAX_PROCESSES = 2\n",
    ),
    "a number in words": ({"DSJAX_PROCESSES": "two"}, "DSJAX_PROCESSES = 'two': must be an integer of at least 0\n"),
    "no port": (
        {"DSJAX_PROCESSES": "2", "DSJAX_PROCESS": "1", "DSJAX_COORDINATOR": "node0"},
        "DSJAX_COORDINATOR = 'node0': must be host:port of process 0, such as node0:29400\n",
    ),
}


@pytest.mark.parametrize(("variables", "said"), ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
def test_environments(variables, said, here, shared, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check(Case(NEW, said), here, shared)


def test_a_terminal_without_the_letters(here, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as end:
        importlib.import_module("dsjax.generate").main([str(here / "run"), "--prompt", "größe", "--max-tokens", "1"])
    assert end.value.code == 2
    last = errors.getvalue().splitlines()[-1]
    assert last == r"dsjax: the terminal's encoding, ascii, has no 'ö': set PYTHONIOENCODING=utf-8"


def program(here: Path, *words: str, before: str = "", **variables: str) -> tuple[int, str]:
    """Run the command as a program of its own, and return its exit status and what it wrote to stderr."""
    command = f'{before} exec "$0" -m dsjax.train "$@"'
    environment = {name: value for name, value in os.environ.items() if name != "HOME"} | variables
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, here / "run.toml", "--run", here / "new", *words],
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"JAX_PLATFORMS": "cuda"}, "JAX_PLATFORMS = 'cuda': "),
        (
            {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            "mesh: each process needs 2 devices and has 1: start Python with JAX_NUM_CPU_DEVICES=2, which simulates "
            "them on the CPU\n",
        ),
    ],
)
def test_devices_that_are_not_there(variables, said, here):
    if variables["JAX_PLATFORMS"] == "cuda" and importlib.util.find_spec("jax_cuda13_plugin"):
        pytest.skip("there may be GPUs")
    status, errors = program(here, "--preflight", "--mesh.data", "2", **variables)
    assert status == 2 and errors.startswith(f"dsjax: {said}") and errors.count("\n") == 1, errors
    assert not (here / "new").exists()


def test_reads_that_are_abandoned_are_not_told(here):
    """Orbax drops them when the first has failed, and Python would print each with its stack when it gets rid of it."""
    cut(here, *STEPS)
    status, errors = program(here, "--run", str(here / "run"), JAX_PLATFORMS="cpu")
    assert status == 2
    *warnings, last = errors.splitlines()
    assert ["is damaged and not used" in warning for warning in warnings] == [True, True], errors
    assert last.startswith(f"dsjax: run = '{here}/run': no usable checkpoint in ")


@pytest.mark.slow
def test_a_disk_without_room_for_the_first_checkpoint(here):
    """Without a home folder and in the C locale too, which are no mistakes."""
    variables = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "LC_ALL": "C"}
    status, errors = program(here, before="ulimit -f 20;", **variables)
    assert status == 1
    told = [line for line in errors.splitlines() if "matplotlib" not in line]  # it may find no room for its fonts
    assert told == [f"dsjax: cannot save in {here}/new/checkpoints: File too large; saved last: none"]
    assert program(here, **variables) == (0, "")
