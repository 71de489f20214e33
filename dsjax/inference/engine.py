"""The engine: many requests at once, each joining and leaving when it is ready (continuous batching).

A step reads at most `prefill_tokens` of waiting prompts and then decodes one token of every request whose prompt has
been read. Requests begin in the order in which they came. Pages are taken when they are needed; where none is left,
the youngest request gives its pages up, waits, and later reads again what it has written so far. The host works one
step ahead: it looks at the tokens of a step when the device already has the next.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool

from dsjax.inference.disk import DiskTier, fingerprint
from dsjax.inference.load import Model
from dsjax.inference.pages import PagePool, PrefixCounts
from dsjax.inference.passes import Passes, Row
from dsjax.inference.request import Request, Token
from dsjax.inference.sampling import Drawn, Sampling
from dsjax.inference.settings import EngineSettings
from dsjax.inference.text import StopStrings, TextStream, reopen_last_token

_serials = itertools.count()


@dataclass(eq=False)
class Running:
    """A request that has a slot."""

    request: Request
    slot: int
    ids: list[int]
    """Prompt and answer, as far as the host knows them."""
    prompt: int
    """How many of them are to be read before the next is chosen: the prompt and, after a preemption, the answer."""
    pages: list[int]
    length: int
    """Tokens that the cache has, or will have when the device is done with its work."""
    drawn: int
    """Tokens of the answer that are chosen, or will be."""
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
        return Row(self.serial, self.slot, self.pages, self.length, self.request.sampling)

    def room(self, page_size: int) -> int:
        """Return the tokens that its pages have room for."""
        return len(self.pages) * page_size


class InFlight(NamedTuple):
    """Work that the device has."""

    step: int
    drawn: Drawn
    batch: list[Running]


@dataclass
class EngineCounts:
    """What an engine has done."""

    steps: int = 0
    prompt_tokens_read: int = 0
    """Without those that the prefix cache had; again after a preemption."""
    tokens: int = 0
    """Of answers."""
    preemptions: int = 0


class Engine:
    """Continues prompts. One thread at a time steps it; any thread may submit and cancel.

    Attributes:
        slots: requests that are decoded at the same time.
        context: most tokens of a prompt and its answer.
        tokenizer: of prompts and answers.
        counts: what it has done.
    """

    def __init__(self, model: Model, settings: EngineSettings | None = None):
        """Allocates the cache; compiles nothing yet, see `warm_up`.

        Raises:
            ValueError: no memory for a cache; a folder for pages that cannot be made.
        """
        settings = settings or EngineSettings()
        self._model, self.tokenizer, self.slots = model, model.tokenizer, settings.slots
        self._passes = Passes(model, settings)
        self.context = self._passes.context
        idle = self._passes.pages
        if settings.prefix_bytes is not None:
            idle = settings.prefix_bytes // self._passes.page_bytes
        tier = None
        if settings.disk:
            folder = Path(settings.disk) / fingerprint(model, settings.page_size, settings.cache_format)
            tier = DiskTier(folder, settings.disk_bytes, self._passes.read_page, self._passes.write_page)
        self._pool = PagePool(self._passes.pages, settings.page_size, most_idle=idle, tier=tier)
        self._waiting: deque[Request] = deque()
        self._running: list[Running] = []
        self._slots = list(range(settings.slots))
        self._in_flight: deque[InFlight] = deque()
        self._cancelled: list[Request] = []
        self._lock = threading.Lock()
        self.counts = EngineCounts()

    @property
    def prefix(self) -> PrefixCounts:
        """Counts of the prefix cache; `hit_rate` is the share of prompt tokens that it had."""
        return self._pool.counts

    @property
    def pages_held(self) -> int:
        """Pages that requests have."""
        return self._pool.held

    @property
    def pages_idle(self) -> int:
        """Pages that the prefix cache keeps for nobody in particular."""
        return self._pool.idle

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._waiting or self._running or self._in_flight or self._cancelled)

    def submit(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        stop_ids: Collection[int] | None = None,
        first: Bool[np.ndarray, " V"] | None = None,
        listener: Callable[[Request, str], None] | None = None,
    ) -> Request:
        """Let a prompt be continued.

        Args:
            prompt: text, in front of which the token that opens a document is put, and whose last token may grow (see
                `reopen_last_token`); or ids, which stay as they are.
            sampling: how to choose tokens.
            max_tokens: of the answer, at most; the context may end it before.
            stop: texts that end the answer.
            stop_ids: tokens that do; by default the end of a document.
            first: which tokens the first may be, of a prompt of ids; by default all.
            listener: see `Request`.

        Raises:
            ValueError: no prompt, an id that the model has not, a prompt that fills the context or the cache,
                `max_tokens` below 1, an empty stop.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens = {max_tokens}: must be at least 1")
        tokenizer, vocab_size = self._model.tokenizer, self._model.config.vocab_size
        if isinstance(prompt, str):
            with self._lock:
                whole = [self._model.opening, *tokenizer.encode([prompt], special=True)[0]]
            ids, first = reopen_last_token(tokenizer, whole, vocab_size)
            before, shown = ids[1:], tokenizer.decode(whole[1:])
        else:
            whole = ids = before = [int(id) for id in prompt]
            shown = None
        if not ids:
            raise ValueError("the prompt has no tokens: it must begin with the one that opens a document")
        if wrong := [id for id in ids if not 0 <= id < vocab_size]:
            raise ValueError(f"prompt: token {wrong[0]} must be below model.vocab_size = {vocab_size}")
        if len(whole) >= self.context:
            raise ValueError(f"the prompt has {len(whole)} tokens: must be below the {self.context} of the context")
        max_tokens = min(max_tokens, self.context - len(whole))
        room = self._pool.usable * self._pool.page_size
        if len(ids) + max_tokens > room:
            raise ValueError(
                f"prompt and answer may have {len(ids) + max_tokens} tokens: must be at most the {room} that the cache "
                "has room for; lower max_tokens, or raise cache_bytes"
            )
        request = Request(
            prompt=ids,
            sampling=sampling or Sampling(),
            max_tokens=max_tokens,
            stop_ids=[tokenizer.eos] if stop_ids is None else stop_ids,
            text_stream=TextStream(tokenizer, before, shown),
            stops=StopStrings(stop),
            first=first,
            listener=listener,
        )
        with self._lock:
            self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Let a request end at the next step; nothing happens to one that has ended."""
        with self._lock:
            self._cancelled.append(request)

    def stream(self, request: Request) -> Iterator[str]:
        """Step the engine, and yield the text of a request as it comes. Without end if another thread steps it too."""
        shown = 0
        while request.finish is None:
            self.step()
            if len(request.text) > shown:
                text, shown = request.text[shown:], len(request.text)
                yield text

    def run(self) -> None:
        """Step until every request has ended."""
        while self.has_work:
            self.step()

    def warm_up(self) -> None:
        """Compile all programs, so that no request ever waits for that."""
        self._passes.warm_up()

    def close(self) -> None:
        """Write the prefix cache to disk, if there is a folder for it."""
        self._pool.save_all()

    def step(self) -> None:
        """Give the device its next work, and look at the results of the work before."""
        self.counts.steps += 1
        self._drop_cancelled()
        self._admit()
        self._read_prompts()
        self._decode()
        self._look_at_results(before=self.counts.steps)

    def _drop_cancelled(self) -> None:
        with self._lock:
            cancelled, self._cancelled = self._cancelled, []
            for request in cancelled:
                if request in self._waiting:
                    self._waiting.remove(request)
        for request in cancelled:
            for running in [running for running in self._running if running.request is request]:
                self._leave(running)
            if request.finish is None:
                request.end("cancelled")

    def _admit(self) -> None:
        while self._waiting and self._slots:
            request = self._waiting[0]
            ids = [*request.prompt, *(token.id for token in request.tokens)]
            pages, digests = self._pool.match(ids)
            needed = -(-len(ids) // self._pool.page_size) - len(pages)
            # Room for a page of each of the others, or somebody would soon have to give theirs up.
            if self._pool.available < needed + len(self._running):
                self._pool.release(pages)
                return
            self._waiting.popleft()
            found = len(pages) * self._pool.page_size
            if request.preemptions == 0:
                request.cached_tokens = found
                self.prefix.asked += len(ids)
                self.prefix.found += found
            pages += [self._pool.take() for _ in range(needed)]
            running = Running(request, self._slots.pop(), ids, len(ids), pages, found, len(request.tokens), digests)
            self._running.append(running)
            if request.sampling.repetition_penalty != 1:
                self._passes.mark_seen(running.slot, ids)

    def _read_prompts(self) -> None:
        left = largest = self._passes.largest_piece
        for running in self._running:
            while not running.is_read:
                # Pieces end at the same places whatever else there is to read.
                count = min(running.prompt - running.length, largest - running.length % largest)
                if count > left:
                    return
                piece = running.ids[running.length : running.length + count]
                is_last = running.length + count == running.prompt
                first = running.request.first if running.drawn == 0 else None
                drawn = self._passes.prefill(running.row, piece, first, last=is_last)
                left -= count
                running.length += count
                self.counts.prompt_tokens_read += count
                self._register(running)
                if is_last:
                    running.drawn += 1
                    self._in_flight.append(InFlight(self.counts.steps, drawn, [running]))

    def _decode(self) -> None:
        for running in sorted(self._running, key=_age):
            self._grow(running)
        batch = [running for running in self._running if running.wants_more]
        if not batch:
            return
        drawn = self._passes.decode([running.row for running in batch])
        for running in batch:
            running.length += 1
            running.drawn += 1
        self._in_flight.append(InFlight(self.counts.steps, drawn, batch))

    def _grow(self, running: Running) -> None:
        """Give a request the page that its next token goes to, or take all of them."""
        while running in self._running and running.wants_more and running.length == running.room(self._pool.page_size):
            page = self._pool.take()
            if page is not None:
                running.pages.append(page)
            elif self._in_flight:  # somebody may have ended
                self._look_at_results(before=self.counts.steps + 1)
            else:
                self._preempt(max(self._running, key=_age))

    def _preempt(self, running: Running) -> None:
        self._leave(running)
        running.request.preemptions += 1
        self.counts.preemptions += 1
        self._waiting.appendleft(running.request)

    def _leave(self, running: Running) -> None:
        self._running.remove(running)
        self._pool.release(running.pages)
        self._slots.append(running.slot)

    def _look_at_results(self, before: int) -> None:
        """Hand out the tokens of steps before one; this waits for the device."""
        while self._in_flight and self._in_flight[0].step < before:
            _, drawn, batch = self._in_flight.popleft()
            tokens = _tokens(drawn, [running.request for running in batch])
            for running, token in zip(batch, tokens, strict=True):
                # A step was under way when the request ended.
                if running.request.finish is not None:
                    continue
                running.request.take(token)
                known = [token.id for token in running.request.tokens[len(running.ids) - len(running.request.prompt) :]]
                running.ids += known
                self.counts.tokens += len(known)
                self._register(running)
                if running.request.finish is not None:
                    self._leave(running)

    def _register(self, running: Running) -> None:
        """Let the full pages of a request be found, as soon as the device has the work that fills them."""
        size = self._pool.page_size
        for i in range(len(running.digests) - 1, min(running.length, len(running.ids)) // size):
            page_ids = running.ids[i * size : (i + 1) * size]
            running.digests.append(self._pool.register(running.pages[i], running.digests[-1], page_ids))


def _age(running: Running) -> int:
    return running.request.number


def _tokens(drawn: Drawn, requests: Sequence[Request]) -> list[Token]:
    """Read a pass' results from the device."""
    ids = np.asarray(drawn.tokens).tolist()
    wanted = [request.sampling.logprobs for request in requests]
    if all(count is None for count in wanted):
        return [Token(id) for id in ids[: len(requests)]]
    _, logprobs, likeliest, best = jax.device_get(drawn)
    return [
        Token(ids[i])
        if count is None
        else Token(
            ids[i], float(logprobs[i]), tuple(zip(likeliest[i, :count].tolist(), best[i, :count].tolist(), strict=True))
        )
        for i, count in enumerate(wanted)
    ]
