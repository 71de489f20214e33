"""Continue prompts with a trained model: `python -m dsjax.generate runs/tiny --prompt "def "`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsjax.inference.batch import LineSettings
from dsjax.inference.console import continue_file, continue_prompt, warnings_said
from dsjax.inference.sampling import Sampling
from dsjax.inference.settings import EngineSettings, Precision
from dsjax.parallel.hosts import Distributed, errors_of_process, start
from dsjax.settings import load_options, one_line_errors


@dataclass(frozen=True)
class Options:
    """Continue a prompt with a trained model; the text is written to stdout as it comes, all else to stderr."""

    path: str
    """Folder of a run, or of weights in Hugging Face's, DeepSeek's or dsjax's own form with a tokenizer.json."""
    prompt: str = ""
    """Text to continue; empty begins a document."""
    prompts: str = ""
    """JSONL file of prompts, each an object with "prompt", and if wanted "id", "stop", "max_tokens" and settings."""
    output: str = ""
    """JSONL file to which the answers to --prompts are written; prompts that it has answers for are left out. The exit
    status is 1 if any prompt got an error in place of an answer."""
    max_tokens: int = 200
    """Most tokens to write; the end of the document may come before."""
    temperature: float = 0.8
    """What logits are divided by; 0 always takes the likeliest token."""
    top_p: float = 0.95
    """Choose among the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Choose among this many likeliest tokens; 0 for all."""
    repetition_penalty: float = 1.0
    """What positive logits of tokens that are already there are divided by, and negative ones multiplied with."""
    seed: int = 0
    """Same seed, same text."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, and are no part of it."""
    ema: bool = False
    """Use the moving average of a run's weights."""
    max_context: int = 0
    """Most tokens of prompt and text together; 0 for the length of the sequences that the model was made for."""
    slots: int = 32
    """Prompts of --prompts that are continued at the same time."""
    deployment: str = ""
    """TOML file of `configs/serving`, or its name: how several devices share the model; empty for one device."""
    precision: Precision = "auto"
    """Of weights and their products: `fp8` quantizes what is not stored so; `auto` is as stored, where that is fast."""
    speculate: int = 0
    """Tokens that the model's MTP modules draft per step, which changes the speed and not the text; 0 for none."""
    distributed: Distributed = field(default_factory=Distributed)

    def __post_init__(self) -> None:
        for name, low in (("max_tokens", 1), ("max_context", 0), ("slots", 1), ("speculate", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {low}")
        if any("\ud800" <= character <= "\udfff" for character in self.prompt):
            raise ValueError(f"prompt = {self.prompt!r}: must be in the encoding of the terminal, as a rule UTF-8")
        if bool(self.prompts) != bool(self.output):
            raise ValueError("--prompts and --output go together: prompts come from the one, answers go to the other")
        if self.prompts and self.prompt:
            raise ValueError(f"prompt = {self.prompt!r}: must be empty where there are --prompts")

    @property
    def settings(self) -> LineSettings:
        """How tokens are chosen, and how many."""
        names = "temperature", "top_p", "top_k", "repetition_penalty", "seed"
        sampling = Sampling(**{name: getattr(self, name) for name in names})
        if "" in self.stop:
            raise ValueError("stop = '': must have at least one character")
        return LineSettings(sampling, self.max_tokens, self.stop)


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    with one_line_errors():
        options = load_options(argv, Options, "generate")
        settings = options.settings
        given = EngineSettings(slots=options.slots, context=options.max_context, speculate=options.speculate)
        how = {"deployment": options.deployment, "ema": options.ema, "precision": options.precision}
        start(options.distributed)
        with errors_of_process(), warnings_said():
            if options.prompts:
                continue_file(options.path, Path(options.prompts), Path(options.output), settings, given, **how)
            else:
                continue_prompt(options.path, options.prompt, settings, given, **how)


if __name__ == "__main__":
    main(sys.argv[1:])
