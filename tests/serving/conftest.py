"""A small model behind a server: in this process, or in one of its own."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import httpx
import jax
import jax.numpy as jnp
import pytest
from engines import SMALL, TEXT
from openai import OpenAI

from dsjax.checkpoint.native import Checkpoints
from dsjax.config import Config, DataConfig, TrainConfig
from dsjax.data.tokenizer import Tokenizer
from dsjax.inference.engine import Engine
from dsjax.inference.load import load_model
from dsjax.inference.request import Request
from dsjax.inference.settings import EngineSettings
from dsjax.model.layout import unstack
from dsjax.model.transformer import initial_parameters
from dsjax.serving.chat import ChatTemplate
from dsjax.serving.run import HttpServer, listening
from dsjax.serving.settings import ServerSettings
from dsjax.settings import to_dict, to_toml

TURNS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
MODEL = replace(SMALL, num_hidden_layers=2)
CONTEXT = 256
ENGINE = EngineSettings(slots=4, context=CONTEXT, page_size=8, prefill_tokens=64, shortest_table=CONTEXT)
SERVER = ServerSettings(port=0, name="small", timeout=120, grace=20)


def chat_tokenizer() -> Tokenizer:
    """A byte-level BPE with tokens for turns and thinking, not marked as special, as in R1's."""
    trained = Tokenizer.train([TEXT], MODEL.vocab_size - len(TURNS))
    described = json.loads(trained._text)
    for i, content in enumerate(TURNS):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        described["added_tokens"].append({"id": trained.vocab_size + i, "content": content} | flags)
    return Tokenizer(json.dumps(described), "test")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """See `chat_tokenizer`."""
    return chat_tokenizer()


@pytest.fixture(scope="session")
def run(tmp_path_factory, tokenizer) -> Path:
    """The folder of a run whose weights are random, and large enough for every prompt to have another answer."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    config = Config(model=MODEL, train=TrainConfig(steps=1, batch_size=1), data=DataConfig(sequence_length=CONTEXT))
    folder.mkdir()
    (folder / "config.toml").write_text(to_toml(config))
    tokenizer.save(folder / "tokenizer.json")
    params, biases = jax.jit(lambda: initial_parameters(MODEL, 0))()
    state = {"step": jnp.int32(1), "params": unstack(params, MODEL), "biases": unstack(biases, MODEL)}
    with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, state, {"config": to_dict(config)})
    return folder


@pytest.fixture(scope="session")
def model(run):
    return load_model(run)


def eventually(law: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not law():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.01)


@pytest.fixture(scope="session", name="eventually")
def eventually_fixture():
    """See `eventually`."""
    return eventually


@dataclass
class Served:
    """A server in this process."""

    url: str
    key: str
    engine: Engine
    template: ChatTemplate
    server: HttpServer
    thread: threading.Thread
    status: list[int]
    announced: threading.Event

    @property
    def openai(self) -> OpenAI:
        """The official client, which does not try again by itself."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=120)

    @property
    def http(self) -> httpx.Client:
        """Any client, with the key."""
        return httpx.Client(base_url=self.url, timeout=120, headers={"Authorization": f"Bearer {self.key}"})

    @property
    def is_there(self) -> bool:
        """Whether anybody listens."""
        try:
            return bool(httpx.get(f"{self.url}/health", timeout=10))
        except httpx.ConnectError:
            return False

    def metric(self, line: str) -> float:
        """The value of a line of `/metrics`; 0 where it is not there yet."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(found.split()[-1]) for found in lines if found.startswith(f"{line} "))


@pytest.fixture(scope="session")
def serving(model) -> Callable:
    """Serve in a thread of this process, until the `with` ends."""

    @contextmanager
    def served(
        *,
        template: str = "",
        key: str = "",
        delay: float = 0,
        warm_up: Callable | None = None,
        engine_settings: Mapping = MappingProxyType({}),
        **settings,
    ) -> Iterator[Served]:
        """Serve.

        Args:
            template: in place of the built-in one.
            key: that clients need.
            delay: seconds that a step takes longer.
            warm_up: to be done before the engine's own; if given, nobody waits until the server is ready.
            engine_settings: in place of those of `ENGINE`.
            settings: in place of those of `SERVER`.
        """
        engine = Engine(model, replace(ENGINE, **engine_settings))
        step, own_warm_up = engine.step, engine.warm_up
        engine.step = lambda: (time.sleep(delay), step())
        if warm_up:
            engine.warm_up = lambda stopped: (warm_up(), own_warm_up(stopped))
        chat = ChatTemplate.load(Path("/nonexistent"), model.tokenizer, model.opening)
        if template:
            chat = ChatTemplate(template, "test", model.tokenizer, bos="", eos="<｜end▁of▁sentence｜>")
        ready, status = threading.Event(), []
        server_settings = replace(SERVER, **settings)
        server = HttpServer(engine, chat, server_settings, "small", key, on_ready=ready.set)
        sock = listening(server_settings.host, server_settings.port)
        thread = threading.Thread(target=lambda: status.append(asyncio.run(server.run(sock))))
        thread.start()
        try:
            host, port = sock.getsockname()
            found = Served(f"http://{host}:{port}", key or "none", engine, chat, server, thread, status, ready)
            if warm_up:
                eventually(lambda: found.is_there)
            else:
                assert ready.wait(300)
            yield found
        finally:
            if thread.is_alive():
                server.stop()
            thread.join(120)
            sock.close()
        assert not thread.is_alive()

    return served


@pytest.fixture(scope="session")
def server(serving) -> Iterator[Served]:
    """One that many tests share."""
    with serving() as served:
        yield served


@pytest.fixture(scope="session")
def alone(model) -> Callable:
    """What the engine gives for one prompt, with nothing else to do."""
    engine = Engine(model, ENGINE)
    engine.warm_up()

    def answer(prompt, sampling, **settings) -> Request:
        request = engine.submit(prompt, sampling, **settings)
        engine.run()
        return request

    return answer
