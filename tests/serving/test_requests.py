"""Bodies of requests: what is understood, and what is said when one is wrong."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.inference.sampling import Sampling
from dsjax.serving.errors import ApiError
from dsjax.serving.requests import parse_chat, parse_completion

HELLO = [{"role": "user", "content": "hello"}]


def completion(**fields):
    return parse_completion(json.dumps({"prompt": "x"} | fields).encode())


def chat(**fields):
    return parse_chat(json.dumps({"messages": HELLO} | fields).encode())


def test_all_that_is_understood():
    order = completion(
        model="m", prompt=["a", "b"], max_tokens=7, temperature=0.5, top_p=0.9, top_k=3, seed=5, repetition_penalty=1.5,
        logprobs=2, n=2, best_of=2, stop=["x", "y"], stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    assert order.sampling == Sampling(temperature=0.5, top_p=0.9, top_k=3, seed=5, repetition_penalty=1.5, logprobs=2)
    assert (order.model, order.prompts, order.max_tokens, order.n) == ("m", ["a", "b"], 7, 2)
    assert (order.stop, order.stream, order.include_usage) == (("x", "y"), True, True)


def test_defaults_are_openais():
    order = completion()
    assert (order.max_tokens, order.n, order.stop, order.stream, order.model) == (16, 1, (), False, None)
    assert (order.sampling.temperature, order.sampling.top_p, order.sampling.logprobs) == (1, 1, None)
    assert chat().max_tokens is None
    # Nobody asked for the same text again.
    assert len({completion().sampling.seed for _ in range(4)}) > 1


def test_null_is_as_good_as_nothing():
    nothing = dict.fromkeys(("stop", "max_tokens", "temperature", "n", "stream", "logprobs", "tools", "suffix", "user"))
    assert completion(seed=1, **nothing) == completion(seed=1)


def test_prompts():
    assert completion(prompt="").prompts == [""]
    assert completion(prompt=[1, 2]).prompts == [[1, 2]]
    assert completion(prompt=[[1], [2, 3]]).prompts == [[1], [2, 3]]


def test_messages():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    order = chat(messages=[{"role": "developer", "content": "s", "name": "x"}, {"role": "user", "content": parts}])
    assert order.messages == [{"role": "system", "content": "s"}, {"role": "user", "content": "ab"}]


def test_token_limits_of_both_names():
    assert chat(max_tokens=3).max_tokens == chat(max_completion_tokens=3).max_tokens == 3


def test_seeds_of_choices():
    order = completion(seed=7, n=3)
    seeds = [order.sampling_of(i).seed for i in range(3)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    assert seeds == [completion(seed=7, n=3).sampling_of(i).seed for i in range(3)]
    assert completion(seed=-1).sampling.seed == 2**32 - 1


def test_what_asks_for_nothing_is_let_through():
    chat(tools=[], tool_choice="none", response_format={"type": "text"}, logit_bias={}, frequency_penalty=0, user="me",
         presence_penalty=0.0, metadata={"a": "b"}, store=False, service_tier="auto", modalities=["text"])  # fmt: skip


@pytest.mark.parametrize(
    ("parse", "fields", "param", "message"),
    [
        (chat, {"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
        (chat, {"response_format": {"type": "json_object"}}, "response_format", 'must be left out or {"type": "text"}'),
        (chat, {"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        (chat, {"frequency_penalty": 0.5}, "frequency_penalty", "must be left out or 0"),
        (chat, {"reasoning_effort": "high"}, "reasoning_effort", "not supported: must be left out$"),
        (completion, {"echo": True}, "echo", "must be left out or false"),
        (completion, {"suffix": "x"}, "suffix", "not supported"),
        (completion, {"best_of": 3}, "best_of", "best_of = 3: must be n = 1"),
        (completion, {"tempreature": 1}, "tempreature", "unknown field tempreature"),
        (completion, {"temperature": -1}, "temperature", "temperature = -1.0: must be at least 0"),
        (completion, {"temperature": "hot"}, "temperature", 'temperature = "hot": must be a number'),
        (completion, {"temperature": float("nan")}, "temperature", "must be"),
        (completion, {"temperature": 10**400}, "temperature", "must be a number between -2\\*\\*63 and 2\\*\\*63"),
        (completion, {"temperature": 1e308}, "temperature", "= 1e\\+308: must be a number between"),
        (completion, {"seed": 10**20}, "seed", f"must be an integer, at least {-(2**63)} and at most {2**63 - 1}"),
        (completion, {"seed": "x"}, "seed", "must be an integer$"),
        (completion, {"top_p": 0}, "top_p", "top_p = 0.0: must be greater than 0"),
        (completion, {"top_k": -1}, "top_k", "top_k = -1: must be at least 0"),
        (completion, {"max_tokens": 0}, "max_tokens", "max_tokens = 0: must be an integer, at least 1"),
        (completion, {"max_tokens": True}, "max_tokens", "max_tokens = true: must be an integer"),
        (completion, {"n": 1.5}, "n", "n = 1.5: must be an integer, at least 1"),
        (completion, {"logprobs": 21}, "logprobs", "must be an integer, at least 0 and at most 20"),
        (completion, {"stop": ["a"] * 5}, "stop", "a list of at most 4"),
        (completion, {"stop": [""]}, "stop", "none of them empty"),
        (completion, {"stop": 3}, "stop", "must be a text"),
        (completion, {"stream": "yes"}, "stream", 'stream = "yes": must be true or false'),
        (completion, {"stream_options": []}, "stream_options", "must be an object"),
        (completion, {"prompt": []}, "prompt", "must be a text, a list of texts, token ids"),
        (completion, {"prompt": ["a", 1]}, "prompt", "must be a text"),
        (completion, {"prompt": [[1], []]}, "prompt", "must be a text"),
        (completion, {"prompt": [True]}, "prompt", "must be a text"),
        (completion, {"model": 3}, "model", "model = 3: must be a text"),
        (chat, {"messages": []}, "messages", "must be a list of at least one"),
        (chat, {"messages": ["x"]}, "messages[0]", "must be an object"),
        (chat, {"messages": [*HELLO, {"role": "tool"}]}, "messages[1].role", "role = 'tool': must be one of"),
        (chat, {"messages": [{"role": [], "content": "x"}]}, "messages[0].role", "must be one of"),
        (chat, {"messages": [{"role": "user"}]}, "messages[0].content", "must be a text"),
        (chat, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "text"),
        (chat, {"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages[0].tool_calls", "not supported"),
        (chat, {"top_logprobs": 2}, "top_logprobs", "come with logprobs = true"),
        (chat, {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "must be max_completion_tokens = 4"),
        (chat, {"chat_template_kwargs": {"a": "<｜User｜>"}}, "chat_template_kwargs", "numbers, true and false"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(parse, fields, param, message):
    with pytest.raises(ApiError, match=message) as caught:
        parse(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b"\xff", b'{"prompt": "\\ud800"}', b'{"prompt": ' + b"[" * 100_000, b"1" * 5000, b"\0"],
    ids=range(9),
)
def test_what_is_no_json(body):
    for parse in (parse_chat, parse_completion):
        with pytest.raises(ApiError, match="the body is no JSON object of UTF-8 text") as caught:
            parse(body)
        assert caught.value.status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
NAMES = ("prompt", "messages", "n", "stop", "seed", "temperature", "logprobs", "stream_options", "tools", "max_tokens",
         "top_k", "echo", "chat_template_kwargs")  # fmt: skip


@given(st.dictionaries(st.sampled_from(NAMES), JSON))
def test_no_body_is_a_fault_of_the_server(fields):
    for parse in (parse_chat, parse_completion):
        try:
            parse(json.dumps(fields).encode())
        except ApiError as error:
            assert error.status == 400
