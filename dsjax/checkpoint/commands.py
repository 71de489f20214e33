"""The work of `python -m dsjax.convert`: options of its commands, and what each does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from dsjax.checkpoint import audit, forms
from dsjax.checkpoint.conversion import SHARD_BYTES, Format, convert, require_absent
from dsjax.checkpoint.families import config_from_huggingface
from dsjax.checkpoint.sources import CheckpointProblems, read_json
from dsjax.config import ModelConfig


@dataclass(frozen=True)
class Conversion:
    """What all conversions can be told; the source may have any form."""

    source: str
    """Folder of weights, a file of weights with its config.json beside it, or the folder of a training run."""
    destination: str
    """Folder to be made."""
    dtype: Format = "keep"
    """Format of the written weights: as they are stored, or all BF16, FP32 or FP8 (the matrices that releases quantize;
    weights that are FP8 already are passed through)."""
    config: str = ""
    """A config.json of Hugging Face's, where none lies beside the weights."""
    mtp: bool = True
    """Whether to bring the MTP layers along."""
    step: int | None = None
    """Which checkpoint of a training run; the newest if not given."""
    weights: Literal["live", "ema"] = "live"
    """Which weights of a training run: those that were trained, or their moving average."""
    shard_bytes: int = SHARD_BYTES
    """Size of a written file, where one tensor is not larger by itself."""
    workers: int | None = None
    """Files in work at once; by default one per CPU, at most 8."""

    def __post_init__(self) -> None:
        for name in ("step", "shard_bytes", "workers", "ranks"):
            value, least = getattr(self, name, None), 0 if name == "step" else 1
            if value is not None and value < least:
                raise ValueError(f"{name} = {value}: must be at least {least}")


class FromHuggingFace(Conversion):
    """Hugging Face's form (FP8, BF16, FP32; safetensors or PyTorch files) to dsjax weights."""


class ToHuggingFace(Conversion):
    """dsjax weights or a training run to Hugging Face's form, for transformers and serving engines."""


class FromDeepSeek(Conversion):
    """Files of DeepSeek's inference demo (model0-mp8.safetensors ...) to dsjax weights."""


@dataclass(frozen=True)
class ToDeepSeek(Conversion):
    """dsjax weights or a training run to files of DeepSeek's inference demo."""

    ranks: int = 1
    """Files to divide the model among, one per GPU of the demo."""


@dataclass(frozen=True)
class Inspect:
    """What a checkpoint holds, from its headers alone."""

    checkpoint: str
    """Folder or file of weights, or the folder of a training run."""


@dataclass(frozen=True)
class Verify:
    """Whether a checkpoint holds what its config calls for, and whether its bytes are those that were written."""

    checkpoint: str
    """Folder or file of weights, or a config.json by itself, of which `--listing` is to be the list of tensors."""
    against: str = ""
    """A checkpoint of any form, every tensor of which must be the same bit for bit."""
    listing: str = ""
    """A JSON file {name: {"dtype": ..., "shape": ...}} of the tensors of a release."""
    headers_only: bool = False
    """Leave out the checksums of a converted folder, which need every byte."""


COMMANDS = {
    "from-hf": FromHuggingFace,
    "to-hf": ToHuggingFace,
    "from-deepseek": FromDeepSeek,
    "to-deepseek": ToDeepSeek,
    "inspect": Inspect,
    "verify": Verify,
}
_TARGETS: dict[type, forms.Target] = {
    FromHuggingFace: "dsjax",
    ToHuggingFace: "huggingface",
    FromDeepSeek: "dsjax",
    ToDeepSeek: "deepseek",
}


def run(options: Conversion | Inspect | Verify) -> None:
    """Do what a command asks for. Raises CheckpointProblems that lists everything wrong with a checkpoint."""
    {Inspect: _inspect, Verify: _verify}.get(type(options), _convert)(options)


def _convert(options: Conversion) -> None:
    """Convert, with a progress bar, and print what was done."""
    destination = Path(options.destination)
    require_absent(destination)
    config = _read_config(Path(options.config))[0] if options.config else None
    source = forms.open_checkpoint(
        Path(options.source), config, mtp=options.mtp, step=options.step, weights=options.weights
    )
    target, ranks = _TARGETS[type(options)], getattr(options, "ranks", 1)
    plan = forms.make_plan(source, target, options.dtype, ranks=ranks, shard_bytes=options.shard_bytes)
    with _progress("writing") as show:
        report = convert(source, plan, destination, workers=options.workers, progress=show)
    rate = report.nbytes / max(report.seconds, 1e-9) / 1e6
    print(
        f"{report.destination}: {report.tensors:,} tensors, {report.nbytes:,} bytes in {report.seconds:.1f} s "
        f"({rate:,.0f} MB/s)"
    )
    for note in report.notes:
        print(f"  {note}")


def _inspect(options: Inspect) -> None:
    """Print a summary."""
    print(audit.describe(forms.open_checkpoint(Path(options.checkpoint), headers_only=True)))


def _verify(options: Verify) -> None:
    """Check, and print what was checked."""
    path = Path(options.checkpoint)
    if options.listing:
        config, data = _read_config(path / "config.json" if path.is_dir() else path)
        ours = audit.released_listing(config, fp8="quantization_config" in data)
        reference = audit.read_listing(Path(options.listing))
        _raise_if_any(path, audit.compare_listings(ours, reference))
        print(f"{len(ours):,} of {len(reference):,} tensors have the names, dtypes and shapes of {options.listing}")
        return
    source = forms.open_checkpoint(path, headers_only=options.headers_only)
    print(f"{path}: {len(source.stored):,} tensors are what the config calls for")
    if source.form == "run" and not options.headers_only:
        print(f"every array has the checksum that the run saved ({'; '.join(source.notes)})")
    elif not options.headers_only:
        problems = audit.verify_checksums(path)
        _raise_if_any(path, problems or [])
        print("no checksums are there to compare" if problems is None else "every byte has the checksum of its report")
    if options.against:
        other = forms.open_checkpoint(Path(options.against))
        _raise_if_any(path, audit.compare_values(source, other))
        print(f"{len(source.stored):,} tensors are those of {options.against}, bit for bit")


def _read_config(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Return the model that a config.json describes, and the file's contents."""
    problems: list[str] = []
    data = read_json(path, problems)
    if not problems:
        try:
            return config_from_huggingface(data), data
        except ValueError as error:
            problems += str(error).splitlines()
    raise CheckpointProblems(path, problems)


def _raise_if_any(path: Path, problems: list[str]) -> None:
    if problems:
        raise CheckpointProblems(path, problems)


@contextmanager
def _progress(verb: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn(verb), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(verb, total=None)

    def show(done: int, total: int) -> None:
        bar.start()  # At the first bytes: nothing is shown of what is refused before.
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
