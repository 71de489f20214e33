"""A request to the engine: what is to be continued and how, and what has come of it."""

import itertools
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool

from dsjax.inference.sampling import Sampling
from dsjax.inference.text import StopStrings, TextStream

Finish = Literal["stop", "length", "cancelled"]
"""Why a request has ended: the model, or a stop string, ended the text; as many tokens as were allowed; cancelled."""

_numbers = itertools.count()


class Token(NamedTuple):
    """A token of an answer."""

    id: int
    logprob: float | None = None
    """Of this token, where the request wants it."""
    likeliest: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and theirs, best first."""


@dataclass(eq=False)
class Request:
    """A prompt that is being continued. The engine alone changes it; anybody may look."""

    prompt: Sequence[int]
    """Ids that are read."""
    sampling: Sampling
    max_tokens: int
    """Tokens of the answer at most."""
    stop_ids: Collection[int]
    """Tokens that end the answer and are no part of it."""
    text_stream: TextStream
    """Makes text of the answer's tokens."""
    stops: StopStrings
    """Texts that end the answer and are no part of its text."""
    first: Bool[np.ndarray, " V"] | None = None
    """Which tokens the first may be; None for all."""
    listener: Callable[["Request", str], None] | None = None
    """Called with every piece of text, by the thread that steps the engine, and at the end, when `finish` is set."""

    number: int = field(default_factory=lambda: next(_numbers))
    """Of all requests of this process, in their order."""
    tokens: list[Token] = field(default_factory=list)
    """The answer so far; with those that spell a stop string."""
    text: str = ""
    """Its text so far."""
    finish: Finish | None = None
    """Why it has ended; None while it has not."""
    cached_tokens: int = 0
    """Tokens of the prompt that did not have to be read, because the prefix cache had them."""
    preemptions: int = 0
    """How often its pages were given to an older request, and read again later."""
    submitted: float = field(default_factory=time.monotonic)
    """When it came, in seconds of the monotonic clock."""
    times: list[float] = field(default_factory=list)
    """When each token came."""

    def take(self, token: Token) -> None:
        """Add a token, unless it is one that ends the answer."""
        if token.id in self.stop_ids:
            return self.end("stop")
        self.tokens.append(token)
        self.times.append(time.monotonic())
        self._show(self.text_stream.push(token.id))
        if self.finish is None and len(self.tokens) == self.max_tokens:
            self.end("length")

    def end(self, finish: Finish) -> None:
        """End the answer, after what text was held back."""
        self._show(self.text_stream.flush())
        if self.finish is None:
            self._tell(self.stops.flush(), finish)

    def _show(self, text: str) -> None:
        shown, stopped = self.stops.push(text)
        if shown or stopped:
            self._tell(shown, "stop" if stopped else None)

    def _tell(self, text: str, finish: Finish | None) -> None:
        self.text += text
        self.finish = finish
        if self.listener is not None:
            self.listener(self, text)
