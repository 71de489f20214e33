"""From orders to answers: who is let in, what the engine is asked, and what becomes of it."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from dsjax.inference.engine import Engine
from dsjax.inference.prompt import Prompt
from dsjax.inference.request import Request
from dsjax.serving.chat import ChatTemplate
from dsjax.serving.delivery import Delivery
from dsjax.serving.engine_thread import Answers, EngineThread
from dsjax.serving.errors import ApiError
from dsjax.serving.metrics import Metrics
from dsjax.serving.replies import ChatChoice, Choice, Reply, Spelling, TextChoice
from dsjax.serving.requests import ChatOrder, CompletionOrder, Order
from dsjax.serving.settings import ServerSettings

PREPARED_AT_ONCE = 4
"""Orders whose prompts are encoded at the same time."""
RETRY_AFTER = 1
"""Seconds after which a client that was refused may try again."""


@dataclass(frozen=True)
class Prepared:
    """A prompt as the engine takes it."""

    prompt: Prompt
    tail: str = ""
    """The end of its text: that of the last token, or behind the last message."""


class Service:
    """What the routes have in common.

    Attributes:
        settings: limits among them.
        name: of the model.
        metrics: of all that happens.
        thread: steps the engine.
    """

    def __init__(
        self,
        engine: Engine,
        template: ChatTemplate,
        settings: ServerSettings,
        name: str,
        *,
        on_ready: Callable[[], None],
        on_failure: Callable[[], None],
    ):
        """Prepares everything within a running event loop; `thread.start` begins.

        Args:
            engine: that nobody else uses.
            template: for conversations.
            settings: limits among them.
            name: of the model.
            on_ready: called when requests are taken.
            on_failure: called when the engine's thread has died.
        """
        self.settings, self.name, self.metrics = settings, name, Metrics(engine)
        self._template, self._draining, self._open, self._created = template, False, 0, int(time.time())
        self._room, self._most_choices = engine.slots + settings.queue, settings.most_choices(engine.slots)
        self.thread = EngineThread(
            engine, asyncio.get_running_loop(), on_ready=on_ready, on_end=self._ended, on_failure=on_failure
        )
        # Encoding a long prompt takes a while, and is to hold up neither the loop nor shorter ones.
        self._preparing = ThreadPoolExecutor(PREPARED_AT_ONCE, "prepare")

    @property
    def unready(self) -> str:
        """Why no requests are taken; empty if they are."""
        if self.thread.failure:
            return f"the engine has failed: {self.thread.failure}"
        if self._draining:
            return "the server is shutting down"
        return "" if self.thread.is_ready else "the server is starting"

    @property
    def open(self) -> int:
        """Answers that are under way."""
        return self._open

    @property
    def described(self) -> dict[str, Any]:
        """The model, in OpenAI's format, and how many tokens a prompt and its answer may have."""
        context = self.thread.engine.context
        return {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "dsjax",
            "max_model_len": context,
        }

    def refuse(self) -> None:
        """Take no more requests."""
        self._draining = True

    def close(self) -> None:
        """End the engine's thread, which writes its prefix cache; this waits for it."""
        self._preparing.shutdown()
        self.thread.stop()

    def check(self, order: Order) -> None:
        """Refuse what is asked for in vain, before any work.

        Raises:
            ApiError: no such model, too many tokens or choices, or variables that the chat template does not have.
        """
        if order.model not in (None, self.name):
            message = f"model = {order.model!r}: there is only {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        most = self.settings.max_tokens
        if most and order.max_tokens and order.max_tokens > most:
            raise ApiError(400, f"max_tokens = {order.max_tokens}: must be at most {most}", param="max_tokens")
        choices = len(order.prompts) * order.n
        if choices > self._most_choices:
            raise ApiError(400, f"{choices} choices: must be at most {self._most_choices}", param="n")
        if isinstance(order, ChatOrder) and (unknown := order.variables.keys() - self._template.variables):
            known = ", ".join(sorted(self._template.variables)) or "none"
            message = f"chat_template_kwargs: the model's chat template does not read {min(unknown)}; it reads {known}"
            raise ApiError(400, message, param="chat_template_kwargs")

    async def submit(self, order: Order) -> Delivery:
        """Let the engine answer an order.

        Raises:
            ApiError: it cannot be answered, or not now.
        """
        count = len(order.prompts) * order.n
        if why := self.unready:
            status = 500 if self.thread.failure else 503
            raise ApiError(status, why, retry_after=RETRY_AFTER if status == 503 else 0)
        if self._open + count > self._room:
            message = f"{self._open} answers are under way, and there is room for {self._room}: try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=RETRY_AFTER)
        answers = self.thread.expect(count)
        self._open += count
        # Not to be torn away: what is submitted has to be known to be cancelled.
        entering = asyncio.create_task(self._enter(order, answers, count))
        try:
            prepared = await asyncio.shield(entering)
        except BaseException as error:
            self.thread.forget(answers)
            if isinstance(error, ValueError):
                raise ApiError(400, str(error)) from error
            raise
        choices = [self._choice(order, prepared[i // order.n], i) for i in range(len(answers.requests))]
        return Delivery(order, answers, choices, Reply(self.name, chat=isinstance(order, ChatOrder)))

    def leave(self, delivery: Delivery) -> None:
        """Nobody waits for these answers any more."""
        self.thread.forget(delivery.answers)

    async def _enter(self, order: Order, answers: Answers, count: int) -> list[Prepared]:
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._preparing, self._prepare_and_submit, order, answers)
        finally:
            # Those that have been submitted end by themselves.
            self._open -= count - len(answers.requests)

    def _prepare_and_submit(self, order: Order, answers: Answers) -> list[Prepared]:
        prepared = [self._prepare(order, i) for i in range(len(order.prompts))]
        engine = self.thread.engine
        for each in prepared:
            if (length := len(each.prompt.whole)) >= engine.context:
                message = f"the prompt has {length} tokens: must be below the {engine.context} of the context"
                raise ApiError(400, message, code="context_length_exceeded")
        limit = order.max_tokens or self.settings.max_tokens or engine.context
        stop_ids = {engine.tokenizer.eos, self._template.end} if isinstance(order, ChatOrder) else None
        for index in range(len(prepared) * order.n):
            prompt, sampling = prepared[index // order.n].prompt, order.sampling_of(index % order.n)
            settings = {"max_tokens": limit, "stop": order.stop, "stop_ids": stop_ids}
            if not self.thread.submit(answers, index, partial(engine.submit, prompt, sampling, **settings)):
                break
        return prepared

    def _prepare(self, order: Order, index: int) -> Prepared:
        engine = self.thread.engine
        if isinstance(order, ChatOrder):
            ids, tail = self._template.encode(order.messages, order.variables)
            return Prepared(engine.prepare(ids), tail)
        prompt = engine.prepare(order.prompts[index])
        return Prepared(prompt, engine.tokenizer.decode(prompt.whole[-1:]))

    def _choice(self, order: Order, prepared: Prepared, index: int) -> Choice:
        spelling = None
        if order.sampling.logprobs is not None:
            # The engine takes back the last token of a text: the first of the answer spells it again.
            reopened = len(prepared.prompt.ids) < len(prepared.prompt.whole)
            spelling = Spelling(self.thread.engine.tokenizer, len(prepared.tail) if reopened else 0)
        if isinstance(order, CompletionOrder):
            return TextChoice(index, spelling)
        return ChatChoice(index, spelling, prepared.tail)

    def _ended(self, request: Request) -> None:
        self._open -= 1
        self.metrics.ended(request)
