"""What clients get, in OpenAI's formats: whole answers, and the chunks of streams."""

import codecs
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from dsjax.data.tokenizer import Tokenizer
from dsjax.inference.request import Request, Token
from dsjax.inference.text import UNKNOWN
from dsjax.serving.engine_thread import Piece
from dsjax.serving.thinking import Thinking

LEAST_LOGPROB = -9999.0
"""What is told in place of minus infinity, which JSON has not."""


def _byte_alphabet() -> dict[str, int]:
    """Characters by which byte-level tokenizers spell bytes: printable ones for themselves, the others above them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


class Spelling:
    """The tokens of one answer, with their texts and places in it."""

    def __init__(self, tokenizer: Tokenizer, overlap: int):
        """Begins an answer.

        Args:
            tokenizer: of the answer.
            overlap: characters of the prompt that the first token spells again.
        """
        self._tokenizer, self._place = tokenizer, -overlap
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def text(self, id: int) -> str:
        """Return a token's text; U+FFFD for parts of characters."""
        return self._tokenizer.decode([id])

    def bytes(self, id: int) -> list[int] | None:
        """Return a token's bytes; None where its tokenizer does not tell."""
        text = self.text(id)
        if UNKNOWN not in text:
            return list(text.encode())
        spelled = self._tokenizer.token(id) or ""
        return [_BYTES[character] for character in spelled] if spelled and set(spelled) <= _BYTES.keys() else None

    def places(self, tokens: Sequence[Token]) -> list[int]:
        """Return where the next tokens begin, in characters of the answer; below 0 within the prompt."""
        places = []
        for token in tokens:
            known = self.bytes(token.id)
            spelled = self.text(token.id).encode() if known is None else bytes(known)
            if spelled and spelled[0] & 0xC0 != 0x80:  # it completes no character, so the one before stays broken
                self._place += len(self._decoder.decode(b"", final=True))
            places.append(self._place)
            self._place += len(self._decoder.decode(spelled))
        return places


class Choice(ABC):
    """One answer on its way to a client."""

    def __init__(self, index: int, spelling: Spelling | None):
        """Begins an answer; `spelling` is for log-probabilities, None for none."""
        self.index, self._spelling, self._length = index, spelling, 0
        self._untold: list[tuple[Token, int]] = []

    @abstractmethod
    def take(self, piece: Piece) -> dict[str, Any] | None:
        """Return the `choice` of a chunk; None if there is nothing to tell yet."""

    @abstractmethod
    def join(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the `choice` of a whole answer from those of its chunks."""

    def _note(self, piece: Piece) -> None:
        """Keep the tokens of a piece until they are told."""
        self._length += len(piece.text)
        if self._spelling:
            self._untold += zip(piece.tokens, self._spelling.places(piece.tokens), strict=True)

    def _tell(self, piece: Piece) -> list[tuple[Token, int]]:
        """Return the tokens not told yet, without those that spell a stop string, and their places."""
        told, self._untold = self._untold, []
        # Only the tokens of a stop string begin behind the end of an answer.
        return [(token, at) for token, at in told if at < self._length] if piece.finish == "stop" else told


class TextChoice(Choice):
    """Of `/v1/completions`."""

    def take(self, piece: Piece) -> dict[str, Any] | None:
        """See `Choice`."""
        self._note(piece)
        return {
            "index": self.index,
            "text": piece.text,
            "logprobs": self._logprobs(self._tell(piece)),
            "finish_reason": piece.finish,
        }

    def join(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """See `Choice`."""
        joined = choices[-1] | {"text": "".join(choice["text"] for choice in choices)}
        if self._spelling:
            told = [choice["logprobs"] for choice in choices]
            joined["logprobs"] = {name: [one for part in told for one in part[name]] for name in told[0]}
        return joined

    def _logprobs(self, told: list[tuple[Token, int]]) -> dict[str, Any] | None:
        if not self._spelling:
            return None
        text = self._spelling.text
        return {
            "tokens": [text(token.id) for token, _ in told],
            "token_logprobs": [_finite(token.logprob) for token, _ in told],
            "top_logprobs": [
                {text(id): _finite(logprob) for id, logprob in reversed(token.likeliest)} for token, _ in told
            ],
            "text_offset": [max(0, at) for _, at in told],
        }


class ChatChoice(Choice):
    """Of `/v1/chat/completions`, with the thinking apart, as `reasoning_content`."""

    def __init__(self, index: int, spelling: Spelling | None, prompt: str):
        """Begins behind the text of a prompt."""
        super().__init__(index, spelling)
        self._thinking = Thinking(prompt)

    @property
    def opening(self) -> dict[str, Any]:
        """The `choice` of the first chunk."""
        delta = {"role": "assistant", "content": ""}
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def take(self, piece: Piece) -> dict[str, Any] | None:
        """See `Choice`."""
        self._note(piece)
        said = [self._thinking.push(piece.text)]
        if piece.finish:
            said.append(self._thinking.flush())
        thinking, content = ("".join(part) for part in zip(*said, strict=True))
        if not (thinking or content or piece.finish):
            return None
        delta = ({"reasoning_content": thinking} if thinking else {}) | ({"content": content} if content else {})
        logprobs = [self._described(token) for token, _ in self._tell(piece)]
        return {
            "index": self.index,
            "delta": delta,
            "logprobs": {"content": logprobs, "refusal": None} if self._spelling else None,
            "finish_reason": piece.finish,
        }

    def join(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """See `Choice`."""
        joined = {name: value for name, value in choices[-1].items() if name != "delta"}
        content, thinking = (
            "".join(choice["delta"].get(name, "") for choice in choices) for name in ("content", "reasoning_content")
        )
        message = {"role": "assistant", "content": content, "refusal": None}
        joined["message"] = message | ({"reasoning_content": thinking} if thinking else {})
        if self._spelling:
            logprobs = [one for choice in choices for one in choice["logprobs"]["content"]]
            joined["logprobs"] = {"content": logprobs, "refusal": None}
        return joined

    def _described(self, token: Token) -> dict[str, Any]:
        def one(id: int, logprob: float) -> dict[str, Any]:
            return {"token": self._spelling.text(id), "logprob": _finite(logprob), "bytes": self._spelling.bytes(id)}

        return one(token.id, token.logprob) | {"top_logprobs": [one(*pair) for pair in token.likeliest]}


def _finite(logprob: float) -> float:
    return max(LEAST_LOGPROB, logprob)


class Reply:
    """What surrounds the choices of one request."""

    def __init__(self, model: str, *, chat: bool):
        """Gives the reply a name."""
        self._id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self._whole, self._chunk = ("chat.completion", "chat.completion.chunk") if chat else ("text_completion",) * 2
        self._model, self._created = model, int(time.time())

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the reply that is no stream."""
        return self._around(self._whole, choices) | {"usage": usage}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a part of a stream."""
        return self._around(self._chunk, choices)

    def _around(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


def usage(requests: Sequence[Request], n: int) -> dict[str, Any]:
    """Return the tokens of a request; a prompt counts once, however many answers it has."""
    prompts, answers = (sum(len(request.prompt) for request in requests[::n]), sum(len(r.tokens) for r in requests))
    return {
        "prompt_tokens": prompts,
        "completion_tokens": answers,
        "total_tokens": prompts + answers,
        "prompt_tokens_details": {"cached_tokens": sum(request.cached_tokens for request in requests[::n])},
    }
