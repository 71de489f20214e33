"""A server's life: it listens, compiles, serves, drains and ends. Of several processes the first does, the others
follow its engine."""

import asyncio
import os
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import uvicorn

from dsjax.inference.console import follow, warnings_said
from dsjax.inference.deployment import chosen, take_devices
from dsjax.inference.engine import Engine
from dsjax.inference.load import load_model
from dsjax.inference.settings import EngineSettings, Precision
from dsjax.parallel.agreement import on_first
from dsjax.parallel.hosts import is_first_process, processes
from dsjax.serving.app import make_app
from dsjax.serving.chat import ChatTemplate
from dsjax.serving.service import Service
from dsjax.serving.settings import ServerSettings

LINGER = 5
"""Seconds for the last bytes of responses, when all answers have ended."""


def serve(
    path: str,
    engine_settings: EngineSettings,
    settings: ServerSettings,
    deployment: str = "",
    *,
    ema: bool = False,
    precision: Precision = "auto",
) -> int:
    """Serve a model until SIGTERM or Ctrl-C; return the command's exit status.

    Args:
        path: folder of a run, or of weights.
        engine_settings: of the engine.
        settings: of the server.
        deployment: see `deployment.chosen`.
        precision: see `load_model`.
        ema: whether to take the moving average of a run's weights.

    Raises:
        ValueError: a model or settings that cannot be used.
        OSError: an address at which it cannot listen.
    """
    with ExitStack() as held:
        held.enter_context(warnings_said("uvicorn"))
        sockets: list[socket.socket] = []
        on_first(lambda: sockets.append(held.enter_context(listening(settings.host, settings.port))))
        key = settings.api_key or os.environ.get("DSJAX_API_KEY", "")
        if not key and settings.host not in ("127.0.0.1", "::1", "localhost"):
            _say(f"warning: everybody who reaches {settings.host} may use this server; give it an --api-key")
        layout, engine_settings, precision = chosen(deployment, engine_settings, precision)
        settings.most_choices(engine_settings.slots)  # refused before a model is loaded for it
        take_devices(layout)
        how = {"layout": layout, "precision": precision}
        model = load_model(path, ema=ema, mtp=engine_settings.speculate > 0, **how)
        template = ChatTemplate.load(Path(path), model.tokenizer, model.opening)
        _say(f"{model.origin}; chat template: {template.origin}")
        engine = Engine(model, engine_settings)
        if not engine.leads:
            follow(engine)
            return 0
        (sock,), name = sockets, settings.name or Path(path).resolve().name
        host, port = sock.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

        def ready() -> None:
            _say(f"{name} is served at {address}")

        return asyncio.run(HttpServer(engine, template, settings, name, key, on_ready=ready).run(sock))


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that has the address; the address is taken before a model is loaded for it.

    Raises:
        OSError: it cannot be had.
    """
    # asyncio lets answers go at once (TCP_NODELAY) only where a socket says that it is of TCP.
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from None
    return sock


class HttpServer:
    """One engine behind one address."""

    def __init__(
        self,
        engine: Engine,
        template: ChatTemplate,
        settings: ServerSettings,
        name: str,
        key: str,
        *,
        on_ready: Callable[[], None],
    ):
        """Describes a server; `run` runs it.

        Args:
            engine: that nobody else uses.
            template: for conversations.
            settings: limits among them.
            name: of the model.
            key: that clients have to send; empty for none.
            on_ready: called when requests are taken.
        """
        self._engine, self._template, self._settings, self._name, self._key = engine, template, settings, name, key
        self._on_ready, self._asked = on_ready, 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end = asyncio.Event()

    def stop(self) -> None:
        """Ask it to end; from any thread, or a signal. Asked twice, it gives running requests no more time."""
        self._asked += 1
        if self._loop:
            self._loop.call_soon_threadsafe(self._end.set)

    async def run(self, sock: socket.socket) -> int:
        """Serve until asked to end, or until the engine fails; return an exit status.

        Raises:
            Exception: what the engine of several processes has failed of, as when one of them is lost.
        """
        self._loop = asyncio.get_running_loop()
        service = Service(
            self._engine, self._template, self._settings, self._name, on_ready=self._on_ready, on_failure=self._end.set
        )
        config = uvicorn.Config(
            make_app(service, self._key),
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=LINGER,
        )
        server = _Uvicorn(config, self._on_signal)
        service.thread.start()
        serving, end = asyncio.create_task(server.serve([sock])), asyncio.create_task(self._end.wait())
        await asyncio.wait((serving, end), return_when=asyncio.FIRST_COMPLETED)
        service.refuse()
        patience = self._loop.time() + self._settings.grace
        await self._drain(service, patience)
        await self._close(service, patience)
        server.should_exit = True
        await serving
        if service.thread.failure:
            if processes() > 1:
                raise service.thread.failure
            _say(service.unready)
        return 1 if service.thread.failure else 0

    async def _drain(self, service: Service, patience: float) -> None:
        """Wait for the answers that are under way, and end them when it takes too long."""
        while service.open and not service.thread.failure:
            if self._is_impatient(patience):
                service.thread.cancel_all()
            await asyncio.sleep(0.02)

    async def _close(self, service: Service, patience: float) -> None:
        """Wait for the engine's thread. A program that is being compiled cannot be interrupted: when it takes too
        long, the process ends with it. Of several processes, all wait for it, as the others could not tell such an end
        from a loss."""
        closing = asyncio.create_task(asyncio.to_thread(service.close))
        while not closing.done():
            if service.thread.is_starting and processes() == 1 and self._is_impatient(patience):
                _say("ended in the middle of a compilation")
                os._exit(0)
            await asyncio.sleep(0.02)
        await closing

    def _is_impatient(self, patience: float) -> bool:
        return self._asked > 1 or self._loop.time() >= patience

    def _on_signal(self) -> None:
        self.stop()
        if self._asked > 2:  # the device may never come back
            os._exit(1)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to somebody else."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]):
        super().__init__(config)
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_signal()


def _say(text: str) -> None:
    if is_first_process():
        print(f"dsjax: {text}", file=sys.stderr, flush=True)
