"""An answer is what the model says, whoever else is served, wherever its pages lie and whatever was read before."""

import random
import threading
from dataclasses import replace

import jax
import numpy as np
import pytest
from engines import GREEDY, MIX, SETTINGS, answered, compilations, ending, ids_of, prompt

from dsjax.inference.engine import Engine
from dsjax.inference.load import Model
from dsjax.inference.sampling import Sampling
from dsjax.inference.settings import EngineSettings
from dsjax.inference.text import UNKNOWN
from dsjax.model.context import context
from dsjax.model.transformer import hidden_states, logits
from dsjax.runtime import Runtime

PAGE_BYTES = 4 * 4 * 18 * 4
"""Of the small model: layers, tokens, values, bytes of a value."""


@pytest.fixture(scope="module")
def model(small, random_parameters, tokenizer):
    """A model that does not end its documents by itself."""
    return Model(small, Runtime(), *random_parameters(small), ending(tokenizer, -1), opening=0, context=64, origin="")


@pytest.fixture(scope="module")
def full(model):
    """The logits behind every token of a text, by a forward pass of training."""
    config = {"config": model.config, "runtime": model.runtime}

    @jax.jit
    def run(tokens):
        ctx = context(model.config, tokens.shape[1])
        hidden, _ = hidden_states(model.params, model.biases, model.params["embed"][tokens], ctx, **config)
        return logits(model.params, hidden)[0]

    def of(tokens):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(run(padded))[: len(tokens)]

    return of


@pytest.fixture(scope="module")
def likeliest(full):
    """The greedy continuation of a prompt by full forward passes."""

    def continuation(prompt, count):
        ids = list(prompt)
        for _ in range(count):
            scores = np.sort(full(ids)[-1])
            assert scores[-1] - scores[-2] > 1e-3, "too near a tie to say what is right"
            ids.append(int(full(ids)[-1].argmax()))
        return ids[len(prompt) :]

    return continuation


def alone(model, *args, settings=SETTINGS, **kwargs):
    """The tokens of a request that nobody else is beside."""
    engine = Engine(model, settings)
    return answered(engine, engine.submit(*args, **kwargs))[0]


@pytest.fixture(scope="module")
def expected(model):
    """The tokens of every request of the mix, alone."""
    return [alone(model, ids, how, max_tokens=count) for ids, how, count in MIX]


@pytest.mark.parametrize("length", [1, 16, 17, 30])
def test_greedy_is_what_the_training_forward_says(model, likeliest, length):
    assert alone(model, prompt(length), GREEDY, max_tokens=12) == likeliest(prompt(length), 12)


def test_nothing_depends_on_the_batch(model, expected):
    engine = Engine(model, SETTINGS)
    requests = []
    for ids, how, count in reversed(MIX):
        requests.append(engine.submit(ids, how, max_tokens=count))
        engine.step()
        engine.step()
    assert answered(engine, *requests) == expected[::-1]
    assert [len(tokens) for tokens in expected] == [count for _, _, count in MIX]
    assert engine.counts.tokens == sum(count for _, _, count in MIX)


@pytest.mark.parametrize(
    "other", [{"prefill_tokens": 64}, {"page_size": 16}, {"slots": 1}, {"shortest_table": 16}, {"prefix_bytes": 0}]
)
def test_nothing_depends_on_how_it_is_done(model, expected, other):
    engine = Engine(model, replace(SETTINGS, **other))
    requests = [engine.submit(ids, how, max_tokens=count) for ids, how, count in MIX]
    assert answered(engine, *requests) == expected


def test_what_was_read_before_is_not_read_again(model, expected):
    engine = Engine(model, SETTINGS)
    for again in range(2):
        requests = [engine.submit(ids, how, max_tokens=count) for ids, how, count in MIX]
        assert answered(engine, *requests) == expected
        if again:
            # All full pages but the last token's: 0, 12, 28, 36, 4, 12, 28 of 135 tokens.
            assert [request.cached_tokens for request in requests] == [0, 12, 28, 36, 4, 12, 28]
            assert engine.prefix.asked == 270
            assert engine.prefix.found >= 120
            assert engine.prefix.hit_rate == engine.prefix.found / 270
    assert engine.counts.prompt_tokens_read == 270 - engine.prefix.found
    assert engine.pages_idle > 0


def test_an_answer_is_known_when_it_comes_back_as_a_prompt(model):
    engine = Engine(model, SETTINGS)
    first = engine.submit(prompt(10), GREEDY, max_tokens=11)
    engine.run()
    longer = [*first.prompt, *ids_of(first), 5]
    second = engine.submit(longer, GREEDY, max_tokens=4)
    assert answered(engine, second) == [alone(model, longer, GREEDY, max_tokens=4)]
    assert second.cached_tokens == 20  # the last token of the answer has never been read


def test_a_prompt_that_is_being_read_is_shared_as_far_as_it_is_read(model):
    engine = Engine(model, SETTINGS)
    requests = []
    for _ in range(3):
        requests.append(engine.submit(prompt(45), GREEDY, max_tokens=6))
        engine.step()
    first, *others = answered(engine, *requests)
    assert others == [first] * 2
    assert [request.cached_tokens for request in requests] == [0, 16, 32]


def test_the_youngest_gives_up_its_pages_when_there_are_none(model, expected):
    few = replace(SETTINGS, cache_bytes=18 * PAGE_BYTES)
    engine = Engine(model, few)
    requests = [engine.submit(ids, how, max_tokens=count) for ids, how, count in MIX]
    assert answered(engine, *requests) == expected
    assert engine.counts.preemptions > 0
    assert requests[0].preemptions == 0
    assert engine.prefix.asked == 135  # a prompt that is read again asks once


def test_after_a_preemption_the_answer_goes_on(model):
    """Its first token is not chosen again."""
    confined = {"max_tokens": 25, "first": np.arange(320) == 44}
    expected = alone(model, prompt(20), GREEDY, **confined)
    engine = Engine(model, replace(SETTINGS, cache_bytes=18 * PAGE_BYTES))
    engine.submit(prompt(25), GREEDY, max_tokens=35)
    request = engine.submit(prompt(20), GREEDY, **confined)
    assert answered(engine, request) == [expected]
    assert request.preemptions > 0
    assert 44 not in expected[1:]


def test_requests_begin_in_their_order(model):
    engine = Engine(model, SETTINGS)
    lengths = (30, 3, 25, 1, 2, 20, 4)
    requests = [engine.submit(prompt(length, i), GREEDY, max_tokens=3) for i, length in enumerate(lengths)]
    engine.run()
    firsts = [request.times[0] for request in requests]
    assert firsts == sorted(firsts)


def test_a_long_prompt_does_not_hold_up_the_others(model):
    engine = Engine(model, SETTINGS)
    short = engine.submit(prompt(3), GREEDY, max_tokens=30)
    for _ in range(4):
        engine.step()
    before = len(short.tokens)
    long = engine.submit(prompt(50), GREEDY, max_tokens=3)
    engine.step()
    engine.step()
    engine.step()
    assert len(short.tokens) == before + 3
    assert not long.tokens


def test_cancelling_gives_pages_back(model, expected):
    engine = Engine(model, replace(SETTINGS, prefix_bytes=0))
    decoded = engine.submit(prompt(4), GREEDY, max_tokens=40)
    stays = engine.submit(*MIX[2][:2], max_tokens=25)
    halfway = engine.submit(prompt(45), GREEDY, max_tokens=10)
    also = engine.submit(prompt(50), GREEDY, max_tokens=10)
    waits = engine.submit(prompt(6), GREEDY, max_tokens=10)
    for _ in range(4):
        engine.step()
    assert decoded.tokens
    assert not halfway.tokens
    assert engine.waiting == 1
    for request in (decoded, halfway, also, waits, decoded):
        engine.cancel(request)
    engine.step()
    assert [request.finish for request in (decoded, halfway, also, waits)] == ["cancelled"] * 4
    assert engine.running == 1
    assert engine.pages_held == -(-(30 + len(stays.tokens) + 1) // 4)
    count = len(decoded.tokens)
    assert answered(engine, stays) == [expected[2]]
    engine.cancel(stays)
    engine.run()
    assert stays.finish == "length"
    assert len(decoded.tokens) == count
    assert engine.pages_held == engine.pages_idle == 0


@pytest.mark.parametrize("seed", range(3))
def test_whatever_comes_and_goes_ends_and_leaves_nothing(model, seed):
    """Random requests, alike in their beginnings, some cancelled, in a cache that holds less than two of them."""
    draw = random.Random(seed)
    engine, requests = Engine(model, replace(SETTINGS, cache_bytes=18 * PAGE_BYTES)), []
    for _ in range(150):
        if draw.random() < 0.2:
            ids, count = prompt(draw.randrange(1, 45), draw.randrange(2)), draw.randrange(1, 20)
            requests.append(engine.submit(ids, GREEDY, max_tokens=count))
        if requests and draw.random() < 0.05:
            engine.cancel(draw.choice(requests))
        engine.step()
    engine.run()
    assert engine.pages_held == engine.running == engine.waiting == 0
    assert len(requests) > 15
    for request in requests:
        assert (request.finish == "length") == (len(request.tokens) == request.max_tokens)
        again = alone(model, request.prompt, GREEDY, max_tokens=request.max_tokens)
        assert ids_of(request) == again[: len(request.tokens)]


@pytest.mark.parametrize("committed", [False, True])
def test_nothing_is_compiled_after_warming_up(model, committed):
    """Wherever the weights come from: those of `load_model` are committed to their device."""
    other = replace(model, config=replace(model.config, name=f"never compiled {committed}", norm_topk_prob=False))
    if committed:
        other = replace(other, params=jax.device_put(model.params, jax.devices()[0]))
    engine = Engine(other, replace(SETTINGS, shortest_table=32))
    with compilations() as found:
        engine.warm_up()
        assert len(found) >= 2 + 2 * 2  # a piece of a prompt, one request and four, with tables of 8 and 16 pages
        del found[:]
        for again in range(2):
            for ids, how, count in MIX:
                engine.submit(ids, how, max_tokens=count)
                engine.step()
            engine.cancel(engine.submit(prompt(20, again), GREEDY, max_tokens=9))
            engine.submit("def ", Sampling(seed=again), max_tokens=9, stop=["zz"])
            engine.run()
        assert found == []


def test_short_prompts_are_read_together(model, monkeypatch):
    """In one pass, with the answers that each has alone, by programs that are there, also where not all tokens may
    come first, as behind a text."""
    engine, sizes = Engine(model, replace(SETTINGS, prefill_tokens=64, prefix_bytes=0)), []
    engine.warm_up()
    prefill = engine._passes.prefill
    monkeypatch.setattr(engine._passes, "prefill", lambda pieces: sizes.append(len(pieces)) or prefill(pieces))
    asked = ["def ", "class P", prompt(14), prompt(3, 8)]
    with compilations() as found:
        together = answered(engine, *[engine.submit(text, GREEDY, max_tokens=6) for text in asked])
        assert not found and sizes == [4]
        del sizes[:]
        assert together == [answered(engine, engine.submit(text, GREEDY, max_tokens=6))[0] for text in asked]
        assert sizes == [1] * 4
        del sizes[:]
        answered(engine, *[engine.submit(prompt(n), GREEDY, max_tokens=2) for n in (10, 40, 12, 60)])
        # A pass has room for four short pieces or one long one, and a step for 64 tokens in all.
        assert sizes == [1, 1, 1, 1]
    assert not found


def test_the_end_of_the_document(model, likeliest):
    expected = likeliest([5], 8)
    stop = next(i for i in range(1, 8) if expected[i] not in expected[:i])
    ended = replace(model, tokenizer=ending(model.tokenizer, expected[stop]))
    for how in ({"model": ended}, {"model": model, "stop_ids": [expected[stop]]}):
        engine = Engine(how.pop("model"), SETTINGS)
        request = engine.submit([5], GREEDY, max_tokens=20, **how)
        assert answered(engine, request) == [expected[:stop]]
        assert request.finish == "stop"


def test_a_stop_string_may_be_spelled_by_several_tokens(model):
    engine = Engine(model, SETTINGS)
    whole = engine.submit([5], Sampling(seed=1), max_tokens=40)
    engine.run()
    texts = [model.tokenizer.decode([id]) for id in ids_of(whole)]
    # Three whole characters or more, of three tokens.
    at = next(i for i in range(3, 36) if UNKNOWN not in "".join(texts[i : i + 3]))
    stop, pieces = "".join(texts[at : at + 3]), []
    request = engine.submit(
        [5], Sampling(seed=1), max_tokens=40, stop=["never", stop], listener=lambda _, text: pieces.append(text)
    )
    engine.run()
    assert request.text == "".join(pieces) == whole.text[: whole.text.index(stop)]
    assert request.finish == "stop"
    assert len(request.tokens) == at + 3
    assert engine.pages_held == 0


def test_logprobs_are_those_of_the_model(model, full):
    engine = Engine(model, SETTINGS)
    # Settings change what is chosen, not what is told.
    how = Sampling(seed=3, temperature=1.5, top_k=40, repetition_penalty=2.0, logprobs=4)
    first = np.zeros(320, bool)
    first[[17, 44]] = True
    request = engine.submit(prompt(9), how, max_tokens=6, first=first)
    silent = engine.submit(prompt(9), GREEDY, max_tokens=6)
    chosen_only = engine.submit(prompt(9), replace(how, logprobs=0), max_tokens=6, first=first)
    engine.run()
    ids = [*request.prompt, *ids_of(request)]
    values = full(ids).astype(np.float64)
    values -= np.log(np.exp(values).sum(-1, keepdims=True))
    for i, token in enumerate(request.tokens):
        row = values[9 + i - 1]
        assert abs(token.logprob - row[token.id]) < 1e-5
        assert [id for id, _ in token.likeliest] == np.argsort(-row)[:4].tolist()
        np.testing.assert_allclose([value for _, value in token.likeliest], np.sort(row)[::-1][:4], atol=1e-5)
    assert request.tokens[0].id in (17, 44)
    assert all(token.logprob is None and token.likeliest == () for token in silent.tokens)
    assert ids_of(chosen_only) == ids_of(request)
    for token, same in zip(chosen_only.tokens, request.tokens, strict=True):
        assert abs(token.logprob - same.logprob) < 1e-5
        assert token.likeliest == ()


@pytest.mark.parametrize("penalty", [1.7, 0.6])
def test_the_repetition_penalty(model, full, penalty):
    """Against its definition, token by token, over prompt and answer."""
    ids = prompt(12)
    for _ in range(15):
        scores = full(ids)[-1].copy()
        seen = sorted(set(ids))
        scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        ids.append(int(scores.argmax()))
    how = Sampling(temperature=0.0, repetition_penalty=penalty)
    assert alone(model, prompt(12), how, max_tokens=15) == ids[12:]
    assert ids[12:] != alone(model, prompt(12), GREEDY, max_tokens=15)


def test_the_first_token_may_be_confined(model):
    first = np.zeros(320, bool)
    first[[17, 44]] = True
    for seed in range(4):
        token, _ = alone(model, [1, 2], Sampling(seed=seed), max_tokens=2, first=first)
        assert token in (17, 44)


def test_a_prompt_of_text(model):
    engine = Engine(model, SETTINGS)
    request = engine.submit("def add", Sampling(seed=5), max_tokens=20)
    pieces = []
    for text in engine.stream(request):
        pieces.append((len(request.tokens), text))
    assert "".join(text for _, text in pieces) == request.text
    assert pieces[0][0] < len(request.tokens) == 20
    assert request.prompt[0] == model.opening
    spelled = model.tokenizer.decode([*request.prompt[1:], *ids_of(request)])
    assert spelled == "def add" + request.text


def test_the_context_ends_an_answer(model):
    engine = Engine(model, SETTINGS)
    request = engine.submit(prompt(60), GREEDY, max_tokens=100)
    assert len(answered(engine, request)[0]) == 4
    assert request.finish == "length"


def test_a_text_that_is_being_encoded_holds_up_nobody(model, monkeypatch):
    """While one thread encodes a prompt, others submit theirs, and the engine answers them."""
    encode, begun, free, waited = model.tokenizer.encode, threading.Event(), threading.Event(), []

    def slow(texts, **how):
        begun.set()
        waited.append(free.wait(60))
        return encode(texts, **how)

    engine, found = Engine(model, SETTINGS), []
    monkeypatch.setattr(model.tokenizer, "encode", slow)
    thread = threading.Thread(target=lambda: found.append(engine.submit("def add", GREEDY, max_tokens=3, stop_ids=[])))
    thread.start()
    assert begun.wait(60)
    (tokens,) = answered(engine, engine.submit(prompt(5), GREEDY, max_tokens=3, stop_ids=[]))
    free.set()
    thread.join()
    assert waited == [True]
    assert len(tokens) == 3 == len(answered(engine, *found)[0])


def test_other_threads_may_submit_and_cancel(model, expected):
    engine, stop = Engine(model, SETTINGS), threading.Event()

    def drive():
        while not stop.is_set() or engine.has_work:
            engine.step()

    def ask(ids, how, count):
        done = threading.Event()
        arguments = {"max_tokens": count, "listener": lambda request, _: request.finish and done.set()}
        requests[threading.get_ident()] = found = engine.submit(ids, how, **arguments)
        victim = engine.submit(prompt(20, count), GREEDY, max_tokens=40)
        assert done.wait(60)
        engine.cancel(victim)
        answers.append((ids, how, ids_of(found)))

    requests, answers = {}, []
    driver = threading.Thread(target=drive)
    others = [threading.Thread(target=ask, args=one) for one in MIX]
    for thread in (driver, *others):
        thread.start()
    for thread in others:
        thread.join()
    stop.set()
    driver.join()
    assert len(answers) == len(MIX)
    for (ids, how, _), tokens in zip(MIX, expected, strict=True):
        assert (ids, how, tokens) in answers
    assert engine.pages_held == 0


@pytest.mark.parametrize("cache_format", ["compute", "fp8"])
def test_pages_on_disk_outlive_the_engine(model, tmp_path, caplog, cache_format):
    settings = replace(SETTINGS, disk=str(tmp_path), cache_format=cache_format)
    engine = Engine(model, settings)
    expected = answered(engine, engine.submit(prompt(30), GREEDY, max_tokens=6))
    engine.close()

    later = Engine(model, settings)
    request = later.submit(prompt(30), GREEDY, max_tokens=6)
    assert answered(later, request) == expected
    assert (request.cached_tokens, later.prefix.found_in_tier) == (28, 28)

    (folder,) = tmp_path.iterdir()
    files = sorted(folder.iterdir())
    pages = [file.read_bytes() for file in files]
    for file, page in zip(files, pages[1:] + pages[:1], strict=True):
        file.write_bytes(page)
    confused = Engine(model, settings)
    request = confused.submit(prompt(30), GREEDY, max_tokens=6)
    assert answered(confused, request) == expected
    assert request.cached_tokens == 0

    for file in files:
        file.write_bytes(file.read_bytes()[:40])
    spoilt = Engine(model, settings)
    request = spoilt.submit(prompt(30), GREEDY, max_tokens=6)
    assert answered(spoilt, request) == expected
    assert request.cached_tokens == 0
    assert "cannot be read" in caplog.text

    other = replace(model, params=jax.tree.map(lambda leaf: leaf * 1.5, model.params))
    Engine(other, settings)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("ids", "how", "message"),
    [
        ([], {}, "the prompt has no tokens"),
        ([3, 320], {}, "token 320 must be below model.vocab_size = 320"),
        ([3], {"max_tokens": 0}, "max_tokens = 0: must be at least 1"),
        ([3] * 64, {}, "the prompt has 64 tokens: must be below the 64 of the context"),
        ([3] * 30, {"max_tokens": 20}, "may have 50 tokens: must be at most the 44 that the cache"),
        ([3], {"stop": [""]}, "stop = ''"),
    ],
)
def test_errors_of_a_request(model, ids, how, message):
    engine = Engine(model, replace(SETTINGS, cache_bytes=12 * PAGE_BYTES))
    with pytest.raises(ValueError, match=message):
        engine.submit(ids, GREEDY, **{"max_tokens": 5} | how)
    assert not engine.has_work


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"slots": 0}, "slots = 0: must be at least 1"),
        ({"page_size": 12}, "page_size = 12: must be a power of two"),
        ({"prefill_tokens": 8}, "prefill_tokens = 8: must be at least 16"),
        ({"prefix_bytes": -1}, "prefix_bytes = -1"),
        ({"prefix_bytes": 0, "disk": "pages"}, "disk = 'pages': needs a prefix cache"),
        ({"cache_bytes": 1}, "cache_bytes = 1: must be at least"),
    ],
)
def test_errors_of_settings(model, how, message):
    with pytest.raises(ValueError, match=message):
        Engine(model, EngineSettings(**how))
