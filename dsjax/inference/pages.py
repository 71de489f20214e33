"""Who has which page of the cache, and which pages hold the beginning of a prompt that has been read before.

A page has as many holders as there are requests with it in their tables. A full page is found again by a digest of its
tokens and of those in front of it, so requests that begin alike share pages, and a page that nobody holds any more is
kept until its place is needed: the one unused for longest goes first. All of this is on the host.
"""

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

ROOT = b""
"""The digest of no tokens."""


class Known(NamedTuple):
    """What is known of a full page."""

    digest: bytes
    parent: bytes
    """Digest of the page in front of it."""
    tokens: bytes
    """Of this page, as int32."""

    @classmethod
    def of(cls, parent: bytes, tokens: Sequence[int]) -> "Known":
        """Digest a page's tokens."""
        spelled = np.asarray(tokens, np.int32).tobytes()
        return cls(hashlib.blake2b(parent + spelled, digest_size=16).digest(), parent, spelled)


class Tier(Protocol):
    """Where pages go that there is no room for; see `disk.py`."""

    def save(self, known: Known, page: int, *, wait: bool) -> None:
        """Keep a page of the cache; if there is too much to do, not, or later."""
        ...

    def flush(self) -> None:
        """Wait until all is kept."""
        ...

    def load(self, known: Known, page: int) -> bool:
        """Write what was kept to a page of the cache; return whether anything was."""
        ...

    def has(self, known: Known) -> bool:
        """Whether `load` may find it."""
        ...


@dataclass
class PrefixCounts:
    """How often the beginning of a prompt had been read before, in tokens."""

    asked: int = 0
    """Of all prompts."""
    found: int = 0
    """Of these, on pages that were there."""
    found_in_tier: int = 0
    """Of `found`, those that came back from the tier below."""

    @property
    def hit_rate(self) -> float:
        """`found` / `asked`; 0 before there was a prompt."""
        return self.found / self.asked if self.asked else 0.0


class PagePool:
    """The pages of a cache. Page 0 is nobody's.

    Attributes:
        usable: pages that requests can have.
        counts: of the prefix cache.
    """

    def __init__(
        self,
        pages: int,
        page_size: int,
        *,
        most_idle: int,
        tier: Tier | None = None,
        counts: PrefixCounts | None = None,
    ):
        """All pages are free.

        Args:
            pages: of the cache, with page 0.
            page_size: tokens of a page.
            most_idle: known pages that are kept although nobody holds them; 0 for no prefix cache.
            tier: where such pages go before they are used for something else.
            counts: of several pools together; by default its own.
        """
        self.usable, self.page_size = pages - 1, page_size
        self.counts = PrefixCounts() if counts is None else counts
        self._most_idle, self._tier = most_idle, tier
        self._free = list(range(pages - 1, 0, -1))
        self._holders = [0] * pages
        self._known: dict[int, Known] = {}
        self._pages: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        """Of these, known ones."""
        return len(self._idle)

    @property
    def held(self) -> int:
        """Pages that requests have."""
        return self.usable - self.available

    def needed(self, tokens: Sequence[int]) -> int:
        """Return how many pages tokens take."""
        return -(-len(tokens) // self.page_size)

    def take(self) -> int | None:
        """Return a page to be written, with one holder; None if all are held."""
        if not self._free and self._idle:
            self._forget(next(iter(self._idle)))
        if not self._free:
            return None
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def release(self, pages: Sequence[int]) -> None:
        """Let go of a sequence's pages; the last are forgotten first, as the others are of no less use without them."""
        for page in reversed(pages):
            assert self._holders[page] > 0, f"page {page} is let go by somebody who has it not"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._known:
                    self._idle[page] = None
                else:
                    self._free.append(page)
        while len(self._idle) > self._most_idle:
            self._forget(next(iter(self._idle)))

    def known(self, tokens: Sequence[int]) -> int:
        """Return how many pages hold the beginning of these tokens, without those of the tier below."""
        return sum(1 for _ in itertools.takewhile(lambda known: known.digest in self._pages, self._spelled(tokens)))

    def _spelled(self, tokens: Sequence[int]) -> Iterator[Known]:
        """Yield the full pages of these tokens that are worth finding: at least one token is left to be read."""
        digest, size = ROOT, self.page_size
        for start in range(0, (len(tokens) - 1) // size * size if self._most_idle else 0, size):
            known = Known.of(digest, tokens[start : start + size])
            digest = known.digest
            yield known

    def match(self, tokens: Sequence[int]) -> tuple[list[int], list[bytes]]:
        """Return pages that hold the beginning of these tokens, now also held by the caller, and `ROOT` and their
        digests. At least one token is left to be read."""
        pages, digests = [], [ROOT]
        for wanted in self._spelled(tokens):
            page = self._find(wanted)
            if page is None:
                break
            pages.append(page)
            digests.append(wanted.digest)
        return pages, digests

    def _find(self, wanted: Known) -> int | None:
        page = self._pages.get(wanted.digest)
        if page is not None:
            # Two texts of one digest are not to be expected, but a wrong answer would never be noticed.
            if self._known[page] != wanted:
                return None
            self._holders[page] += 1
            self._idle.pop(page, None)
            return page
        if self._tier is None or not self._tier.has(wanted) or (page := self.take()) is None:
            return None
        if not self._tier.load(wanted, page):
            self.release([page])
            return None
        self._remember(page, wanted)
        self.counts.found_in_tier += self.page_size
        return page

    def register(self, page: int, parent: bytes, tokens: Sequence[int]) -> bytes:
        """Let a full page that the caller holds be found, here and in the tier below; return its digest, the parent of
        the page behind it.

        Where there is such a page already, that one stays.
        """
        if self._most_idle == 0:
            return ROOT
        known = Known.of(parent, tokens)
        if known.digest not in self._pages:
            self._remember(page, known)
            if self._tier is not None:
                self._tier.save(known, page, wait=False)
        return known.digest

    def save_all(self) -> None:
        """Give all known pages to the tier below, and wait until it has them."""
        if self._tier is None:
            return
        for page, known in self._known.items():
            self._tier.save(known, page, wait=True)
        self._tier.flush()

    def _remember(self, page: int, known: Known) -> None:
        self._known[page], self._pages[known.digest] = known, page

    def _forget(self, page: int) -> None:
        """Free an idle page."""
        known = self._known.pop(page)
        if self._tier is not None:
            self._tier.save(known, page, wait=False)
        del self._idle[page], self._pages[known.digest]
        self._free.append(page)
