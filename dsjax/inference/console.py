"""What `python -m dsjax.generate` does with a model: one answer to the screen, or many to a file.

Of several processes the first writes, and the others follow its engine.
"""

import logging
import signal
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsjax.inference.batch import Id, Line, LineSettings, answer, check_writable, finished, read_prompts
from dsjax.inference.deployment import chosen, take_devices
from dsjax.inference.engine import Engine
from dsjax.inference.load import Model, load_model
from dsjax.inference.settings import EngineSettings, Precision
from dsjax.parallel.agreement import gather, on_first
from dsjax.parallel.hosts import is_first_process, processes

STRIDE = 256
"""A single answer's cache has a multiple of so many tokens, so that prompts of similar lengths share their programs."""


def continue_prompt(path: str, prompt: str, settings: LineSettings, engine: EngineSettings, **how: Any) -> None:
    """Load a model and `show_answer`.

    Args:
        engine: settings of the engine, other than a deployment's.
        how: deployment, average and precision, as in `_loaded`.

    Raises:
        ValueError: what the model, the deployment or the engine cannot have.
    """
    model, engine = _loaded(path, replace(engine, slots=1), **how)
    show_answer(model, prompt, settings, engine)


def continue_file(
    path: str, prompts: Path, output: Path, settings: LineSettings, engine: EngineSettings, **how: Any
) -> None:
    """Load a model and `show_answers` to a file of prompts, which the first process reads.

    Args:
        settings: of lines that say nothing else.
        engine: settings of the engine, other than a deployment's; slots are at most as many as there are prompts left.
        how: deployment, average and precision, as in `_loaded`.

    Raises:
        ValueError: what is wrong with a file, or what the model, the deployment or the engine cannot have.
        OSError: no such file, or none that can be written.
        SystemExit: see `show_answers`.
    """
    lines: list[Line] = []
    done: set[Id] = set()

    def read() -> None:
        lines.extend(read_prompts(prompts, settings))
        done.update(finished(output, lines))
        check_writable(output)

    on_first(read)
    slots = gather(min(engine.slots, max(1, len(lines) - len(done))))[0]
    model, engine = _loaded(path, replace(engine, slots=slots), **how)
    show_answers(model, lines, output, engine, done)


def _loaded(
    path: str, engine: EngineSettings, *, deployment: str, ema: bool, precision: Precision
) -> tuple[Model, EngineSettings]:
    layout, engine, precision = chosen(deployment, engine, precision)
    take_devices(layout)
    model = load_model(path, layout=layout, ema=ema, mtp=engine.speculate > 0, precision=precision)
    if is_first_process():
        print(f"dsjax: {model.origin}", file=sys.stderr)
    return model, engine


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
    if not engine.leads:
        return follow(engine)
    request = engine.submit(prompt, settings.sampling, max_tokens=room, stop=settings.stop)
    print(prompt, end="", flush=True)
    interrupted = False
    try:
        for text in engine.stream(request):
            print(text, end="", flush=True)
        engine.close()
    except KeyboardInterrupt:
        interrupted = True
    print(flush=True)
    count, times = len(request.tokens), request.times
    # From the first token on: what came before it is compilation and the prompt.
    seconds = times[-1] - times[0] if count > 1 else 0
    speed = f" in {seconds:.1f} s, {(count - 1) / seconds:.0f} tokens/s" if seconds else ""
    full = f"; stopped by the context of {limit} tokens" if count == room < settings.max_tokens else ""
    print(f"dsjax: {count} tokens{speed}{_drafts(engine)}{full}", file=sys.stderr)
    if interrupted and processes() > 1:  # in the middle of a step, which the others cannot end
        raise SystemExit(130)


def show_answers(
    model: Model, lines: Sequence[Line], output: Path, settings: EngineSettings, done: Collection[Id]
) -> None:
    """Append the answers to prompts to a file, and write to stderr how many there were.

    Args:
        settings: of the engine.
        done: ids of the prompts that the file has answers to.

    Raises:
        ValueError: nothing to draft with.
        SystemExit: with status 1, when all is done and there were prompts without an answer.
    """
    engine = Engine(model, settings)
    if not engine.leads:
        return follow(engine)
    start, answers, errors, tokens = time.monotonic(), 0, 0, 0
    try:
        for request in answer(engine, [line for line in lines if line.id not in done], output):
            if request is None:
                errors += 1
            else:
                answers, tokens = answers + 1, tokens + len(request.tokens)
        engine.close()
    except KeyboardInterrupt:
        print("dsjax: stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    print(
        f"dsjax: {answers} answers, {errors} errors, {len(done)} that were there; {tokens} tokens in "
        f"{time.monotonic() - start:.1f} s, {engine.prefix.hit_rate:.0%} of prompts from the prefix cache"
        f"{_drafts(engine)}",
        file=sys.stderr,
    )
    if errors:
        raise SystemExit(1)


@contextmanager
def warnings_said(*libraries: str) -> Iterator[None]:
    """Inside, warnings of engines and of some libraries are written to stderr as all else that commands say."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("dsjax: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("dsjax.inference", *libraries)]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


def follow(engine: Engine) -> None:
    """Follow the engine of process 0 to its end, whatever signals come: they come to process 0 as well, which decides.

    Of the main thread.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    engine.follow()


def _drafts(engine: Engine) -> str:
    counts = engine.counts
    return f", {counts.acceptance:.0%} of {counts.drafted} drafts accepted" if counts.drafted else ""
