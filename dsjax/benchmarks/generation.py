"""How fast the engine writes, beside transformers' `generate` on the same weights, with speculation, and with a full
prefix cache."""

import contextlib
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Generate:
    """Time how fast a trained model writes at several batch sizes; rivals take turns. JSON goes to stdout."""

    path: str
    """Folder of weights, see `python -m dsjax.generate`; in Hugging Face's form where --torch is given."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Requests at the same time."""
    prompt_tokens: int = 64
    """Of each, drawn at random."""
    max_tokens: int = 128
    """That each is continued by, whatever they are."""
    rounds: int = 3
    """Of which the median counts, after one that does not."""
    speculate: int = 0
    """Drafts per step of a further rival, which speculates; 0 for none."""
    cached: int = 0
    """Prompts in the prefix cache of a further rival, which nobody asks for any more; 0 for none."""
    torch: str = ""
    """A Python that has torch and transformers, for their `generate` as a rival; empty for none."""
    torch_threads: tuple[int, ...] = (1, 2)
    """Threads of torch, each number a rival: more are slower where the machine has other work."""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "max_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("batches", "torch_threads"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be numbers of at least 1")
        for name in ("speculate", "cached"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 0")


class Answers(NamedTuple):
    """What a rival made of some prompts."""

    seconds: float
    tokens: list[list[int]]
    """Of each answer."""
    margins: list[list[float]] | None = None
    """Of each token: by how much its score was above the next best."""


Rival = Callable[[list[list[int]]], Answers]
OURS = "dsjax"


def measure(options: Generate) -> dict[str, Any]:
    """Return tokens per second of each rival by batch size, and how they compare with ours.

    Raises:
        ValueError: weights that cannot be loaded, or draft nothing; a Python without torch and transformers.
    """
    # Behind the settings, so that --help and mistakes are answered at once.
    from dsjax.benchmarks.generation_rivals import EngineRival, Transformers
    from dsjax.inference.load import load_model

    model = load_model(options.path, mtp=options.speculate > 0)
    result: dict[str, Any] = {"model": model.origin}
    with contextlib.ExitStack() as stack:
        transformers = None
        if options.torch:
            transformers = stack.enter_context(Transformers(options.torch, options.path, options.max_tokens))
            result["versions"] = transformers.versions
        rivals: dict[str, Rival] = {OURS: EngineRival(model, options)}
        if options.cached:
            rivals["cached"] = EngineRival(model, options, cached=options.cached)
        if options.speculate:
            rivals["speculating"] = EngineRival(model, options, speculate=options.speculate)
        if transformers:
            for threads in options.torch_threads:
                rivals[f"torch, {threads} thread{'s' * (threads > 1)}"] = transformers.with_threads(threads)
        result["by_batch"] = {}
        for batch in options.batches:
            rng = np.random.default_rng(batch)
            # Other prompts each time: the prefix cache would know them.
            rounds = rng.integers(1, model.config.vocab_size, (options.rounds + 1, batch, options.prompt_tokens))
            answers = in_turns(rivals, rounds.tolist())
            result["by_batch"][str(batch)] = found = compared(answers)
            if transformers:
                telling = functools.partial(transformers.continued, options.torch_threads[0], margins=True)
                margins = map(parted, answers[OURS], map(telling, rounds.tolist()))
                found["largest_margin_where_parted"] = max(margins)
    if options.speculate:
        result["acceptance"] = rivals["speculating"].engine.counts.acceptance
    if options.cached:
        result["idle_pages"] = {name: rivals[name].engine.pages_idle for name in (OURS, "cached")}
    return result


def in_turns(rivals: dict[str, Rival], rounds: list[list[list[int]]]) -> dict[str, list[Answers]]:
    """Let rivals continue the same prompts, and return their answers of each round."""
    answers = {name: [] for name in rivals}
    for prompts in rounds:
        for name, rival in rivals.items():
            answers[name].append(rival(prompts))
    return answers


def compared(answers: dict[str, list[Answers]]) -> dict[str, Any]:
    """Return how fast each rival was, and how others compare with ours.

    The first round, in which there may be something to compile, is not timed.
    """
    count = sum(len(tokens) for tokens in answers[OURS][0].tokens)
    rates = {name: count / statistics.median(one.seconds for one in all[1:]) for name, all in answers.items()}
    others = [name for name in answers if name != OURS]
    return {
        "tokens_per_s": rates,
        "dsjax_times_as_fast": {name: rates[OURS] / rates[name] for name in others},
        "same_tokens": {name: _same(answers[OURS], answers[name]) for name in others},
    }


def _same(ours: list[Answers], theirs: list[Answers]) -> float:
    """Return the share of tokens that are equal; behind the first of an answer that is not, few are."""
    mine, others = (np.concatenate([one.tokens for one in all]) for all in (ours, theirs))
    return float((mine == others).mean())


def parted(ours: Answers, theirs: Answers) -> float:
    """Return by how much the likeliest token was ahead where an answer first differs, at most; 0 where none does."""
    differs = np.asarray(ours.tokens) != np.asarray(theirs.tokens)
    first = differs.argmax(axis=1)
    return float(np.max(np.asarray(theirs.margins)[range(len(first)), first], where=differs.any(axis=1), initial=0.0))


def table(result: dict[str, Any]) -> str:
    """Write the figures for people: tokens per second, and in brackets what share of ours that is."""
    names = list(next(iter(result["by_batch"].values()))["tokens_per_s"])
    lines = ["requests" + "".join(f"{name:>22}" for name in names)]
    for batch, found in result["by_batch"].items():
        cells = []
        for name, rate in found["tokens_per_s"].items():
            ratio = found["dsjax_times_as_fast"].get(name)
            cells.append(f"{rate:.0f} tokens/s" + ("" if ratio is None else f" ({1 / ratio:.2f})"))
        lines.append(f"{batch:>8}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)
