"""Train a model: `python -m dsjax.train configs/tiny.toml`."""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from dsjax.config import Config
from dsjax.host_memory import keep_freed_memory
from dsjax.parallel.hosts import Distributed, console_of_process, errors_of_process, leave, processes, start
from dsjax.parallel.xla_flags import set_flags
from dsjax.settings import load_run, one_line_errors


@dataclass(frozen=True)
class Options:
    """Train the model that a TOML file describes; the same command again resumes the run."""

    fresh: bool = False
    """Begin at step 0; refuses a folder that a run has used."""
    overwrite: bool = False
    """With --fresh: delete what the run in that folder left."""
    profile: str = ""
    """Trace these steps, first:last, into the run's folder `profile`, for XProf (TensorBoard's profile page)."""
    preflight: bool = False
    """Only compare the hosts, try the links between their devices, and say how it went."""
    distributed: Distributed = field(default_factory=Distributed)


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    with one_line_errors():
        config, options = load_run(argv, Options, "train")
        keep_freed_memory()
        flags = set_flags(config)
        # Here JAX is imported: behind the settings, so that --help and mistakes are answered at once.
        start(options.distributed)
        with errors_of_process():
            _train(config, options, flags)


def _train(config: Config, options: Options, flags: Sequence[str]) -> None:
    from dsjax.checkpoint.native import SaveFailed
    from dsjax.parallel.preflight import preflight
    from dsjax.training.folder import space_for
    from dsjax.training.loop import TrainingFailed, train

    console = console_of_process()
    if flags:
        console.print(f"flags     {' '.join(flags)}; --no-xla-flags leaves them away")
    preflight(
        config,
        space_for(config, overwrite=options.overwrite),
        console,
        timeout=options.distributed.timeout,
        always_say=options.preflight,
    )
    if options.preflight:
        return
    try:
        train(config, fresh=options.fresh, overwrite=options.overwrite, profile=options.profile, console=console)
    except TrainingFailed as failure:
        raise SystemExit(f"dsjax: {failure}") from None
    except SaveFailed as failure:
        if processes() > 1:
            raise SystemExit(f"dsjax: {failure}") from None
        print(f"dsjax: {failure}", file=sys.stderr)
        leave(1)  # Orbax has threads that would wait minutes for a folder that is gone


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until the run is about to train there is nothing to save: Ctrl-C ends at once.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    main(sys.argv[1:])
