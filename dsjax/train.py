"""Train a model: `python -m dsjax.train configs/tiny.toml`."""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dsjax.host_memory import keep_freed_memory
from dsjax.settings import load_run, one_line_errors


@dataclass(frozen=True)
class Options:
    """Train the model that a TOML file describes; the same command again resumes the run."""

    fresh: bool = False
    """Begin at step 0; refuses a folder that a run has used."""
    overwrite: bool = False
    """With --fresh: delete what the run in that folder left."""


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    with one_line_errors():
        config, options = load_run(argv, Options, "train")
        keep_freed_memory()
        # Behind the settings, so that --help and mistakes are answered at once.
        from dsjax.training.loop import TrainingFailed, train

        try:
            train(config, fresh=options.fresh, overwrite=options.overwrite)
        except TrainingFailed as failure:
            print("dsjax:", failure, file=sys.stderr)
            raise SystemExit(1) from None


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Before the first step there is nothing to save: Ctrl-C ends at once, even while something compiles.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    main(sys.argv[1:])
