"""Work for a client that may leave: answers as server-sent events, and an end to work that nobody waits for."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dsjax.serving.errors import ApiError

LAST_WORDS = 5.0
"""Seconds that a client who does not read has for the last event."""


class ClientGone(Exception):
    """Nobody is there to be answered."""


async def unless_gone[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of some work, which is cancelled when the client leaves.

    Args:
        receive: of a request whose body has been read.
        work: to be done.

    Raises:
        ClientGone: the client has left.
    """
    working, watching = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """JSON objects as server-sent events, and `[DONE]`; an error is the last event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any]], deadline: float, on_end: Callable[[], None]):
        """Describes a stream.

        Args:
            events: its objects.
            deadline: when it has to be over, in seconds of the event loop's clock.
            on_end: called in any case when nobody reads on.
        """
        # Proxies, nginx above all, would collect events.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._deadline, self._on_end = events, deadline, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, or as many as the client stays for."""
        try:
            with contextlib.suppress(ClientGone):
                await unless_gone(receive, self._send_all(send))
        finally:
            self._on_end()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last: str = "[DONE]"
        try:
            async with asyncio.timeout_at(self._deadline):
                async for event in self._events:
                    await send(_body(json.dumps(event, ensure_ascii=False)))
        except TimeoutError:
            last = json.dumps(ApiError(408, "the request took too long", code="timeout").body)
        except ApiError as error:
            last = json.dumps(error.body)
        async with asyncio.timeout(LAST_WORDS):
            await send(_body(last))
            await send({"type": "http.response.body", "body": b""})


def _body(event: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": True}
