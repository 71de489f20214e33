"""Training in FP8 beside BF16: the same run, seeds and data, and how far the losses are apart.

`python -m dsjax.benchmarks.precision configs/tiny.toml --folder runs/precision` trains every variant, goes on where it
was stopped, prints JSON and draws `precision.png`. The control is BF16 with its sums in another order (half the
sequences at a time): what rounding alone does.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from dsjax.config import Config, MeshConfig
from dsjax.parallel.hosts import simulate_devices
from dsjax.settings import load_run, one_line_errors

DECAY = 0.9
"""Of the moving average of losses that the report compares (appendix B.1)."""


@dataclass(frozen=True)
class Precision:
    """Compare a run in FP8 with the same in BF16."""

    folder: str = "runs/precision"
    """Where the runs go, and the picture."""
    steps: int = 500
    seeds: int = 3
    one_device: bool = False
    """Whether BF16 is on one device, and not on the run's mesh: what the whole recipe does to the losses."""


def variants(config: Config, *, one_device: bool) -> dict[str, Config]:
    """Return the run in FP8, in BF16, and in BF16 with another order of sums."""
    bf16, train = replace(config, precision="bf16"), config.train
    if one_device:
        bf16 = replace(bf16, mesh=MeshConfig())
    micro_batch = (train.micro_batch_size or train.batch_size) // 2
    return {
        "fp8": replace(config, precision="fp8"),
        "bf16": bf16,
        "control": replace(bf16, train=replace(train, micro_batch_size=micro_batch)),
    }


def smoothed(losses: Sequence[float]) -> Float[np.ndarray, " steps"]:
    """Return the moving average of losses."""
    result = [losses[0]]
    for loss in losses[1:]:
        result.append(DECAY * result[-1] + (1 - DECAY) * loss)
    return np.asarray(result)


def losses_of(config: Config) -> list[float]:
    """Train, or go on, and return the loss of every step."""
    from dsjax.training.loop import train
    from dsjax.training.metrics import read_metrics

    return [record["loss"] for record in read_metrics(train(config).folder / "metrics.jsonl")]


def measure(config: Config, options: Precision) -> dict:
    """Run all, draw the picture, and return the relative differences to BF16."""
    differences: dict[str, list] = {"fp8": [], "control": []}
    for seed in range(options.seeds):
        losses = {}
        for name, variant in variants(config, one_device=options.one_device).items():
            train = replace(variant.train, seed=seed, steps=options.steps, validate_every=options.steps, log_every=1)
            checkpoint = replace(variant.checkpoint, every=options.steps)
            folder = str(Path(options.folder) / f"{name}-{seed}")
            losses[name] = smoothed(losses_of(replace(variant, train=train, checkpoint=checkpoint, run=folder)))
        for name, found in differences.items():
            found.append(losses[name] / losses["bf16"] - 1)
    _draw(differences, Path(options.folder) / "precision.png")
    return {
        name: {
            "at_the_end": [float(difference[-1]) for difference in found],
            "largest": [float(np.abs(difference).max()) for difference in found],
            "mean_of_the_last_fifth": [float(d[-len(d) // 5 :].mean()) for d in found],
        }
        for name, found in differences.items()
    }


def _draw(differences: dict[str, list], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for name, color, label in (
        ("control", "#999999", "BF16, sums in another order"),
        ("fp8", "#0072B2", "FP8"),
    ):
        for seed, difference in enumerate(differences[name]):
            axes.plot(100 * difference, color=color, linewidth=1.2, alpha=0.8, label=None if seed else label)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xlabel("step")
    axes.set_ylabel("loss over that in BF16, %")
    axes.set_title(f"Moving averages of {DECAY}, {len(differences['fp8'])} seeds", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(file)


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    with one_line_errors():
        config, options = load_run(argv, Precision, "benchmarks.precision")
        simulate_devices(config.mesh.devices)
        print(json.dumps(measure(config, options), indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
