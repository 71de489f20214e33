"""The bodies of requests, parsed and checked: OpenAI's fields, and a few more that the engine has.

A field whose meaning would be lost is refused by name; one that changes no answer is ignored.
"""

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsjax.inference.sampling import MOST_LOGPROBS, Sampling
from dsjax.serving.chat import Message
from dsjax.serving.errors import ApiError

MOST_STOPS = 4
DEFAULT_COMPLETION = 16
"""Tokens of a completion that does not say how many, as OpenAI has it; an answer in a chat may fill the context."""

_IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
)
_REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "suffix": ("",),
    "echo": (False,),
}
"""What is not supported, with the values that ask for nothing."""
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

type Prompt = str | list[int]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a client wants, whichever way it was asked."""

    model: str | None
    sampling: Sampling
    max_tokens: int | None
    """None for as many as there is room for."""
    stop: tuple[str, ...]
    n: int
    """Answers to each prompt."""
    stream: bool
    include_usage: bool
    """Whether a stream ends with the number of its tokens."""

    def sampling_of(self, choice: int) -> Sampling:
        """Return how one of the n answers to a prompt is chosen: the first with the seed that was asked for."""
        if choice == 0:
            return self.sampling
        spelled = f"{self.sampling.seed} {choice}".encode()
        seed = int.from_bytes(hashlib.blake2b(spelled, digest_size=4).digest(), "little")
        return replace(self.sampling, seed=seed)


@dataclass(frozen=True, kw_only=True)
class CompletionOrder(Order):
    """The body of `/v1/completions`."""

    prompts: list[Prompt]


@dataclass(frozen=True, kw_only=True)
class ChatOrder(Order):
    """The body of `/v1/chat/completions`."""

    messages: list[Message]
    variables: Mapping[str, Any]
    """For the template."""

    @property
    def prompts(self) -> list[list[Message]]:
        """One conversation."""
        return [self.messages]


def parse_completion(body: bytes) -> CompletionOrder:
    """Read a body of `/v1/completions`.

    Raises:
        ApiError: 400, with what is wrong.
    """
    fields = Fields(body)
    logprobs = fields.integer("logprobs", None, 0, MOST_LOGPROBS)
    common = _common(fields, logprobs)
    best_of = fields.integer("best_of", common["n"], 1)
    if best_of != common["n"]:
        raise fields.wrong("best_of", best_of, f"n = {common['n']}, as no answers are chosen from")
    order = CompletionOrder(
        **common,
        max_tokens=fields.integer("max_tokens", DEFAULT_COMPLETION, 1),
        prompts=_prompts(fields),
    )
    fields.finish()
    return order


def parse_chat(body: bytes) -> ChatOrder:
    """Read a body of `/v1/chat/completions`.

    Raises:
        ApiError: 400, with what is wrong.
    """
    fields = Fields(body)
    logprobs, top = fields.boolean("logprobs"), fields.integer("top_logprobs", 0, 0, MOST_LOGPROBS)
    if top and not logprobs:
        raise fields.wrong("top_logprobs", top, "0, or come with logprobs = true")
    common = _common(fields, top if logprobs else None)
    old, new = (fields.integer(name, None, 1) for name in ("max_tokens", "max_completion_tokens"))
    if None not in (old, new) and old != new:
        raise fields.wrong("max_tokens", old, f"max_completion_tokens = {new}, or left out")
    order = ChatOrder(
        **common,
        max_tokens=old if new is None else new,
        messages=_messages(fields),
        variables=_variables(fields),
    )
    fields.finish()
    return order


def _common(fields: "Fields", logprobs: int | None) -> dict[str, Any]:
    options = fields.take("stream_options", dict) or {}
    stream = fields.boolean("stream")
    seed = fields.integer("seed", None, -(2**63), 2**63 - 1)
    settings = {
        name: fields.number(name, default)
        for name, default in (("temperature", 1.0), ("top_p", 1.0), ("repetition_penalty", 1.0))
    }
    settings |= {"top_k": fields.integer("top_k", 0), "logprobs": logprobs}
    # Without a seed, the same request again gives another answer.
    settings["seed"] = secrets.randbits(32) if seed is None else seed % 2**32
    try:
        sampling = Sampling(**settings)
    except ValueError as error:
        raise ApiError(400, str(error), param=str(error).split()[0]) from error
    return {
        "model": fields.take("model", str),
        "sampling": sampling,
        "stop": _stop(fields),
        "n": fields.integer("n", 1, 1),
        "stream": stream,
        "include_usage": options.get("include_usage") is True,
    }


class Fields:
    """The fields of a body, each taken once; null is as good as not there."""

    def __init__(self, body: bytes):
        """Reads JSON.

        Raises:
            ApiError: 400: it is none, or no object, or has text that no encoding has.
        """
        try:
            found = json.loads(body)
            if not isinstance(found, dict):
                raise ValueError("must be an object")
            # JSON can spell half a character, which UTF-8 cannot.
            json.dumps(found, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is no JSON object of UTF-8 text: {error}") from error
        self._left = {name: value for name, value in found.items() if value is not None}

    def wrong(self, name: str, value: Any, right: str) -> ApiError:
        """Return the error for a value."""
        shown = json.dumps(value, ensure_ascii=False)
        return ApiError(
            400, f"{name} = {shown if len(shown) <= 80 else shown[:80] + '...'}: must be {right}", param=name
        )

    def take(self, name: str, kind: type) -> Any:
        """Return a field of a kind; None if it is not there."""
        value = self._left.pop(name, None)
        if value is not None and not isinstance(value, kind):
            right = {str: "a text", dict: "an object", bool: "true or false", list: "a list"}[kind]
            raise self.wrong(name, value, right)
        return value

    def boolean(self, name: str) -> bool:
        """Return true or false, which is the default."""
        return bool(self.take(name, bool))

    def integer(self, name: str, default: int | None, lowest: int = -(2**63), highest: int = 2**63 - 1) -> int | None:
        """Return a whole number within bounds."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        if not is_integer(value) or not lowest <= value <= highest:
            # Limits that few meet are told only to those who have.
            is_beyond = is_integer(value) and abs(value) >= 2**63
            above = f", at least {lowest}" if lowest > -(2**63) or is_beyond else ""
            below = f" and at most {highest}" if highest < 2**63 - 1 or is_beyond else ""
            raise self.wrong(name, value, f"an integer{above}{below}")
        return value

    def number(self, name: str, default: float) -> float:
        """Return a number."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(name, value, "a number")
        if not abs(value) < 2**63:
            raise self.wrong(name, value, "a number between -2**63 and 2**63")
        return float(value)

    def any(self, name: str) -> Any:
        """Return a field whatever it is; None if it is not there."""
        return self._left.pop(name, None)

    def finish(self) -> None:
        """Refuse what is left.

        Raises:
            ApiError: 400: a field is not supported, or not known.
        """
        for name, value in self._left.items():
            if name in _REFUSED and value not in _REFUSED[name]:
                nothing = " or ".join(["left out", *(json.dumps(value) for value in _REFUSED[name])])
                raise ApiError(400, f"{name} is not supported: must be {nothing}", param=name, code="unsupported")
            if name not in _REFUSED and name not in _IGNORED:
                raise ApiError(400, f"unknown field {name}", param=name, code="unknown_parameter")


def is_integer(value: Any) -> bool:
    """Whether a value from JSON is a whole number: true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.any("stop")
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if (
        not isinstance(texts, list)
        or len(texts) > MOST_STOPS
        or not _are(texts, lambda each: isinstance(each, str) and each)
    ):
        raise fields.wrong("stop", value, f"a text, or a list of at most {MOST_STOPS}, none of them empty")
    return tuple(texts)


def _prompts(fields: Fields) -> list[Prompt]:
    value = fields.any("prompt")
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _are(value, is_integer):
            return [value]
        if _are(value, lambda each: isinstance(each, str)):
            return value
        if _are(value, lambda each: isinstance(each, list) and each and _are(each, is_integer)):
            return value
    raise fields.wrong("prompt", value, "a text, a list of texts, token ids, or a list of lists of token ids")


def _are(values: Collection[Any], law: Any) -> bool:
    return all(map(law, values))


def _messages(fields: Fields) -> list[Message]:
    messages = fields.take("messages", list)
    if not messages:
        raise fields.wrong("messages", messages, "a list of at least one")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise ApiError(400, f"{place}: must be an object", param=place)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ApiError(400, f"{place}.role = {role!r}: must be one of {', '.join(_ROLES)}", param=f"{place}.role")
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise ApiError(400, f"{place}.{name} is not supported", param=f"{place}.{name}", code="unsupported")
    return {"role": _ROLES[role], "content": _content(message.get("content"), f"{place}.content")}


def _content(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        for i, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ApiError(400, f"{place}[{i}]: only parts of type text are supported", param=f"{place}[{i}]")
        return "".join(part["text"] for part in content)
    raise ApiError(400, f"{place}: must be a text, or a list of parts of type text", param=place)


def _variables(fields: Fields) -> dict[str, Any]:
    """Switches of a template, such as `thinking` in DeepSeek-V3.1's. Texts could spell special tokens."""
    variables = fields.take("chat_template_kwargs", dict) or {}
    if not _are(variables.values(), lambda value: isinstance(value, (bool, int, float))):
        raise fields.wrong("chat_template_kwargs", variables, "an object of numbers, true and false")
    return variables
