"""The routes, and what stands in front of all of them: the key, the count of responses, errors in one format."""

import asyncio
import hmac
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsjax.serving.errors import ApiError
from dsjax.serving.metrics import Metrics
from dsjax.serving.page import page
from dsjax.serving.requests import Order, parse_chat, parse_completion
from dsjax.serving.service import RETRY_AFTER, Service
from dsjax.serving.streaming import ClientGone, EventStream, unless_gone

NOBODY = 499
"""Status that is counted, as nginx does, where the client has left before there was an answer."""
_OPEN = ("/", "/health", "/ready")
"""Paths for which no key is needed."""


def make_app(service: Service, key: str) -> ASGIApp:
    """Return the application.

    Args:
        service: what it is for.
        key: that clients have to send; empty for none.
    """

    async def chat(request: Request) -> Response:
        return await _generate(service, request, parse_chat)

    async def completions(request: Request) -> Response:
        return await _generate(service, request, parse_completion)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [service.described]})

    async def model(request: Request) -> Response:
        if (id := request.path_params["id"]) != service.name:
            raise ApiError(404, f"model {id!r}: there is only {service.name!r}", param="model", code="model_not_found")
        return JSONResponse(service.described)

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def health(_: Request) -> Response:
        return _state("" if service.thread.is_healthy else "the engine's thread does not step")

    async def ready(_: Request) -> Response:
        return _state(service.unready)

    async def chat_page(_: Request) -> Response:
        return page()

    routes = [
        Route("/", chat_page),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{id:path}", model),
        Route("/metrics", metrics),
        Route("/health", health),
        Route("/ready", ready),
    ]
    handlers: dict[Any, Any] = {
        ApiError: lambda _, error: error.response(),
        HTTPException: lambda request, error: _http_error(request, error).response(),
        ClientGone: lambda *_: Response(status_code=NOBODY),
        ClientDisconnect: lambda *_: Response(status_code=NOBODY),
        Exception: lambda *_: ApiError(500, "an error in the server, which its log describes").response(),
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    return Counted(Keyed(app, key) if key else app, service.metrics, [route.path for route in routes])


async def _generate(service: Service, request: Request, parse: Callable[[bytes], Order]) -> Response:
    deadline = asyncio.get_running_loop().time() + service.settings.timeout
    try:
        async with asyncio.timeout_at(deadline):
            order = parse(await _body(request, service.settings.max_body))
            service.check(order)
            delivery = await unless_gone(request.receive, service.submit(order))
            if not order.stream:
                try:
                    return JSONResponse(await unless_gone(request.receive, delivery.whole()))
                finally:
                    service.leave(delivery)
    except TimeoutError:
        raise ApiError(408, "the request took too long", code="timeout") from None
    return EventStream(delivery.chunks(), deadline, on_end=lambda: service.leave(delivery))


async def _body(request: Request, most: int) -> bytes:
    # Browsers let foreign pages send plain text and forms to any address, but not this without asking.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "Content-Type: must be application/json")
    if (coding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise ApiError(415, f"Content-Encoding: {coding} is not supported; send the body as it is")
    too_large = ApiError(413, f"the body must have at most {most} bytes", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise too_large
    return bytes(body)


def _state(problem: str) -> Response:
    if not problem:
        return PlainTextResponse("ok\n")
    return PlainTextResponse(f"{problem}\n", 503, {"Retry-After": str(RETRY_AFTER)})


def _http_error(request: Request, error: HTTPException) -> ApiError:
    messages = {
        404: f"there is no {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }
    return ApiError(error.status_code, messages.get(error.status_code, error.detail))


class Keyed:
    """Refuses clients without the key."""

    def __init__(self, app: ASGIApp, key: str):
        """Stands in front of an application."""
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        is_right = scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)
        if is_right or scope["path"] in _OPEN:
            return await self._app(scope, receive, send)
        message = "the API key is wrong" if given else "no API key: send the header Authorization: Bearer KEY"
        await ApiError(401, message, code="invalid_api_key").response()(scope, receive, send)


class Counted:
    """Counts responses by path and status; paths that do not exist are one."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: list[str]):
        """Stands in front of an application with these paths."""
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through."""

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = "/v1/models/{id:path}" if scope["path"].startswith("/v1/models/") else scope["path"]
                self._metrics.responded(path if path in self._paths else "other", message["status"])
            await send(message)

        if scope["type"] == "http":
            await self._app(scope, receive, counting)
