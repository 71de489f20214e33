"""The thread that steps the engine, and the way of its answers to the event loop.

The engine's results come to the event loop once per step, however many answers have grown in it.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

from dsjax.inference.engine import Engine
from dsjax.inference.request import Finish, Request, Token
from dsjax.parallel.hosts import processes

STALL = 120.0
"""Seconds after which a step that does not come back counts as a fault."""


class Piece(NamedTuple):
    """How one of the answers has grown."""

    index: int
    """Of the answer, among those to one HTTP request."""
    text: str
    tokens: list[Token]
    finish: Finish | None


class EngineFailed(Exception):
    """The engine's thread has died, or does before there is an answer."""


class Answers:
    """The answers to one HTTP request, as they grow.

    Attributes:
        requests: of the engine, in order; complete when all are submitted.
    """

    def __init__(self, thread: "EngineThread", count: int):
        """Expects so many answers."""
        self.requests: list[Request] = []
        self._thread, self._left = thread, count
        self._pieces: asyncio.Queue[Piece | EngineFailed] = asyncio.Queue()
        self._gone, self._lock = False, threading.Lock()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield pieces until all answers have ended.

        Raises:
            EngineFailed: they will not come.
        """
        while self._left:
            piece = await self._pieces.get()
            if isinstance(piece, EngineFailed):
                raise piece
            self._left -= piece.finish is not None
            yield piece

    def put(self, piece: Piece | EngineFailed) -> None:
        """Take what has come; for the event loop."""
        self._pieces.put_nowait(piece)

    def add(self, request: Request) -> bool:
        """Take a request that has been submitted; return whether more are wanted."""
        with self._lock:
            self.requests.append(request)
            gone = self._gone
        if gone:
            self._thread.cancel(request)
        return not gone

    def cancel(self) -> None:
        """Nobody waits for them any more; nothing happens to those that have ended."""
        with self._lock:
            self._gone = True
            requests = [request for request in self.requests if request.finish is None]
        for request in requests:
            self._thread.cancel(request)


class EngineThread:
    """Steps an engine whenever it has work.

    Attributes:
        engine: what it steps.
        is_starting: whether programs are being compiled.
        is_ready: whether all are.
        failure: what the thread has died of.
    """

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        *,
        on_ready: Callable[[], None],
        on_end: Callable[[Request], None],
        on_failure: Callable[[], None],
    ):
        """Prepares the thread; `start` starts it.

        Args:
            engine: to be stepped by nobody else from now on.
            loop: where answers are waited for, and where the functions below are called.
            on_ready: called when all programs are compiled.
            on_end: called for every request that has ended.
            on_failure: called when the thread has died.
        """
        self.engine, self.is_starting, self.is_ready, self.failure = engine, True, False, None
        self._loop, self._on_ready, self._on_end, self._on_failure = loop, on_ready, on_end, on_failure
        self._wake, self._stopping = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._step_began: float | None = None
        self._grown: list[tuple[Answers, Piece, Request]] = []
        self._waiting: set[Answers] = set()

    def start(self) -> None:
        """Start the thread, which first compiles all programs."""
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end when the engine has no more work, or behind the program that it compiles, and wait."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    @property
    def is_healthy(self) -> bool:
        """Whether the thread lives, and its last step came back in time."""
        began = self._step_began
        return self._thread.is_alive() and (began is None or time.monotonic() - began < STALL)

    def expect(self, count: int) -> Answers:
        """Return a place for the answers to an HTTP request; for the event loop, as is `forget`.

        Raises:
            EngineFailed: there will be none.
        """
        if self.failure:
            raise EngineFailed(str(self.failure))
        answers = Answers(self, count)
        self._waiting.add(answers)
        return answers

    def forget(self, answers: Answers) -> None:
        """Nobody waits there any more."""
        answers.cancel()
        self._waiting.discard(answers)

    def cancel_all(self) -> None:
        """End all requests."""
        for answers in self._waiting:
            answers.cancel()

    def submit(self, answers: Answers, index: int, submit: Callable[..., Request]) -> bool:
        """Submit a request whose answer is to come to a place; return whether more are wanted there.

        Args:
            answers: the place.
            index: of the answer there.
            submit: `Engine.submit`, all but the listener.
        """
        told = 0

        def listen(request: Request, text: str) -> None:
            nonlocal told
            tokens, told = request.tokens[told:], len(request.tokens)
            self._grown.append((answers, Piece(index, text, tokens, request.finish), request))

        more = answers.add(submit(listener=listen))
        self._notify()
        return more

    def cancel(self, request: Request) -> None:
        """Let a request end at the next step."""
        self.engine.cancel(request)
        self._notify()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _run(self) -> None:
        try:
            self.engine.warm_up(lambda: self._stopping)
            with self._wake:
                self.is_starting, self.is_ready = False, not self._stopping
            if self.is_ready:
                self._loop.call_soon_threadsafe(self._on_ready)
            while self._has_work():
                self._step_began = time.monotonic()
                self.engine.step()
                self._step_began = None
                self._hand_over()
            self.engine.close()
        except BaseException as error:
            self.failure, self.is_starting = error, False
            self._loop.call_soon_threadsafe(self._fail)
            if processes() == 1:  # of several, the command says what has happened
                raise

    def _has_work(self) -> bool:
        """Wait for work; return whether there is any, and not the end."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self.engine.has_work)
            return self.engine.has_work

    def _hand_over(self) -> None:
        if self._grown:
            grown, self._grown = self._grown, []
            self._loop.call_soon_threadsafe(self._receive, grown)

    def _receive(self, grown: list[tuple[Answers, Piece, Request]]) -> None:
        for answers, piece, request in grown:
            answers.put(piece)
            if piece.finish is not None:
                self._on_end(request)

    def _fail(self) -> None:
        for answers in self._waiting:
            answers.put(EngineFailed(str(self.failure)))
        self._on_failure()
