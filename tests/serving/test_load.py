"""Many clients at once; some leave, and some talk nonsense: no answer is wrong or lost, and no page leaks."""

import asyncio
import contextlib
import random
import time

import httpx
import numpy as np
import openai
import pytest

from dsjax.inference.sampling import Sampling
from dsjax.serving.thinking import Thinking

CLIENTS, REQUESTS = 64, 1000
WORDS = ["def ", "add(", "a, b", "):\n", "    return ", "größer", "你好", "😀", "class ", "Point", " # ", "x = "]
NONSENSE = [b"", b"{", b"[]", b'{"prompt": 3}', b'{"prompt": "x", "n": -1}', b'{"prompt": "x", "tools": [1]}',
            b"\xff\xfe", b'{"prompt": "\\ud800"}', b'{"prompt": "x", "temperature": 1e999}', b"[" * 5000]  # fmt: skip

pytestmark = pytest.mark.slow


def drawn(number):
    """A client's request, the same for the same number: what is sent, and how long the client stays."""
    rng = random.Random(number)
    # Many begin alike, for the prefix cache.
    prompt = "class Point:\n    def norm(self):\n" * rng.randrange(3) + "".join(
        rng.choices(WORDS, k=rng.randint(1, 12))
    )
    settings = {"temperature": 0.0} if rng.random() < 0.5 else {"temperature": 0.9, "top_p": 0.9, "seed": number}
    body = {"prompt": prompt, "max_tokens": rng.randint(1, 48)} | settings
    if rng.random() < 0.3:
        body["stop"] = ["ret", "\n\n"]
    kind = rng.choices(["whole", "stream", "chat", "leaves", "leaves at once", "nonsense"], [30, 25, 15, 15, 7, 8])[0]
    return kind, body, rng


async def speak(server, client, http, number):
    """Send a request; return its kind, what came of it, and after how many seconds."""
    kind, body, rng = drawn(number)
    start = time.monotonic()
    if kind == "nonsense":
        path = rng.choice(["/v1/completions", "/v1/chat/completions"])
        content = rng.choice(NONSENSE)
        found = await http.post(path, content=content, headers={"Content-Type": "application/json"})
        assert found.status_code == 400, (content, found.text)
        assert found.json()["error"]["type"] == "invalid_request_error"
        return kind, None, time.monotonic() - start
    if kind == "leaves at once":
        with contextlib.suppress(httpx.TimeoutException):
            await http.post("/v1/completions", json=body | {"max_tokens": 200}, timeout=rng.uniform(0.01, 0.2))
        return kind, None, time.monotonic() - start
    if kind == "chat":
        messages = [{"role": "user", "content": body.pop("prompt")}]
        found = await client.chat.completions.create(model="small", messages=messages, **body)
        message = found.choices[0].message
        said = getattr(message, "reasoning_content", ""), message.content
        return kind, (said, found.choices[0].finish_reason), time.monotonic() - start
    if kind == "whole":
        found = await client.completions.create(model="small", **body)
        return kind, (found.choices[0].text, found.choices[0].finish_reason), time.monotonic() - start
    stream = await client.completions.create(model="small", **body, stream=True)
    text, finish, stays = "", None, rng.randrange(5) if kind == "leaves" else None
    async for chunk in stream:
        text, finish = text + chunk.choices[0].text, chunk.choices[0].finish_reason
        if stays == 0:
            await stream.close()
            return kind, (text, None), time.monotonic() - start
        stays = stays and stays - 1
    return kind, (text, finish), time.monotonic() - start


async def converse(server):
    numbers = iter(range(REQUESTS))
    results = {}
    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as http:
        client = openai.AsyncOpenAI(
            base_url=f"{server.url}/v1",
            api_key="none",
            timeout=300,
            max_retries=50,
            http_client=httpx.AsyncClient(limits=limits),
        )

        async def one_client():
            for number in numbers:
                results[number] = await speak(server, client, http, number)

        await asyncio.gather(*(one_client() for _ in range(CLIENTS)))
        await client.close()
    return results


def expected_of(alone, server, kind, body):
    """What the engine gives for the same with nothing else to do, and why it ends."""
    sampling = {name: value for name, value in body.items() if name in ("temperature", "top_p", "seed")}
    settings = {"max_tokens": body["max_tokens"], "stop": body.get("stop", ())}
    if kind != "chat":
        request = alone(body["prompt"], Sampling(**sampling), **settings)
        return request.text, request.finish
    ids = server.template.encode([{"role": "user", "content": body["prompt"]}])[0]
    stop_ids = {server.engine.tokenizer.eos, server.template.end}
    request = alone(ids, Sampling(**sampling), **settings, stop_ids=stop_ids)
    thinking = Thinking("")
    said = zip(thinking.push(request.text), thinking.flush(), strict=True)
    return tuple("".join(part) for part in said), request.finish


def test_load(serving, alone, eventually):
    engine = {"slots": 16, "cache_bytes": 2**16}  # too little for all at once: some give up their pages
    with serving(engine_settings=engine, queue=32) as server:
        start = time.monotonic()
        results = asyncio.run(converse(server))
        seconds = time.monotonic() - start
        assert len(results) == REQUESTS

        eventually(lambda: not server.engine.has_work)
        assert server.engine.pages_held == 0
        assert server.metric("dsjax_requests_running") == server.metric("dsjax_requests_waiting") == 0
        cancelled = server.metric('dsjax_requests_finished_total{finish="cancelled"}')
        preempted = server.metric("dsjax_preemptions_total")
        refused = server.metric('dsjax_http_responses_total{path="/v1/completions",status="429"}')
        hits, tokens = server.engine.prefix.hit_rate, server.engine.counts.tokens
        # The server is as it was: it takes as many as before, and gives the same answers.
        again = asyncio.run(converse_again(server))

        for number, (kind, found, _) in results.items():
            if found is None:
                continue
            _, body, _ = drawn(number)
            expected = expected_of(alone, server, kind, body)
            if found[1] is None:  # the client left
                assert expected[0].startswith(found[0]), (number, kind)
            else:
                assert found == expected, (number, kind)
    assert again == 16
    kinds = [kind for kind, _, _ in results.values()]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    print(f"\n{REQUESTS} requests of {CLIENTS} clients in {seconds:.1f} s: {counts}")
    print(f"{tokens} tokens, {hits:.0%} of prompts from the prefix cache, {preempted:.0f} preemptions, {cancelled:.0f} "
          f"cancelled, {refused:.0f} refused with 429 and sent again")  # fmt: skip
    for name in ("whole", "stream", "chat", "nonsense"):
        times = [seconds for kind, _, seconds in results.values() if kind == name]
        p50, p99 = np.percentile(times, [50, 99])
        print(f"{name}: p50 {p50:.3f} s, p99 {p99:.3f} s")
    assert cancelled > 10
    assert preempted > 0
    assert refused > 0


async def converse_again(server):
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0)
    body = {"model": "small", "prompt": "def ", "temperature": 0, "max_tokens": 20}
    found = await asyncio.gather(*(client.completions.create(**body) for _ in range(16)))
    await client.close()
    return sum(each.choices[0].text == found[0].choices[0].text for each in found)
