"""Measure, and print JSON: `python -m dsjax.bench train configs/tiny.toml` what a training step takes, `python -m
dsjax.bench overlap configs/tiny_dualpipe.toml` what overlapping a pipeline's pairs is worth, `python -m dsjax.bench
generate runs/tiny` how fast a model writes, `python -m dsjax.bench kernels` what the kernels of a Hopper GPU do."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from dsjax.benchmarks import generation, overlap
from dsjax.host_memory import keep_freed_memory
from dsjax.parallel.hosts import simulate_devices
from dsjax.settings import load_options, load_run, load_subcommand, one_line_errors


@dataclass(frozen=True)
class Train:
    """Time the compiled training step of a run, on its own data."""

    steps: int = 30
    """Steps that are timed, after two that are not."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps}: must be at least 1")


@dataclass(frozen=True)
class Kernels:
    """Check the kernels for Hopper on the GPU at hand, and time them beside XLA and torch; exit status 1 if one fails.

    JSON goes to stdout; progress, and at the end tables, to stderr.
    """

    only: tuple[Literal["check", "products", "quantizers", "experts", "gradients", "sms", "bf16", "tune"], ...] = ()
    """Groups of measurements to run; all of them by default, in this order."""
    budget: float = 450.0
    """Seconds that it may take; what no longer fits is skipped, and named."""
    repeats: int = 5
    """Samples of each figure, of which the median counts; rivals take turns."""
    torch: bool = True
    """Time torch's products too, where it is installed."""
    dry_run: bool = False
    """Go through everything with tiny shapes and by the definitions on a CPU, in place of the kernels."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats = {self.repeats}: must be at least 1")
        if self.budget < 0:
            raise ValueError(f"budget = {self.budget}: must be at least 0")


COMMANDS = {"train": Train, "overlap": overlap.Overlap, "generate": generation.Generate, "kernels": Kernels}


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    with one_line_errors():
        runs = {"train": _train, "overlap": _overlap, "generate": _generate}
        return runs[argv[0]](argv[1:]) if argv and argv[0] in runs else _kernels(argv)


def _train(argv: Sequence[str]) -> int:
    config, options = load_run(argv, Train, "bench train")
    keep_freed_memory()
    simulate_devices(config.mesh.devices)
    # Behind the settings, so that --help and mistakes are answered at once.
    from dsjax.benchmarks.train_step import measure

    print(json.dumps(measure(config, options.steps), indent=2))
    return 0


def _overlap(argv: Sequence[str]) -> int:
    config, options = load_run(argv, overlap.Overlap, "bench overlap")
    result = overlap.measure(config, options, overlap.in_process)
    print(json.dumps(result, indent=2))
    print(overlap.table(result), file=sys.stderr)
    return 0


def _generate(argv: Sequence[str]) -> int:
    result = generation.measure(load_options(argv, generation.Generate, "bench generate"))
    print(json.dumps(result, indent=2))
    print(generation.table(result), file=sys.stderr)
    return 0


def _kernels(argv: Sequence[str]) -> int:
    options = load_subcommand(argv, COMMANDS, "bench")
    from dsjax.benchmarks.kernels import finish, measure

    return finish(measure(**asdict(options)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
