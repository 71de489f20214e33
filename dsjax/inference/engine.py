"""The engine: many requests at once, each joining and leaving when it is ready (continuous batching).

A step reads at most `prefill_tokens` of waiting prompts and then decodes one token of every request whose prompt has
been read. Requests begin in the order in which they came. Pages are taken when they are needed; where none is left,
the youngest request gives its pages up, waits, and later reads again what it has written so far. The host works one
step ahead: it looks at the tokens of a step when the device already has the next. With speculation a step may give
several tokens, and until it has looked the host knows only between which bounds a request's length is.

Of several processes each has an engine, which takes the same steps: process 0 leads, the others `follow`; see `words`.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from dsjax.inference.disk import DiskTier, PageFiles
from dsjax.inference.fingerprint import fingerprint
from dsjax.inference.load import Model
from dsjax.inference.pages import PagePool, PrefixCounts
from dsjax.inference.passes import Passes, Piece
from dsjax.inference.rebalance import Rebalancer
from dsjax.inference.request import Request
from dsjax.inference.running import EngineCounts, InFlight, Running, tokens_of
from dsjax.inference.sampling import Sampling
from dsjax.inference.settings import EngineSettings
from dsjax.inference.speculation import Verified
from dsjax.inference.text import StopStrings, TextStream, reopen_last_token
from dsjax.inference.words import Word, Words, agree


class Engine:
    """Continues prompts. One thread at a time steps it; any thread may submit and cancel.

    Attributes:
        slots: requests that are decoded at the same time.
        prefix: counts of the prefix cache; `hit_rate` is the share of prompt tokens that it had.
        context: most tokens of a prompt and its answer.
        tokenizer: of prompts and answers.
        counts: what it has done.
    """

    def __init__(self, model: Model, settings: EngineSettings | None = None):
        """Allocates the cache; compiles nothing yet, see `warm_up`.

        On a unit of several processes all are to do so, at the same time.

        Raises:
            ValueError: no memory for a cache; a folder for pages that cannot be made, or in several processes; a model
                without MTP modules that is to speculate; processes that differ.
        """
        settings = settings or EngineSettings()
        modules = model.config.num_nextn_predict_layers
        if settings.speculate and not modules:
            raise ValueError(
                f"speculate = {settings.speculate}: must be 0, because the model has no MTP modules that could draft; "
                "`load_model(..., mtp=True)` loads those that there are"
            )
        # What pages hold, and so which files of pages fit, depends on the modules that are used.
        model = model.with_modules(min(settings.speculate, modules))
        self._words = Words(model.tokenizer) if model.processes > 1 else None
        if self._words:
            if settings.disk:
                raise ValueError(
                    f"disk = {settings.disk!r}: must be empty, because the unit has {model.processes} processes; "
                    "pages on disk belong to one"
                )
            agree(model, settings)
        self._most_taken = 1 + settings.speculate
        self._model, self.tokenizer, self.slots = model, model.tokenizer, settings.slots
        self._passes = Passes(model, settings)
        self.context, self.prefix = self._passes.context, PrefixCounts()
        files = None
        if settings.disk:
            folder = Path(settings.disk) / fingerprint(model, settings.page_size, settings.cache_format)
            files = PageFiles(folder, settings.disk_bytes)
        self._pools = [self._pool(group, settings, files) for group in range(self._passes.groups)]
        self._submitted: list[Request] = []
        self._waiting: deque[Request] = deque()
        self._running: list[Running] = []
        self._slots = [list(range(self._passes.slots)) for _ in self._pools]
        self._in_flight: deque[InFlight] = deque()
        self._cancelled: list[Request] = []
        self._lock = threading.Lock()
        self.counts = EngineCounts(accepted_at=[0] * settings.speculate)

    def _pool(self, group: int, settings: EngineSettings, files: PageFiles | None) -> PagePool:
        passes, idle, tier = self._passes, self._passes.pages, None
        if settings.prefix_bytes is not None:
            idle = settings.prefix_bytes // passes.page_bytes
        if files is not None:
            tier = DiskTier(files, partial(passes.read_page, group), partial(passes.write_page, group))
        return PagePool(passes.pages, settings.page_size, most_idle=idle, tier=tier, counts=self.prefix)

    @property
    def rebalancer(self) -> Rebalancer | None:
        """What places experts by their loads, if anything does: how balanced devices are, and how many have moved."""
        return self._passes.rebalancer

    @property
    def pages(self) -> int:
        """Pages that requests can have."""
        return sum(pool.usable for pool in self._pools)

    @property
    def pages_held(self) -> int:
        """Pages that requests have."""
        return sum(pool.held for pool in self._pools)

    @property
    def pages_idle(self) -> int:
        """Pages that the prefix cache keeps for nobody in particular."""
        return sum(pool.idle for pool in self._pools)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._submitted) + len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._submitted or self._waiting or self._running or self._in_flight or self._cancelled)

    @property
    def leads(self) -> bool:
        """Whether requests are submitted here; otherwise there is nothing to do but `follow`."""
        return self._words is None or self._words.leads

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
                `max_tokens` below 1, an empty stop; a process that does not lead.
        """
        if not self.leads:
            raise ValueError("this process cannot submit requests: process 0 leads, and the others call follow()")
        if max_tokens < 1:
            raise ValueError(f"max_tokens = {max_tokens}: must be at least 1")
        tokenizer, vocab_size = self._model.tokenizer, self._model.config.vocab_size
        if isinstance(prompt, str):
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
        room = self._pools[0].usable * self._pools[0].page_size
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
            self._submitted.append(request)
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

    def warm_up(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Compile all programs, so that no request ever waits for that.

        Args:
            stopped: asked in front of each program whether to leave it and the rest out.
        """
        for number, program in enumerate(self._passes.warming()):
            if stopped():
                return
            self._say(Word("warm up", program=number))
            program()

    def close(self) -> None:
        """Write the prefix cache to disk, if there is a folder for it, and let the processes that follow go."""
        self._say(Word("close"))
        self._close()

    def step(self) -> None:
        """Give the device its next work, and look at the results of the work before."""
        with self._lock:
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
        word = Word("step", submitted, [request.number for request in cancelled])
        self._say(word)
        self._step(word)

    def follow(self) -> None:
        """Do what the engine of process 0 does, on any other process, until that one is closed.

        Raises:
            ValueError: this process leads.
        """
        if self.leads:
            raise ValueError("this process cannot follow: process 0 leads, and so does one that is alone")
        programs = list(self._passes.warming())
        for word in self._words.hear():
            match word.act:
                case "warm up":
                    programs[word.program]()
                case "step":
                    self._step(word)
                case "close":
                    self._close()

    def _say(self, word: Word) -> None:
        if self._words:
            self._words.say(word, self.counts.steps)

    def _close(self) -> None:
        for pool in self._pools:
            pool.save_all()
        self._passes.close()
        if self._words:
            self._words.end()

    def _step(self, word: Word) -> None:
        self.counts.steps += 1
        self._waiting += word.submitted
        self._drop(word.cancelled)
        self._admit()
        self._read_prompts()
        self._decode()
        self._look_at_results(before=self.counts.steps)
        self._passes.follow_loads()

    def _drop(self, cancelled: Collection[int]) -> None:
        """End requests of these numbers, if they have not ended."""
        if not cancelled:
            return
        for running in [running for running in self._running if running.request.number in cancelled]:
            self._leave(running)
            running.request.end("cancelled")
        for request in [request for request in self._waiting if request.number in cancelled]:
            self._waiting.remove(request)
            request.end("cancelled")

    def _admit(self) -> None:
        while self._waiting and any(self._slots):
            request = self._waiting[0]
            ids = [*request.prompt, *(token.id for token in request.tokens)]
            if (found := self._group_for(ids)) is None:
                return
            group, pages, digests = found
            self._waiting.popleft()
            pool, known = self._pools[group], len(pages) * self._pools[group].page_size
            if request.preemptions == 0:
                request.cached_tokens = known
                self.prefix.asked += len(ids)
                self.prefix.found += known
            pages += [pool.take() for _ in range(pool.needed(ids) - len(pages))]
            slot, drawn = self._slots[group].pop(), len(request.tokens)
            running = Running(request, group, slot, ids, len(ids), pages, known, drawn, digests)
            self._running.append(running)
            if request.sampling.repetition_penalty != 1:
                self._passes.mark_seen(group, slot, ids)

    def _group_for(self, ids: list[int]) -> tuple[int, list[int], list[bytes]] | None:
        """Return a group that has room for tokens, and the pages that it has of them: the one that knows most, or has
        the fewest requests."""
        busy = Counter(running.group for running in self._running)
        free = [group for group, slots in enumerate(self._slots) if slots]
        if len(free) > 1:
            free.sort(key=lambda group: (-self._pools[group].known(ids), busy[group]))
        for group in free:
            pool = self._pools[group]
            pages, digests = pool.match(ids)
            # Room for a page of each of the others, or somebody would soon have to give theirs up.
            if pool.available >= pool.needed(ids) - len(pages) + busy[group]:
                return group, pages, digests
            pool.release(pages)
        return None

    def _read_prompts(self) -> None:
        largest = self._passes.largest_piece
        left = [largest] * self._passes.groups
        while pieces := self._next_pieces(left):
            read = []
            for running, count in pieces:
                ids = running.ids[running.length : running.length + count]
                is_last = running.length + count == running.prompt
                first = running.request.first if running.drawn == 0 else None
                read.append(Piece(running.row, ids, first, is_last))
                left[running.group] -= count
            drawn, places = self._passes.prefill(read)
            ended = []
            for (running, count), piece, place in zip(pieces, read, places, strict=True):
                running.length += count
                self.counts.prompt_tokens_read += count
                self._register(running)
                if piece.is_last:
                    running.drawn += 1
                    ended.append((running, place))
            if ended:
                batch, places = map(list, zip(*ended, strict=True))
                self._in_flight.append(InFlight(self.counts.steps, drawn, batch, places))

    def _next_pieces(self, left: list[int]) -> list[tuple[Running, int]]:
        """Return the pieces of prompts that are next, of each group the oldest requests', and how long they are.

        Args:
            left: tokens that each group may still read in this step.
        """
        largest, found, taken, full = self._passes.largest_piece, [], Counter(), set()
        for running in self._running:
            if running.is_read or running.group in full:
                continue
            # Pieces end at the same places whatever else there is to read.
            count = min(running.prompt - running.length, largest - running.length % largest)
            taken[running.group] += count
            if taken[running.group] > left[running.group]:
                full.add(running.group)
                continue
            own = [length for other, length in found if other.group == running.group]
            if own and len(own) >= self._passes.most_pieces(max(*own, count)):
                full.add(running.group)
                continue
            found.append((running, count))
        return found

    def _decode(self) -> None:
        for running in sorted(self._running, key=_age):
            self._grow(running)
        batch = [running for running in self._running if running.wants_more]
        if not batch:
            return
        result, places = self._passes.decode([running.row for running in batch])
        for running in batch:
            running.length += self._most_taken
            running.drawn += 1
        self._in_flight.append(InFlight(self.counts.steps, result, batch, places))

    def _grow(self, running: Running) -> None:
        """Give a request the pages that its next tokens go to, or take all of them."""
        pool = self._pools[running.group]

        def needs_page() -> bool:
            needed = min(running.length + self._most_taken, running.end - 1)
            return running.wants_more and running.room(pool.page_size) < needed

        while running in self._running and needs_page():
            page = pool.take()
            if page is not None:
                running.pages.append(page)
            elif self._in_flight:  # somebody may have ended
                self._look_at_results(before=self.counts.steps + 1)
            else:
                self._preempt(max((other for other in self._running if other.group == running.group), key=_age))

    def _preempt(self, running: Running) -> None:
        self._leave(running)
        running.request.preemptions += 1
        self.counts.preemptions += 1
        self._waiting.appendleft(running.request)

    def _leave(self, running: Running) -> None:
        self._running.remove(running)
        self._pools[running.group].release(running.pages)
        self._slots[running.group].append(running.slot)

    def _look_at_results(self, before: int) -> None:
        """Hand out the tokens of steps before one; this waits for the device."""
        while self._in_flight and self._in_flight[0].step < before:
            step, result, batch, places = self._in_flight.popleft()
            answers = tokens_of(result, places, [running.request for running in batch])
            if self._words:  # results need all processes: all have begun this step
                self._words.heard(step)
            drafted = np.asarray(result.drafted) if isinstance(result, Verified) else None
            for running, tokens, place in zip(batch, answers, places, strict=True):
                # A step was under way when the request ended.
                if running.request.finish is not None:
                    continue
                if drafted is not None:
                    running.length -= self._most_taken - len(tokens)
                    running.drawn += len(tokens) - 1
                    self._count_drafts(int(drafted[place]), len(tokens) - 1)
                for token in tokens:
                    if running.request.finish is None:
                        running.request.take(token)
                known = [token.id for token in running.request.tokens[len(running.ids) - len(running.request.prompt) :]]
                running.ids += known
                self.counts.tokens += len(known)
                self._register(running)
                if running.request.finish is not None:
                    self._leave(running)

    def _count_drafts(self, drafted: int, accepted: int) -> None:
        self.counts.drafted += drafted
        self.counts.accepted += accepted
        for k in range(accepted):
            self.counts.accepted_at[k] += 1

    def _register(self, running: Running) -> None:
        """Let the full pages of a request be found, as soon as the device has the work that fills them."""
        pool = self._pools[running.group]
        size = pool.page_size
        known = min(running.length, running.end - 1, len(running.ids))
        for i in range(len(running.digests) - 1, known // size):
            page_ids = running.ids[i * size : (i + 1) * size]
            running.digests.append(pool.register(running.pages[i], running.digests[-1], page_ids))


def _age(running: Running) -> int:
    return running.request.number
