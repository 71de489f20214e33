"""Continue a prompt with a trained model: `python -m dsjax.generate runs/tiny --prompt "def "`."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dsjax.inference.generation import generate
from dsjax.inference.load import Model, load_model
from dsjax.inference.sampling import Sampling
from dsjax.inference.text import reopen_last_token, stream_text
from dsjax.settings import load_options, one_line_errors


@dataclass(frozen=True)
class Options:
    """Continue a prompt with a trained model; the text is written to stdout as it comes, all else to stderr."""

    path: str
    """Folder of a run, or of weights in Hugging Face's, DeepSeek's or dsjax's own form with a tokenizer.json."""
    prompt: str = ""
    """Text to continue; empty begins a document."""
    max_tokens: int = 200
    """Most tokens to write; the end of the document may come before."""
    temperature: float = 0.8
    """What logits are divided by; 0 always takes the likeliest token."""
    top_p: float = 0.95
    """Choose among the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Choose among this many likeliest tokens; 0 for all."""
    seed: int = 0
    """Same seed, same text."""
    ema: bool = False
    """Use the moving average of a run's weights."""
    max_context: int = 0
    """Most tokens of prompt and text together; 0 for the length of the sequences that the model was made for."""

    def __post_init__(self) -> None:
        for name, low in (("max_tokens", 1), ("max_context", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {low}")
        if any("\ud800" <= character <= "\udfff" for character in self.prompt):
            raise ValueError(f"prompt = {self.prompt!r}: must be in the encoding of the terminal, as a rule UTF-8")

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seed=self.seed)


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    with one_line_errors():
        options = load_options(argv, Options, "generate")
        sampling = options.sampling
        model = load_model(options.path, ema=options.ema)
        print(f"dsjax: {model.origin}", file=sys.stderr)
        write(model, options, sampling)


def write(model: Model, options: Options, sampling: Sampling) -> None:
    """Write the prompt and its continuation."""
    prompt = [model.opening, *model.tokenizer.encode([options.prompt], special=True)[0]]
    limit = options.max_context or model.context
    if len(prompt) >= limit:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens: must be below the {limit} of the context; "
            "shorten it, or raise --max-context"
        )
    room = min(options.max_tokens, limit - len(prompt))
    shown = model.tokenizer.decode(prompt[1:])
    before, first = reopen_last_token(model.tokenizer, prompt, model.config.vocab_size)
    times: list[float] = []

    def timed(ids: Iterator[int]) -> Iterator[int]:
        for id in ids:
            times.append(time.perf_counter())
            yield id

    ids = timed(generate(model, before, sampling, room, first=first))
    print(options.prompt, end="", flush=True)
    try:
        for text in stream_text(model.tokenizer, ids, before[1:], shown=shown):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print(flush=True)
    # From the first token on: what came before it is compilation and the prompt.
    seconds = times[-1] - times[0] if len(times) > 1 else 0
    speed = f" in {seconds:.1f} s, {(len(times) - 1) / seconds:.0f} tokens/s" if seconds else ""
    full = f"; stopped by the context of {limit} tokens" if len(times) == room < options.max_tokens else ""
    print(f"dsjax: {len(times)} tokens{speed}{full}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
