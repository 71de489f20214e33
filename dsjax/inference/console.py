"""What `python -m dsjax.generate` does with a model: one answer to the screen, or many to a file."""

import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from dsjax.inference.batch import Id, Line, LineSettings, answer
from dsjax.inference.engine import Engine
from dsjax.inference.load import Model
from dsjax.inference.settings import EngineSettings

STRIDE = 256
"""A single answer's cache has a multiple of so many tokens, so that prompts of similar lengths share their programs."""


def show_answer(model: Model, prompt: str, settings: LineSettings, engine_settings: EngineSettings) -> None:
    """Write a prompt and its continuation to stdout as it comes, and how fast it came to stderr.

    Args:
        engine_settings: of the engine, whose context is cut to what may be needed.

    Raises:
        ValueError: the prompt is too long; nothing to draft with.
    """
    limit = engine_settings.context or model.context
    length = 1 + len(model.tokenizer.encode([prompt], special=True)[0])
    if length >= limit:
        raise ValueError(
            f"the prompt has {length} tokens: must be below the {limit} of the context; "
            "shorten it, or raise --max-context"
        )
    room = min(settings.max_tokens, limit - length)
    context = -(-(length + room) // STRIDE) * STRIDE
    engine = Engine(model, replace(engine_settings, context=context, shortest_table=context, prefix_bytes=0))
    request = engine.submit(prompt, settings.sampling, max_tokens=room, stop=settings.stop)
    print(prompt, end="", flush=True)
    try:
        for text in engine.stream(request):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print(flush=True)
    count, times = len(request.tokens), request.times
    # From the first token on: what came before it is compilation and the prompt.
    seconds = times[-1] - times[0] if count > 1 else 0
    speed = f" in {seconds:.1f} s, {(count - 1) / seconds:.0f} tokens/s" if seconds else ""
    full = f"; stopped by the context of {limit} tokens" if count == room < settings.max_tokens else ""
    print(f"dsjax: {count} tokens{speed}{_drafts(engine)}{full}", file=sys.stderr)


def show_answers(
    model: Model, lines: Sequence[Line], output: Path, settings: EngineSettings, done: Collection[Id]
) -> None:
    """Append the answers to prompts to a file, and write to stderr how many there were.

    Args:
        settings: of the engine.
        done: ids of the prompts that the file has answers to.

    Raises:
        ValueError: nothing to draft with.
    """
    engine = Engine(model, settings)
    start, answers, errors, tokens = time.monotonic(), 0, 0, 0
    try:
        for request in answer(engine, [line for line in lines if line.id not in done], output):
            if request is None:
                errors += 1
            else:
                answers, tokens = answers + 1, tokens + len(request.tokens)
    except KeyboardInterrupt:
        print("dsjax: stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    print(
        f"dsjax: {answers} answers, {errors} errors, {len(done)} that were there; {tokens} tokens in "
        f"{time.monotonic() - start:.1f} s, {engine.prefix.hit_rate:.0%} of prompts from the prefix cache"
        f"{_drafts(engine)}",
        file=sys.stderr,
    )


def _drafts(engine: Engine) -> str:
    counts = engine.counts
    return f", {counts.acceptance:.0%} of {counts.drafted} drafts accepted" if counts.drafted else ""
