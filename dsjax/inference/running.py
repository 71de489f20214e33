"""What an engine knows of the requests that it works on, and what it reads of a pass' results."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from dsjax.inference.passes import Passes, Row
from dsjax.inference.request import Request, Token
from dsjax.inference.sampling import Drawn
from dsjax.inference.speculation import Verified

_serials = itertools.count()


@dataclass(eq=False)
class Running:
    """A request that has a slot."""

    request: Request
    group: int
    """Of devices, which has its slot and its pages."""
    slot: int
    ids: list[int]
    """Prompt and answer, as far as the host knows them."""
    prompt: int
    """How many of them are to be read before the next is chosen: the prompt and, after a preemption, the answer."""
    pages: list[int]
    length: int
    """Tokens that the cache has, or will at most have when the device is done with its work."""
    drawn: int
    """Tokens of the answer that are chosen, or at least will be."""
    digests: list[bytes]
    """Of the full pages that can be found, behind that of nothing."""
    serial: int = field(default_factory=lambda: next(_serials))

    @property
    def is_read(self) -> bool:
        """Whether its prompt has been."""
        return self.length >= self.prompt

    @property
    def wants_more(self) -> bool:
        """Whether another token may follow those chosen."""
        return self.is_read and self.drawn < self.request.max_tokens

    @property
    def row(self) -> Row:
        """Its place in a pass."""
        return Row(self.group, self.serial, self.slot, self.pages, self.length, self.request.sampling, self.end)

    @property
    def end(self) -> int:
        """Tokens that prompt and answer may have; the last is never read."""
        return len(self.request.prompt) + self.request.max_tokens

    def room(self, page_size: int) -> int:
        """Return the tokens that its pages have room for."""
        return len(self.pages) * page_size


class InFlight(NamedTuple):
    """Work that the device has."""

    step: int
    result: Drawn | Verified
    batch: list[Running]
    places: list[int]
    """Where in the result each of them is."""


@dataclass
class EngineCounts:
    """What an engine has done."""

    steps: int = 0
    prompt_tokens_read: int = 0
    """Without those that the prefix cache had; again after a preemption."""
    tokens: int = 0
    """Of answers."""
    preemptions: int = 0
    drafted: int = 0
    """Drafts that the main model has read."""
    accepted: int = 0
    """Of these, those that it chose too, behind others that it chose."""
    accepted_at: list[int] = field(default_factory=list)
    """Of these, the first ones of a step, the second ones, and so on."""

    @property
    def acceptance(self) -> float:
        """`accepted` / `drafted`; 0 before there was a draft."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def count_drafts(self, drafted: int, accepted: int) -> None:
        """Add the drafts of a request in a step."""
        self.drafted += drafted
        self.accepted += accepted
        for k in range(accepted):
            self.accepted_at[k] += 1


def next_pieces(requests: Iterable[Running], left: Sequence[int], passes: Passes) -> list[tuple[Running, int]]:
    """Return the pieces of prompts that are next, of each group the oldest requests', and how long they are.

    Args:
        requests: oldest first.
        left: tokens that each group may still read in this step.
        passes: that are to read them.
    """
    largest, found, taken, full = passes.largest_piece, [], Counter(), set()
    for running in requests:
        if running.is_read or running.group in full:
            continue
        # Pieces end at the same places whatever else there is to read.
        count = min(running.prompt - running.length, largest - running.length % largest)
        taken[running.group] += count
        if taken[running.group] > left[running.group]:
            full.add(running.group)
            continue
        own = [length for other, length in found if other.group == running.group]
        if own and len(own) >= passes.most_pieces(max(*own, count)):
            full.add(running.group)
            continue
        found.append((running, count))
    return found


def tokens_of(result: Drawn | Verified, places: Sequence[int], requests: Sequence[Request]) -> list[list[Token]]:
    """Read a pass' results from the device: the next tokens of each request.

    Args:
        places: of the requests in the results.
    """
    drawn, taken = result, np.ones(max(places) + 1, int)
    if isinstance(result, Verified):
        drawn, taken = result.drawn, np.asarray(result.taken)
    # All but the tokens only if somebody wants it.
    whole = any(request.sampling.logprobs is not None for request in requests)
    fields = jax.device_get(drawn) if whole else [np.asarray(drawn.tokens)]
    ids, *told = (np.reshape(field, (len(field), -1, *field.shape[drawn.tokens.ndim :])) for field in fields)

    def token(row: int, at: int, count: int | None) -> Token:
        id = int(ids[row, at])
        if count is None:
            return Token(id)
        logprob, likeliest, best = (field[row, at] for field in told)
        pairs = zip(likeliest[:count].tolist(), best[:count].tolist(), strict=True)
        return Token(id, float(logprob), tuple(pairs))

    return [
        [token(place, at, request.sampling.logprobs) for at in range(taken[place])]
        for place, request in zip(places, requests, strict=True)
    ]
