"""Answers on their way to the client who asked for them: all at once, or in chunks."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from dsjax.serving.engine_thread import Answers, EngineFailed
from dsjax.serving.errors import ApiError
from dsjax.serving.replies import ChatChoice, Choice, Reply, usage
from dsjax.serving.requests import Order


@dataclass(frozen=True)
class Delivery:
    """The answers to an order."""

    order: Order
    answers: Answers
    choices: list[Choice]
    reply: Reply

    async def whole(self) -> dict[str, Any]:
        """Return the reply when all answers have ended.

        Raises:
            ApiError: they have not ended by themselves.
        """
        told: list[list[dict[str, Any]]] = [[] for _ in self.choices]
        async for choice in self._told():
            told[choice["index"]].append(choice)
        joined = [choice.join(parts) for choice, parts in zip(self.choices, told, strict=True)]
        return self.reply.whole(joined, self._usage())

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of a stream.

        Raises:
            ApiError: the answers have not ended by themselves.
        """
        # With usage, as OpenAI does, every chunk has the field, and one more at the end has the numbers.
        nothing = {"usage": None} if self.order.include_usage else {}
        for choice in self.choices:
            if isinstance(choice, ChatChoice):
                yield self.reply.chunk([choice.opening]) | nothing
        async for choice in self._told():
            yield self.reply.chunk([choice]) | nothing
        if self.order.include_usage:
            yield self.reply.chunk([]) | {"usage": self._usage()}

    async def _told(self) -> AsyncIterator[dict[str, Any]]:
        try:
            async for piece in self.answers.pieces():
                if piece.finish == "cancelled":
                    raise ApiError(503, "the server is shutting down")
                if choice := self.choices[piece.index].take(piece):
                    yield choice
        except EngineFailed as error:
            raise ApiError(500, f"the engine has failed: {error}") from error

    def _usage(self) -> dict[str, Any]:
        return usage(self.answers.requests, self.order.n)
