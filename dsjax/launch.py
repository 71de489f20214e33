"""Processes that train together on this machine: `python -m dsjax.launch --processes 2 configs/tiny.toml`."""

import shlex
import sys
from collections.abc import Sequence

from dsjax import train
from dsjax.parallel.local_cluster import Options, launch
from dsjax.settings import load_options, load_run, one_line_errors


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    with one_line_errors():
        own = _own_words(argv)
        options, words = load_options(argv[:own], Options, "launch"), argv[own:]
        if options.module == "dsjax.train":
            # Mistakes and --help are answered once, and not by every process.
            distributed = load_run(words, train.Options, "train")[1].distributed
            if distributed.place():
                raise ValueError("--distributed.processes and its like are for dsjax.launch to say: leave them away")
            load_run([*words, *shlex.split(options.fallback)], train.Options, "train")
        raise SystemExit(launch([sys.executable, "-m", options.module, *words], options))


def _own_words(argv: Sequence[str]) -> int:
    """How many of the first words are options of launch, each with its value."""
    count = 0
    while count < len(argv) and argv[count].startswith("-"):
        count += 1 if "=" in argv[count] or argv[count] in ("-h", "--help") else 2
    return min(count, len(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
