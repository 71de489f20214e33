"""Many prompts from a JSONL file, their answers to another; a run that was killed goes on where it was.

A line of the input is an object with `prompt` and, if wanted, `id` (by default the number of the line, from 1), `stop`
and any of the settings of `LineSettings`. A line of the output has the `id`, the `text`, the number of `tokens`, why it
ended (`finish`) and, if wanted, `logprobs`; or the `id` and an `error`. Lines are written as answers are finished.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dsjax.inference.engine import Engine
from dsjax.inference.request import Request
from dsjax.inference.sampling import Sampling

type Id = str | int


@dataclass(frozen=True)
class LineSettings:
    """What a line may say otherwise."""

    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """A line of the input."""

    id: Id
    prompt: str
    settings: LineSettings


def read_prompts(path: Path, default: LineSettings) -> list[Line]:
    """Read all lines.

    Raises:
        ValueError: what is wrong with the first line with which something is.
        OSError: no such file.
    """
    lines: dict[Id, Line] = {}
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                line = _line(text, number, default)
                if line.id in lines:
                    raise ValueError(f"id = {line.id!r}: must not be that of another line")
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            lines[line.id] = line
    if not lines:
        raise ValueError(f"{path}: has no prompts")
    return list(lines.values())


def _line(text: str, number: int, default: LineSettings) -> Line:
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise ValueError('must be an object with a text "prompt"')
    id, prompt = found.pop("id", number), found.pop("prompt")
    if not isinstance(id, (str, int)) or isinstance(id, bool):
        raise ValueError(f"id = {id!r}: must be a text or an integer")
    for of_text in (prompt, str(id)):
        if any("\ud800" <= character <= "\udfff" for character in of_text):
            raise ValueError(f"{of_text!r}: must be UTF-8")
    settings = replace(
        default,
        max_tokens=_number("max_tokens", found.pop("max_tokens", default.max_tokens), int),
        stop=_stop(found.pop("stop", default.stop)),
    )
    if settings.max_tokens < 1:
        raise ValueError(f"max_tokens = {settings.max_tokens}: must be at least 1")
    kinds = {field.name: type(field.default) if field.default is not None else int for field in fields(Sampling)}
    if unknown := found.keys() - kinds.keys():
        known = ", ".join(["prompt", "id", "max_tokens", "stop", *kinds])
        raise ValueError(f"{min(unknown)!r} is no setting; there are {known}")
    given = {name: _number(name, value, kinds[name]) for name, value in found.items()}
    return Line(id, prompt, replace(settings, sampling=replace(default.sampling, **given)))


def _number(name: str, value: Any, kind: type) -> Any:
    if value is None and name == "logprobs":
        return None
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise ValueError(f"{name} = {value!r}: must be {'an integer' if kind is int else 'a number'}")
    return kind(value)


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop = {value!r}: must be a text, or a list of texts, none of them empty")
    return tuple(texts)


def finished(path: Path, lines: list[Line]) -> set[Id]:
    """Return the ids that the output has answers for; errors, and a last line that was cut, are taken out of it.

    Raises:
        ValueError: the output belongs to other prompts.
    """
    if not path.exists():
        return set()
    ids, done, kept, dropped = {line.id for line in lines}, set(), [], False
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            found = json.loads(text)
            known = found["id"] in ids
        except (ValueError, TypeError, KeyError):
            if text.endswith(b"\n"):
                raise ValueError(f"{path}, line {number}: not written by dsjax; name another --output") from None
            found, known = {"error": "cut"}, True
        if not known:
            raise ValueError(
                f"{path}, line {number}: id = {found['id']!r} is not among the prompts; name another --output"
            )
        # Without its end a line may still be whole JSON, but the next could not be told from it.
        if "error" in found or not text.endswith(b"\n"):
            dropped = True
            continue
        done.add(found["id"])
        kept.append(text)
    if dropped:
        part = path.with_name(f"{path.name}.part")
        part.write_bytes(b"".join(kept))
        os.replace(part, path)
    return done


def check_writable(path: Path) -> None:
    """Raise OSError for a file to which nothing can be appended; leave none behind that was not there."""
    existed = path.exists()
    with path.open("a"):
        pass
    if not existed:
        path.unlink()


def answer(engine: Engine, lines: list[Line], path: Path) -> Iterator[Request | None]:
    """Answer the prompts and append their lines to a file; yield each request when it is written, None for an error."""
    left = iter(lines)
    active: dict[Request, Line] = {}
    try:
        with path.open("a", encoding="utf-8") as file:

            def put(line: Mapping[str, Any]) -> None:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()

            while True:
                # As many wait as run, so that no slot is ever empty; the rest are no requests yet.
                while len(active) < 2 * engine.slots and (line := next(left, None)) is not None:
                    how = line.settings
                    try:
                        request = engine.submit(line.prompt, how.sampling, max_tokens=how.max_tokens, stop=how.stop)
                        active[request] = line
                    except ValueError as error:
                        put({"id": line.id, "error": str(error)})
                        yield None
                if not active:
                    return
                engine.step()
                for request in [request for request in active if request.finish]:
                    put({"id": active.pop(request).id, **_described(request, engine)})
                    yield request
    finally:
        for request in active:
            engine.cancel(request)


def _described(request: Request, engine: Engine) -> dict[str, Any]:
    described = {"text": request.text, "tokens": len(request.tokens), "finish": request.finish}
    if request.sampling.logprobs is None:
        return described

    def one(id: int, logprob: float) -> dict[str, Any]:
        return {"id": id, "text": engine.tokenizer.decode([id]), "logprob": logprob}

    logprobs = [
        one(token.id, token.logprob) | {"likeliest": [one(*pair) for pair in token.likeliest]}
        for token in request.tokens
    ]
    return described | {"logprobs": logprobs}
