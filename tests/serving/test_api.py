"""The interface, spoken to by the official client and by curl: answers are those of the engine."""

import json
import math
import shutil
import subprocess
import time

import openai
import pytest

from dsjax.inference.sampling import Sampling
from dsjax.serving.requests import Order

GREEDY = Sampling(temperature=0)
PROMPTS = ["def add(", "class Point:\n    ", "größer, 你", "😀" * 9]
HELLO = [{"role": "user", "content": "def hello"}]


def ids_of(server, messages):
    return server.template.encode(messages)[0]


def stop_ids(server):
    return {server.engine.tokenizer.eos, server.template.end}


def text_of(chunks):
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)


@pytest.fixture(scope="module")
def client(server):
    return server.openai


def test_completions_are_the_engines(client, server, alone):
    found = client.completions.create(model="small", prompt=PROMPTS, temperature=0, max_tokens=20)
    expected = [alone(prompt, GREEDY, max_tokens=20) for prompt in PROMPTS]
    assert [choice.text for choice in found.choices] == [request.text for request in expected]
    assert [choice.finish_reason for choice in found.choices] == [request.finish for request in expected]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.usage.prompt_tokens == sum(len(request.prompt) for request in expected)
    assert found.usage.completion_tokens == sum(len(request.tokens) for request in expected)
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found.object == "text_completion"


def test_sampling_reaches_the_engine(client, alone):
    settings = {"temperature": 0.9, "top_p": 0.8, "seed": 11}
    extensions = {"top_k": 9, "repetition_penalty": 1.3}
    found = client.completions.create(
        model="small", prompt="def ", max_tokens=20, **settings, extra_body=extensions
    ).choices[0]
    assert found.text == alone("def ", Sampling(**settings, **extensions), max_tokens=20).text


def test_prompts_of_ids(client, server, alone):
    ids = [[server.engine.tokenizer.eos, 40, 41, 42], [50]]
    found = client.completions.create(model="small", prompt=ids, temperature=0, max_tokens=9)
    assert [choice.text for choice in found.choices] == [alone(each, GREEDY, max_tokens=9).text for each in ids]


def test_a_prompt_is_encoded_once(client, server, monkeypatch):
    """Whoever waits for its length, and however many answers it gets."""
    tokenizer, encoded = server.engine.tokenizer, []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda texts, **how: encoded.extend(texts) or encode(texts, **how))
    assert len(client.completions.create(model="small", prompt=["def ", "x = "], n=3, max_tokens=2).choices) == 6
    assert encoded == ["def ", "x = "]


def test_choices_have_seeds_of_their_own(client, alone):
    found = client.completions.create(model="small", prompt=["a", "b"], n=3, seed=5, temperature=1, max_tokens=12)
    order = Order(model=None, sampling=Sampling(seed=5), max_tokens=1, stop=(), n=3, stream=False, include_usage=False)
    expected = [alone(prompt, order.sampling_of(i), max_tokens=12) for prompt in "ab" for i in range(3)]
    assert [choice.text for choice in found.choices] == [request.text for request in expected]
    assert found.usage.prompt_tokens == len(expected[0].prompt) + len(expected[3].prompt)


def test_chat_is_the_engines(client, server, alone):
    found = client.chat.completions.create(model="small", messages=HELLO, temperature=0, max_tokens=20)
    expected = alone(ids_of(server, HELLO), GREEDY, max_tokens=20, stop_ids=stop_ids(server))
    choice = found.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == expected.finish
    assert found.usage.prompt_tokens == len(ids_of(server, HELLO))
    assert found.object == "chat.completion"
    assert abs(found.created - time.time()) < 600


def test_an_answer_may_fill_the_context(client, server):
    found = client.chat.completions.create(model="small", messages=HELLO, temperature=0)
    assert found.choices[0].finish_reason == "length"
    assert found.usage.total_tokens == server.engine.context


def test_streams_are_the_answer_in_pieces(client, server):
    settings = {"model": "small", "prompt": PROMPTS[:2], "temperature": 0, "max_tokens": 20}
    whole = client.completions.create(**settings)
    chunks = list(client.completions.create(**settings, stream=True))
    for index in range(2):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.text for choice in mine) == whole.choices[index].text
        assert len(mine) > 3
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_streams_of_chat(client):
    settings = {"model": "small", "messages": HELLO, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**settings)
    stream = client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.choices == []
    # The second time the prompt is in the prefix cache.
    assert last.usage.completion_tokens == 20
    assert last.usage.prompt_tokens_details.cached_tokens >= whole.usage.prompt_tokens_details.cached_tokens


def test_cached_tokens_are_told(client, server):
    prompt = "class Cached: " * 5
    found = [client.completions.create(model="small", prompt=prompt, max_tokens=1).usage for _ in range(2)]
    assert found[0].prompt_tokens_details.cached_tokens == 0
    assert found[1].prompt_tokens_details.cached_tokens == (found[1].prompt_tokens - 1) // 8 * 8 > 0
    assert server.metric("dsjax_prefix_cache_hit_rate") == server.engine.prefix.hit_rate > 0


@pytest.mark.parametrize("stream", [False, True])
def test_stop(client, alone, stream):
    whole = alone("def ", GREEDY, max_tokens=40).text
    stop = whole[9:12]
    expected = whole[: whole.index(stop)]
    for given in (stop, ["never", stop]):
        settings = {"model": "small", "prompt": "def ", "max_tokens": 40, "temperature": 0, "stop": given}
        found = client.completions.create(**settings, stream=stream, logprobs=0)
        choices = [chunk.choices[0] for chunk in found] if stream else [found.choices[0]]
        assert "".join(choice.text for choice in choices) == expected
        assert choices[-1].finish_reason == "stop"
        # Tokens of the stop string are not told.
        offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
        assert offsets == sorted(offsets)
        assert offsets[-1] < len(expected)


def test_logprobs_of_completions(client, alone):
    prompt = "x = 'größer', 你好 "
    expected = alone(prompt, Sampling(temperature=0, logprobs=3), max_tokens=25)
    found = client.completions.create(model="small", prompt=prompt, temperature=0, max_tokens=25, logprobs=3).choices[0]
    told = found.logprobs
    assert told.token_logprobs == [max(-9999, token.logprob) for token in expected.tokens]
    # The first may only be what the prompt's last token can grow to.
    assert [max(top.values()) for top in told.top_logprobs][1:] == told.token_logprobs[1:]
    assert all(1 <= len(top) <= 3 for top in told.top_logprobs)
    assert told.text_offset[0] == 0
    for token, offset in list(zip(told.tokens, told.text_offset, strict=True))[1:]:
        if "\N{REPLACEMENT CHARACTER}" not in token:
            assert found.text[offset : offset + len(token)] == token


def test_logprobs_of_chat(client, server, alone):
    settings = {"model": "small", "messages": HELLO, "temperature": 0, "max_tokens": 15, "logprobs": True}
    expected = alone(
        ids_of(server, HELLO), Sampling(temperature=0, logprobs=2), max_tokens=15, stop_ids=stop_ids(server)
    )
    found = client.chat.completions.create(**settings, top_logprobs=2).choices[0]
    told = found.logprobs.content
    assert [each.logprob for each in told] == [token.logprob for token in expected.tokens]
    assert bytes(byte for each in told for byte in each.bytes).decode(errors="replace") == found.message.content
    assert all(len(each.top_logprobs) == 2 and each.top_logprobs[0].logprob == each.logprob for each in told)
    assert all(math.exp(each.logprob) <= 1 for each in told)
    streamed = list(client.chat.completions.create(**settings, stream=True))
    again = [each for chunk in streamed if chunk.choices[0].logprobs for each in chunk.choices[0].logprobs.content]
    assert [each.logprob for each in again] == [each.logprob for each in told]
    assert all(each.top_logprobs == [] for each in again)


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_is_told_apart(serving, stream):
    """The prompt has opened the tag, and the answer is all thinking: this model closes none."""
    with serving(template="{{ messages[0].content }}<think>\n") as server:
        settings = {"model": "small", "messages": HELLO, "temperature": 0, "max_tokens": 12, "stream": stream}
        found = server.openai.chat.completions.create(**settings)
        parts = [chunk.choices[0].delta for chunk in found] if stream else [found.choices[0].message]
        assert "".join(part.content or "" for part in parts) == ""
        assert len("".join(getattr(part, "reasoning_content", None) or "" for part in parts)) > 3


def test_models(client):
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "dsjax"
    with pytest.raises(openai.NotFoundError, match="model 'other/one': there is only 'small'") as caught:
        client.models.retrieve("other/one")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"prompt": "x", "model": "gpt"}, openai.NotFoundError, "model = 'gpt': there is only 'small'"),
        ({"prompt": "x", "temperature": -1}, openai.BadRequestError, "temperature = -1.0: must be at least 0"),
        ({"prompt": "x", "echo": True}, openai.BadRequestError, "echo is not supported"),
        ({"prompt": "x" * 999}, openai.BadRequestError, r"the prompt has \d+ tokens: must be below the 256"),
        ({"prompt": [1] * 256}, openai.BadRequestError, "the prompt has 256 tokens: must be below the 256"),
        ({"prompt": [320]}, openai.BadRequestError, "token 320 must be below"),
        ({"prompt": ["x", "y" * 999]}, openai.BadRequestError, "must be below the 256 of the context"),
        ({"prompt": "x", "n": 17}, openai.BadRequestError, "17 choices: must be at most 16"),
        ({"prompt": ["x"] * 9, "n": 2}, openai.BadRequestError, "18 choices: must be at most 16"),
    ],
)
def test_errors_of_completions(client, settings, kind, message):
    for stream in (False, True):
        with pytest.raises(kind, match=message):
            client.completions.create(**{"model": "small"} | settings, stream=stream)


def test_errors_of_chat(client):
    with pytest.raises(openai.BadRequestError, match="tools is not supported") as caught:
        client.chat.completions.create(
            model="small", messages=HELLO, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert (caught.value.param, caught.value.type) == ("tools", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="small", messages=[{"role": "user", "content": "x" * 999}])
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (("GET", "/nowhere"), 404),
        (("GET", "/v1/completions"), 405),
        (("POST", "/v1/completions", {"content": "x", "headers": {"Content-Type": "text/plain"}}), 415),
        (("POST", "/v1/completions", {"content": "{", "headers": {"Content-Type": "application/json"}}), 400),
        (("POST", "/v1/completions", {"json": {}}), 400),
    ],
)
def test_errors_are_openais_objects(server, request_, status):
    method, path, *more = request_
    with server.http as http:
        response = http.request(method, path, **(more[0] if more else {}))
    assert response.status_code == status
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


def test_a_fault_of_the_server_is_told_without_details(server, monkeypatch):
    def broken(*_):
        raise RuntimeError("secret")

    monkeypatch.setattr(server.template, "encode", broken)
    with pytest.raises(openai.InternalServerError, match="an error in the server") as caught:
        server.openai.chat.completions.create(model="small", messages=HELLO)
    assert "secret" not in str(caught.value)
    monkeypatch.undo()
    assert server.openai.chat.completions.create(model="small", messages=HELLO, max_tokens=1).choices


def test_metrics(server):
    before = {name: server.metric(name) for name in ("dsjax_answer_tokens_total", "dsjax_request_seconds_count")}
    server.openai.completions.create(model="small", prompt=[[40]], max_tokens=5, temperature=0, n=2)
    assert server.metric("dsjax_answer_tokens_total") == before["dsjax_answer_tokens_total"] + 10
    assert server.metric("dsjax_request_seconds_count") == before["dsjax_request_seconds_count"] + 2
    assert server.metric("dsjax_pages_held") == 0 < server.metric("dsjax_pages")
    assert server.metric('dsjax_http_responses_total{path="/v1/completions",status="200"}') >= 1
    assert server.metric('dsjax_requests_finished_total{finish="length"}') >= 2
    with server.http as http:
        http.get("/a/b")
    assert server.metric('dsjax_http_responses_total{path="other",status="404"}') >= 1
    for histogram in ("time_to_first_token", "time_per_output_token", "request"):
        assert server.metric(f"dsjax_{histogram}_seconds_sum") > 0


def test_health_and_readiness(server):
    with server.http as http:
        assert [http.get(path).status_code for path in ("/health", "/ready")] == [200, 200]


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl(server, alone):
    def curl(*words):
        command = ["curl", "--silent", "--show-error", "--no-buffer", "--max-time", "60", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=90).stdout

    body = {"prompt": "def ", "max_tokens": 8, "temperature": 0}
    header = ("-H", "Content-Type: application/json")
    expected = alone("def ", GREEDY, max_tokens=8).text
    found = curl(f"{server.url}/v1/completions", *header, "-d", json.dumps(body))
    assert json.loads(found)["choices"][0]["text"] == expected
    streamed = curl(f"{server.url}/v1/completions", *header, "-d", json.dumps(body | {"stream": True}))
    events = streamed.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    parts = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert "".join(part["choices"][0]["text"] for part in parts) == expected
    assert curl("-w", "%{http_code}", "-o", "-", f"{server.url}/ready") == "ok\n200"
    refused = curl("-i", f"{server.url}/v1/completions", "-d", "prompt=x")
    assert refused.startswith("HTTP/1.1 415")
