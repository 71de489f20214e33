"""Train a model: `python -m dsjax.train configs/tiny.toml`."""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from dsjax.host_memory import keep_freed_memory
from dsjax.parallel.hosts import (
    Distributed,
    console_of_process,
    errors_of_process,
    process_prefix,
    processes,
    simulate_devices,
    start,
)
from dsjax.settings import load_run, one_line_errors


@dataclass(frozen=True)
class Options:
    """Train the model that a TOML file describes; the same command again resumes the run."""

    fresh: bool = False
    """Begin at step 0; refuses a folder that a run has used."""
    overwrite: bool = False
    """With --fresh: delete what the run in that folder left."""
    distributed: Distributed = field(default_factory=Distributed)


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    with one_line_errors():
        config, options = load_run(argv, Options, "train")
        keep_freed_memory()
        # Here JAX is imported: behind the settings, so that --help and mistakes are answered at once.
        start(options.distributed)
        with errors_of_process():
            console = console_of_process()
            if simulate_devices(config.mesh.devices // processes()):
                console.print(f"simulated {config.mesh.devices} devices on the CPU")
            from dsjax.training.loop import TrainingFailed, train

            try:
                train(config, fresh=options.fresh, overwrite=options.overwrite, console=console)
            except TrainingFailed as failure:
                print(f"dsjax: {process_prefix()}{failure}", file=sys.stderr)
                raise SystemExit(1) from None


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until the run is about to train there is nothing to save: Ctrl-C ends at once.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    main(sys.argv[1:])
