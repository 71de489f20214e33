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

import numpy as np
from jaxtyping import Bool

from dsjax.inference.groups import Groups
from dsjax.inference.load import Model
from dsjax.inference.passes import Passes, Piece
from dsjax.inference.prompt import Prompt
from dsjax.inference.rebalance import Rebalancer
from dsjax.inference.request import Request
from dsjax.inference.running import EngineCounts, InFlight, Running, next_pieces, tokens_of
from dsjax.inference.sampling import Sampling
from dsjax.inference.settings import EngineSettings
from dsjax.inference.speculation import Verified
from dsjax.inference.text import StopStrings, TextStream
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
        self._groups = Groups(model, self._passes, settings)
        self.context, self.prefix = self._passes.context, self._groups.prefix
        self._submitted: list[Request] = []
        self._waiting: deque[Request] = deque()
        self._running: list[Running] = []
        self._in_flight: deque[InFlight] = deque()
        self._cancelled: list[Request] = []
        self._lock = threading.Lock()
        self.counts = EngineCounts(accepted_at=[0] * settings.speculate)

    @property
    def rebalancer(self) -> Rebalancer | None:
        """What places experts by their loads, if anything does: how balanced devices are, and how many have moved."""
        return self._passes.rebalancer

    @property
    def pages(self) -> int:
        """Pages that requests can have."""
        return self._groups.usable

    @property
    def pages_held(self) -> int:
        """Pages that requests have."""
        return self._groups.held

    @property
    def pages_idle(self) -> int:
        """Pages that the prefix cache keeps for nobody in particular."""
        return self._groups.idle

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

    def prepare(self, prompt: str | Sequence[int]) -> Prompt:
        """Return a prompt that is encoded and checked, for `submit` to take any number of times.

        Raises:
            ValueError: no prompt, or an id that the model has not.
        """
        return Prompt.of(prompt, self._model)

    def submit(
        self,
        prompt: str | Sequence[int] | Prompt,
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
                `reopen_last_token`); or ids, which stay as they are; or what `prepare` has made of either.
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
        prompt = prompt if isinstance(prompt, Prompt) else self.prepare(prompt)
        most = prompt.most_tokens(max_tokens, self.context, self._groups.room)
        request = Request(
            prompt=prompt.ids,
            sampling=sampling or Sampling(),
            max_tokens=most,
            stop_ids=[self.tokenizer.eos] if stop_ids is None else stop_ids,
            text_stream=TextStream(self.tokenizer, prompt.before, prompt.shown),
            stops=StopStrings(stop),
            first=first if prompt.first is None else prompt.first,
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
        for pool in self._groups.pools:
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
        while self._waiting and any(self._groups.slots):
            request = self._waiting[0]
            ids = [*request.prompt, *(token.id for token in request.tokens)]
            busy = Counter(running.group for running in self._running)
            if (found := self._groups.find(ids, busy)) is None:
                return
            group, pages, digests = found
            self._waiting.popleft()
            pool = self._groups.pools[group]
            known = len(pages) * pool.page_size
            if request.preemptions == 0:
                request.cached_tokens = known
                self.prefix.asked += len(ids)
                self.prefix.found += known
            pages += [pool.take() for _ in range(pool.needed(ids) - len(pages))]
            slot, drawn = self._groups.slots[group].pop(), len(request.tokens)
            running = Running(request, group, slot, ids, len(ids), pages, known, drawn, digests)
            self._running.append(running)
            if request.sampling.repetition_penalty != 1:
                self._passes.mark_seen(group, slot, ids)

    def _read_prompts(self) -> None:
        left = [self._passes.largest_piece] * self._passes.groups
        while pieces := next_pieces(self._running, left, self._passes):
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
        pool = self._groups.pools[running.group]

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
        self._groups.pools[running.group].release(running.pages)
        self._groups.slots[running.group].append(running.slot)

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
                    self.counts.count_drafts(int(drafted[place]), len(tokens) - 1)
                for token in tokens:
                    if running.request.finish is None:
                        running.request.take(token)
                known = [token.id for token in running.request.tokens[len(running.ids) - len(running.request.prompt) :]]
                running.ids += known
                self.counts.tokens += len(known)
                self._register(running)
                if running.request.finish is not None:
                    self._leave(running)

    def _register(self, running: Running) -> None:
        """Let the full pages of a request be found, as soon as the device has the work that fills them."""
        pool = self._groups.pools[running.group]
        size = pool.page_size
        known = min(running.length, running.end - 1, len(running.ids))
        for i in range(len(running.digests) - 1, known // size):
            page_ids = running.ids[i * size : (i + 1) * size]
            running.digests.append(pool.register(running.pages[i], running.digests[-1], page_ids))


def _age(running: Running) -> int:
    return running.request.number
