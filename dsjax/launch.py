"""Processes that work together on this machine: `python -m dsjax.launch --processes 2 configs/tiny.toml`."""

import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from dsjax import train
from dsjax.parallel.local_cluster import Options, launch
from dsjax.settings import load_options, load_run, one_line_errors

COMMANDS = ("dsjax.train", "dsjax.generate", "dsjax.serve")
"""Modules whose options are known here."""


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    with one_line_errors():
        own = _own_words(argv)
        options, words = load_options(argv[:own], Options, "launch"), argv[own:]
        if options.module in COMMANDS:
            # Mistakes and --help are answered once, and not by every process.
            if _options_of(options.module, words).distributed.place():
                raise ValueError("--distributed.processes and its like are for dsjax.launch to say: leave them away")
            _options_of(options.module, [*words, *shlex.split(options.fallback)])
        raise SystemExit(launch([sys.executable, "-m", options.module, *words], options))


def _options_of(module: str, words: Sequence[str]) -> Any:
    """The options that a command would have."""
    if module == "dsjax.train":
        return load_run(words, train.Options, "train")[1]
    return load_options(words, import_module(module).Options, module.rpartition(".")[2])


def _own_words(argv: Sequence[str]) -> int:
    """How many of the first words are options of launch, each with its value."""
    count = 0
    while count < len(argv) and argv[count].startswith("-"):
        count += 1 if "=" in argv[count] or argv[count] in ("-h", "--help") else 2
    return min(count, len(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
