"""Measure: `python -m dsjax.bench train configs/tiny.toml` prints what a training step takes, as JSON."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dsjax.host_memory import keep_freed_memory
from dsjax.parallel.hosts import simulate_devices
from dsjax.settings import load_run, one_line_errors


@dataclass(frozen=True)
class Train:
    """Time the compiled training step of a run, on its own data."""

    steps: int = 30
    """Steps that are timed, after two that are not."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps}: must be at least 1")


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    with one_line_errors():
        if list(argv[:1]) != ["train"]:
            given = f"{argv[0]!r}" if argv else "nothing"
            raise ValueError(f"{given} is no benchmark: must be 'train' and a run, such as configs/tiny.toml")
        config, options = load_run(argv[1:], Train, "bench train")
        keep_freed_memory()
        simulate_devices(config.mesh.devices)
        # Behind the settings, so that --help and mistakes are answered at once.
        from dsjax.benchmarks.train_step import measure

        print(json.dumps(measure(config, options.steps), indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
