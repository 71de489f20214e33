"""Checkpoints in and out: `python -m dsjax.convert from-hf SOURCE DESTINATION` (docs/checkpoints.md)."""

import sys
from collections.abc import Sequence

from dsjax.checkpoint.commands import COMMANDS, run
from dsjax.settings import in_one_line, load_subcommand, one_line_errors

PROBLEMS, INTERRUPTED = 1, 130
"""Exit statuses: the checkpoint is not what it should be; stopped by the user. A wrong command line is 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    try:
        with one_line_errors():
            options = load_subcommand(sys.argv[1:] if argv is None else argv, COMMANDS, "convert")
    except SystemExit as status:
        return int(status.code or 0)
    try:
        run(options)
    except (ValueError, OSError) as problems:  # A checkpoint's problems have a line each.
        print("dsjax:", in_one_line(problems) if isinstance(problems, OSError) else problems, file=sys.stderr)
        return PROBLEMS
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
