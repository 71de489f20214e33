"""Every form of checkpoint behind one door."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from dsjax.checkpoint.conversion import SHARD_BYTES, Format, Plan
from dsjax.checkpoint.deepseek import is_deepseek, open_deepseek, plan_deepseek
from dsjax.checkpoint.huggingface import open_huggingface, plan_huggingface
from dsjax.checkpoint.sources import CheckpointProblems, Source, is_run
from dsjax.checkpoint.weights import DOCUMENT, open_weights, plan_weights
from dsjax.config import ModelConfig

Target = Literal["dsjax", "huggingface", "deepseek"]


def open_checkpoint(
    path: Path,
    config: ModelConfig | None = None,
    *,
    mtp: bool = True,
    step: int | None = None,
    weights: Literal["live", "ema"] = "live",
    headers_only: bool = False,
) -> Source:
    """Open a checkpoint, whatever its form, and check that it holds what its config calls for.

    Args:
        path: dsjax weights, a run, a folder in Hugging Face's or the demo's form, or a file of weights.
        config: the model, where no config lies beside the weights.
        mtp: False leaves MTP layers out.
        step: which checkpoint of a run; by default the newest undamaged one.
        weights: which weights of a run: those that were trained, or their moving average.
        headers_only: do not read a run's arrays to see whether they are damaged.

    Raises:
        CheckpointProblems: lists everything that is wrong.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointProblems(path, ["no such file or folder"])
    _require_fitting(path, config, step, weights)
    if (path / DOCUMENT).exists():
        source = open_weights(path)
    elif is_run(path):
        from dsjax.checkpoint.runs import open_run  # Orbax takes a second to import.

        source = open_run(path, step, weights, headers_only=headers_only)
    elif is_deepseek(path):
        source = open_deepseek(path, config)
    else:
        source = open_huggingface(path, config)
    if not mtp and source.config.num_nextn_predict_layers:
        main = source.config.num_hidden_layers
        source.config = replace(source.config, num_nextn_predict_layers=0)
        source.stored = {name: tensor for name, tensor in source.stored.items() if not _in_module(name, main)}
        source.notes.append("MTP layers were left out, as asked")
    try:
        source.check()
    except CheckpointProblems:
        source.close()
        raise
    return source


def _require_fitting(path: Path, config: ModelConfig | None, step: int | None, weights: str) -> None:
    """Raise CheckpointProblems for choices that a form has not, which would be passed over without a word, and for a
    run that has nothing yet."""
    own = (path / DOCUMENT).exists()
    run, problems = not own and is_run(path), []
    if not run and (step is not None or weights != "live"):
        problems.append("only a training run has steps and averaged weights, and this is none")
    if config is not None and (own or run):
        problems.append(f"has a config of its own{f', in {DOCUMENT}' if own else ''}; none can be given")
    if path.name.isdigit() and is_run(path.parent) and not problems:
        problems.append(f"one checkpoint of a run; name the run: dsjax.convert takes --step {path.name} too")
    if not own and not run and (path / "config.toml").is_file() and not (path / "config.json").exists():
        problems.append("the run has no checkpoint yet")
    if problems:
        raise CheckpointProblems(path, problems)


def _in_module(name: str, main_layers: int) -> bool:
    parts = name.split(".")
    return parts[:2] == ["model", "layers"] and int(parts[2]) >= main_layers


def make_plan(
    source: Source, target: Target, wanted: Format = "keep", *, ranks: int = 1, shard_bytes: int = SHARD_BYTES
) -> Plan:
    """Plan to write a checkpoint in another form; `ranks` is for the demo's. Raises CheckpointProblems if it cannot."""
    if target == "deepseek":
        return plan_deepseek(source, wanted, ranks)
    return (plan_weights if target == "dsjax" else plan_huggingface)(source, wanted, shard_bytes)
