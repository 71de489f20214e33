"""Limits, the key, clients who leave, an engine that fails, and the end: what is refused, and what is left behind."""

import gzip
import json
import socket
import threading

import httpx
import openai
import pytest

from dsjax.serving import engine_thread

LONG = {"model": "small", "prompt": [[40, 41]], "temperature": 0, "max_tokens": 250}
JSON = {"Content-Type": "application/json"}


def connected(server, length):
    """A connection on which a request has begun whose body has so many bytes."""
    connection = socket.create_connection(server.url.removeprefix("http://").split(":"))
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}"]
    connection.sendall("\r\n".join([*lines, "", ""]).encode())
    return connection


def is_idle(server):
    return not server.engine.has_work and server.engine.pages_held == 0


def test_large_bodies(serving):
    with serving(max_body=1000) as server, server.http as http:
        large = json.dumps({"prompt": "x" * 1000}).encode()
        for content in (large, iter([large[:600], large[600:]])):  # with a length, and in chunks without
            found = http.post("/v1/completions", content=content, headers=JSON)
            assert found.status_code == 413
            assert found.json()["error"]["code"] == "body_too_large"
        assert http.post("/v1/completions", json={"prompt": "x" * 100, "max_tokens": 1}).status_code == 200


def test_bodies_that_are_packed(server):
    headers = JSON | {"Content-Encoding": "gzip"}
    found = server.http.post("/v1/completions", content=gzip.compress(b'{"prompt": "x"}'), headers=headers)
    assert found.status_code == 415
    assert found.json()["error"]["message"] == "Content-Encoding: gzip is not supported; send the body as it is"
    plain = server.http.post("/v1/completions", json={"prompt": "x"}, headers={"Content-Encoding": "identity"})
    assert plain.status_code == 200


def test_as_many_choices_as_there_is_room_for(serving):
    with serving(queue=4, engine_settings={"slots": 4}) as server:
        completions = server.openai.completions
        assert len(completions.create(model="small", prompt="x", n=8, max_tokens=1).choices) == 8
        with pytest.raises(openai.BadRequestError, match="9 choices: must be at most 8"):
            completions.create(model="small", prompt="x", n=9, max_tokens=1)


def test_long_answers(serving):
    with serving(max_tokens=5) as server:
        with pytest.raises(openai.BadRequestError, match="max_tokens = 6: must be at most 5"):
            server.openai.completions.create(model="small", prompt="x", max_tokens=6)
        found = server.openai.chat.completions.create(
            model="small", temperature=0, messages=[{"role": "user", "content": "def hello"}]
        )
        assert found.usage.completion_tokens == 5


def test_the_queue(serving, eventually):
    limits = {"queue": 1, "max_choices": 2, "engine_settings": {"slots": 1}}
    with serving(**limits, delay=0.01) as server:
        client = server.openai
        first = client.completions.create(**LONG, stream=True)
        second = client.completions.create(**LONG, stream=True)
        eventually(lambda: (server.engine.running, server.engine.waiting) == (1, 1))
        with pytest.raises(openai.RateLimitError, match="room for 2: try again later") as caught:
            client.completions.create(**LONG)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        for stream in (first, second):
            assert sum(len(chunk.choices) for chunk in stream) > 100
        assert client.completions.create(model="small", prompt="x", max_tokens=1).choices
        with pytest.raises(openai.BadRequestError, match="3 choices: must be at most 2"):
            client.completions.create(model="small", prompt=["x"] * 3)


@pytest.mark.parametrize("leave", ["stream", "whole", "waiting"])
def test_a_client_who_leaves(serving, eventually, leave):
    with serving(delay=0.01, engine_settings={"slots": 1}) as server:
        body = LONG | {"stream": leave == "stream"}
        other = server.openai.completions.create(**LONG, stream=True) if leave == "waiting" else None
        content = json.dumps(body).encode()
        with connected(server, len(content)) as connection:
            connection.sendall(content)
            eventually(lambda: server.engine.waiting if leave == "waiting" else server.engine.running)
        eventually(lambda: server.metric('dsjax_requests_finished_total{finish="cancelled"}') == 1)
        if other:
            assert sum(len(chunk.choices) for chunk in other) > 100
        eventually(lambda: is_idle(server))
        # Far fewer tokens than were asked for.
        assert server.engine.counts.tokens < 250 * (2 if other else 1)


@pytest.mark.parametrize("stream", [False, True])
def test_timeouts(serving, eventually, stream):
    with serving(delay=0.02, timeout=0.5) as server:
        with pytest.raises(openai.APIError, match="the request took too long") as caught:
            list(server.openai.completions.create(**LONG, stream=stream))
        assert stream or caught.value.status_code == 408
        eventually(lambda: is_idle(server))
        assert server.metric('dsjax_requests_finished_total{finish="cancelled"}') == 1


def test_a_body_that_does_not_come(serving):
    with serving(timeout=0.5) as server, connected(server, 9) as connection:
        connection.sendall(b"{")
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_the_key(serving):
    with serving(key="secret") as server:
        assert server.openai.completions.create(model="small", prompt="x", max_tokens=1).choices
        for path in ("/v1/models", "/metrics", "/nowhere"):
            for headers in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "Basic secret"}):
                found = httpx.get(server.url + path, headers=headers)
                assert (found.status_code, found.headers["www-authenticate"]) == (401, "Bearer")
                assert found.json()["error"]["code"] == "invalid_api_key"
        assert [httpx.get(server.url + path).status_code for path in ("/", "/health", "/ready")] == [200] * 3
        assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": "bearer  secret"}).status_code == 200
        server.key = "other"
        with pytest.raises(openai.AuthenticationError, match="the API key is wrong"):
            server.openai.completions.create(model="small", prompt="x")
        server.key = "secret"
        assert server.metric('dsjax_http_responses_total{path="other",status="401"}') == 3


def test_before_it_is_ready(serving, eventually):
    compiled = threading.Event()
    with serving(warm_up=compiled.wait) as server, server.http as http:
        assert [http.get(path).status_code for path in ("/health", "/ready")] == [200, 503]
        refused = http.post("/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["message"] == "the server is starting"
        compiled.set()
        eventually(lambda: http.get("/ready").status_code == 200)
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_the_end_comes_before_it_is_ready(serving, eventually, monkeypatch):
    """The program that is being compiled is the last, and nobody is told that there is a server."""
    begin, compiling, compiled = (threading.Event() for _ in range(3))
    later = []
    programs = [lambda: (compiling.set(), compiled.wait()), lambda: later.append(1)]
    with serving(warm_up=begin.wait, engine_settings={"slots": 1}, grace=100) as server:
        monkeypatch.setattr(server.engine._passes, "warming", lambda: iter(programs))
        begin.set()
        assert compiling.wait(60)
        server.server.stop()
        eventually(lambda: httpx.get(f"{server.url}/ready").text == "the server is shutting down\n")
        compiled.set()
        server.thread.join(60)
        assert server.status == [0]
        assert not later
        assert not server.announced.is_set()


def test_a_step_that_does_not_come_back(serving, eventually, monkeypatch):
    monkeypatch.setattr(engine_thread, "STALL", 0.05)
    with serving() as server, server.http as http:
        step, free = server.engine.step, threading.Event()
        server.engine.step = lambda: (free.wait(), step())
        stream = server.openai.completions.create(**LONG, stream=True)
        eventually(lambda: http.get("/health").status_code == 503)
        free.set()
        assert sum(len(chunk.choices) for chunk in stream) > 100
        assert http.get("/health").status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails(serving, stream, capfd):
    with serving(delay=0.01) as server:
        steps = iter(range(10))
        step = server.engine.step
        server.engine.step = lambda: (next(steps), step())
        with pytest.raises(openai.APIError, match="the engine has failed") as caught:
            list(server.openai.completions.create(**LONG, stream=stream))
        assert stream or caught.value.status_code == 500
        server.thread.join(60)
        assert server.status == [1]
    assert "dsjax: the engine has failed" in capfd.readouterr().err


def test_the_end_waits_for_answers(serving, eventually, tmp_path):
    cache = {"disk": str(tmp_path / "pages")}
    with serving(delay=0.01, engine_settings=cache) as server, server.http as http:
        stream = server.openai.completions.create(**LONG, stream=True)
        text = [next(stream).choices[0].text]
        server.server.stop()
        eventually(lambda: http.get("/ready").status_code == 503)
        refused = http.post("/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the server is shutting down")
        text += [chunk.choices[0].text for chunk in stream]
        assert len("".join(text)) > 100
        server.thread.join(60)
        assert server.status == [0]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
    assert list((tmp_path / "pages").rglob("*.npz"))


@pytest.mark.parametrize(("grace", "asked"), [(0.1, 1), (60, 2)])
def test_the_end_does_not_wait_for_ever(serving, grace, asked):
    with serving(delay=0.05, grace=grace) as server:
        stream = server.openai.completions.create(**LONG, stream=True)
        next(stream)
        for _ in range(asked):
            server.server.stop()
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)
        server.thread.join(60)
        assert server.status == [0]
        assert server.engine.counts.tokens < 250
        assert server.engine.pages_held == 0
