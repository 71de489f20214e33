"""Speculation changes how soon an answer comes, and nothing else; drafts are what MTP modules were trained to say."""

import itertools
import random
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import GREEDY, MIX, SETTINGS, answered, compilations, ending, ids_of, prompt, reference
from scipy.stats import chisquare

from dsjax.inference.cache import empty_cache, write, write_states
from dsjax.inference.engine import Engine
from dsjax.inference.forward import Batch, forward
from dsjax.inference.load import Model
from dsjax.inference.machine import Machine
from dsjax.inference.programs import State
from dsjax.inference.sampling import Sampling, choice
from dsjax.inference.settings import EngineSettings
from dsjax.inference.speculation import draft, prefill_and_draft, verify_and_draft
from dsjax.model.block import block_function
from dsjax.model.context import context
from dsjax.model.mtp import mtp
from dsjax.model.transformer import bias_of, hidden_states, logits
from dsjax.runtime import Runtime

PAGE = 4


def scaled(params, main, modules):
    """Parameters of a model that looks at its last token alone, and of MTP modules that know what it will say.

    Args:
        main: share of the main layers that is left, with which it says something else now and then.
        modules: likewise, of the modules.
    """

    def outputs(group, share):
        def one(path, leaf):
            return leaf * share if path[-1].key in ("o", "down") else leaf

        return jax.tree_util.tree_map_with_path(one, group)

    embed = params["embed"] / jnp.linalg.norm(params["embed"], axis=1, keepdims=True)
    vocab_size, width = embed.shape
    follower = (5 * jnp.arange(vocab_size) + 3) % vocab_size
    changed = {"embed": embed, "head": jnp.zeros_like(embed).at[follower].set(1.5 * embed)}
    for name in ("dense", "moe"):
        changed[name] = outputs(params[name], main)
    proj = jnp.broadcast_to(jnp.eye(width, 2 * width), params["mtp"]["proj"].shape)
    return params | changed | {"mtp": outputs(params["mtp"], modules) | {"proj": proj}}


@pytest.fixture(scope="module")
def models(small, random_parameters, tokenizer):
    """Models by how good their drafts are; those of one number of modules share their programs."""
    found = {}
    for modules in (1, 2):
        config = replace(small, num_nextn_predict_layers=modules)
        params, biases = random_parameters(config)
        kinds = {
            "random": params,
            "right": scaled(params, 0.0, 0.0),
            "often right": scaled(params, 0.4, 0.1),
            "broken": params | {"mtp": jax.tree.map(lambda leaf: leaf * jnp.nan, params["mtp"])},
        }
        for kind, weights in kinds.items():
            found[kind, modules] = Model(
                config, Runtime(), weights, biases, ending(tokenizer, -1), opening=0, context=64, origin=""
            )
    return found


@pytest.fixture(scope="module")
def plainly(models):
    """What a model answers to the mix without drafts; engines as they are set as a rule."""
    known = {}

    def answers(kind):
        # The main model does not depend on how many modules there are, but for the random numbers drawn.
        if kind not in known:
            engine = Engine(models[kind], SETTINGS)
            requests = [engine.submit(ids, how, max_tokens=count) for ids, how, count in MIX]
            engine.run()
            known[kind] = requests
        return known[kind]

    return answers


def some_tokens(batch=2, length=24):
    return jax.random.randint(jax.random.key(1), (batch, length), 0, 320)


def trained_for(model, tokens, length, number):
    """The logits of drafts behind the first `length` tokens, by forward passes of training over all of them.

    Beyond the modules that there are, the last one is given its own states in place of those of the level below.
    """
    config, runtime = model.config, model.runtime
    how = {"config": config, "runtime": runtime}
    params, biases = model.params, model.biases
    ctx = context(config, tokens.shape[1])
    state, _ = hidden_states(params, biases, params["embed"][tokens], ctx, **how)
    found, modules = [], config.num_nextn_predict_layers

    def run(k, state):
        own, bias = jax.tree.map(lambda leaf: leaf[k], (params["mtp"], biases["mtp"]))
        ahead = params["embed"][jnp.roll(tokens, -k - 1, axis=1)]
        layer_ctx = ctx.for_layer(bias_of(bias["block"]))
        return mtp(own, state, ahead, layer_ctx, block_function(config, runtime), config=config)[0]

    for k in range(modules):
        below, state = state, run(k, state)
        found.append(logits(params, state[:, length - 1]))
    for at in range(length, length + number - modules):
        below = below.at[:, at].set(state[:, at - 1])
        state = run(modules - 1, below)
        found.append(logits(params, state[:, at]))
    return found


@pytest.mark.parametrize("modules", [1, 2])
@pytest.mark.parametrize("expanded", [False, True], ids=["absorbed", "expanded"])
def test_drafts_are_what_the_modules_were_trained_for(models, modules, expanded, monkeypatch):
    """For tokens read in pieces that end anywhere, beside another sequence, on dirty pages."""
    monkeypatch.setattr("dsjax.inference.forward.is_expansion_cheaper", lambda *_: expanded)
    model, tokens, number = models["random", modules], some_tokens(), 3
    how = {"config": model.config, "runtime": Machine.of(model.runtime)}
    tables = jnp.asarray(np.random.default_rng(0).permutation(np.arange(1, 32))[:12].reshape(2, 6), jnp.int32)

    @jax.jit
    def read(cache, lengths, piece, counts):
        batch, told = Batch(jnp.arange(2), tables, lengths, choice([GREEDY] * 2)), []

        def pick(scores, places, drafts):
            assert len(drafts) == len(told)
            told.append(scores)
            return tokens[jnp.arange(2), places]

        weights = model.params, model.biases, cache, batch
        main = forward(*weights, piece[:, :-1], counts, **how)
        _, entries, states = draft(*weights, piece, counts, main.hidden, pick, number, **how)
        where = tables, lengths, counts
        cache = write(cache, jnp.concatenate([main.entries, entries]), *where)
        return told, write_states(cache, states, *where)

    cache, lengths = empty_cache(model.config, 32, PAGE, jnp.float32), np.zeros(2, int)
    cache = jax.tree.map(lambda array: jnp.full_like(array, jnp.nan), cache)
    for counts in ((1, 3), (1, 8), (5, 1), (1, 4), (8, 1), (2, 2)):
        piece = np.full((2, 9), 7)
        for row, count in enumerate(counts):
            piece[row, : count + 1] = tokens[row, lengths[row] :][: count + 1]
        told, cache = read(cache, jnp.asarray(lengths, jnp.int32), jnp.asarray(piece), jnp.asarray(counts, jnp.int32))
        lengths += counts
        for row, length in enumerate(lengths):
            expected = trained_for(model, tokens, int(length), number)
            for found, right in zip(told, expected, strict=True):
                np.testing.assert_allclose(found[row], right[row], rtol=0, atol=2e-5)


CASES = [
    ("random", 1, 1, {}),
    ("broken", 1, 1, {}),
    ("right", 1, 1, {}),
    ("often right", 1, 1, {}),
    ("often right", 1, 1, {"prefix_bytes": 0}),
    ("often right", 2, 1, {}),
    ("often right", 1, 3, {}),
    ("often right", 2, 3, {}),
    pytest.param("often right", 1, 3, {"slots": 1}, marks=pytest.mark.slow),
    pytest.param("often right", 2, 2, {"page_size": 16, "prefill_tokens": 64}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "modules", "speculate", "other"), CASES)
def test_answers_are_those_of_plain_decoding(models, plainly, kind, modules, speculate, other):
    """Greedy or not, with penalties and log-probabilities, in pieces, and again from the prefix cache."""
    expected = plainly((kind, modules))
    engine = Engine(models[kind, modules], replace(SETTINGS, speculate=speculate, **other))
    for _ in range(2):
        requests = []
        for ids, how, count in reversed(MIX):
            requests.insert(0, engine.submit(ids, how, max_tokens=count))
            engine.step()
        assert answered(engine, *requests) == [ids_of(request) for request in expected]
        assert [request.text for request in requests] == [request.text for request in expected]
        for request, same in zip(requests, expected, strict=True):
            for token, other in zip(request.tokens, same.tokens, strict=True):
                assert [id for id, _ in token.likeliest] == [id for id, _ in other.likeliest]
                told = [value for one in (token, other) for value in (one.logprob or 0, *dict(one.likeliest).values())]
                np.testing.assert_allclose(*np.split(np.array(told), 2), atol=1e-5)
    counts = engine.counts
    assert counts.drafted > 100 * (speculate > 1)
    assert counts.accepted == sum(counts.accepted_at)
    # What is drawn with the same noise from flat distributions is often alike.
    shares = {"broken": (0, 0.05), "random": (0, 0.4), "often right": (0.1, 0.95), "right": (1, 1)}
    assert shares[kind][0] <= counts.acceptance <= shares[kind][1]


def tight(model):
    """Settings of an engine whose cache has room for the longest request and no page more."""
    settings = replace(SETTINGS, speculate=3)
    return replace(settings, cache_bytes=17 * Engine(model, settings)._passes.page_bytes)


def test_after_a_preemption_the_answer_goes_on(models, plainly):
    model = models["often right", 1]
    engine = Engine(model, tight(model))
    requests = [engine.submit(ids, how, max_tokens=count) for ids, how, count in MIX]
    assert answered(engine, *requests) == [ids_of(request) for request in plainly(("often right", 1))]
    assert engine.counts.preemptions > 0
    assert requests[0].preemptions == 0


def test_right_drafts_are_all_accepted(models):
    engine = Engine(models["right", 1], replace(SETTINGS, speculate=3))
    for how in (GREEDY, Sampling(seed=5), Sampling(seed=6, temperature=0.8, top_p=0.9, repetition_penalty=1.2)):
        before = replace(engine.counts, accepted_at=list(engine.counts.accepted_at))
        (tokens,) = answered(engine, engine.submit(prompt(9), how, max_tokens=12))
        assert len(tokens) == 12
        # The prompt gives one token; then 4, 4 and 3, and the last step needs no more than two drafts.
        assert engine.counts.drafted - before.drafted == engine.counts.accepted - before.accepted == 3 + 3 + 2
        assert np.subtract(engine.counts.accepted_at, before.accepted_at).tolist() == [3, 3, 2]
    assert engine.counts.acceptance == 1


def test_a_penalty_is_also_for_accepted_drafts(models):
    """After 6 comes 7, and then 8 again and again, unless that is made unlikely by the draft of the first 8."""
    model = models["right", 1]
    embed, token = model.params["embed"], jnp.arange(320)
    head = jnp.zeros_like(embed).at[jnp.where(token % 3 == 2, token, token + 1)].add(1.5 * embed)
    model = replace(model, params=model.params | {"head": head})
    for penalty in (1.0, 3.0):
        how = Sampling(temperature=0.0, repetition_penalty=penalty)
        engines = [Engine(model, replace(SETTINGS, speculate=speculate)) for speculate in (0, 3)]
        answers = [answered(engine, engine.submit([6], how, max_tokens=20))[0] for engine in engines]
        assert answers[0] == answers[1]
        assert answers[0][:2] == [7, 8]
        assert (answers[0][2] == 8) == (penalty == 1)
        assert engines[1].counts.acceptance == 1


def test_counts_of_drafts(models):
    engine = Engine(models["often right", 1], replace(SETTINGS, speculate=1))
    requests = [engine.submit(ids, how, max_tokens=count) for ids, how, count in MIX]
    engine.run()
    # The prompt gives an answer's first token; each further step one, and one for an accepted draft.
    steps = sum(len(request.tokens) - 1 for request in requests) - engine.counts.accepted
    assert steps - len(requests) <= engine.counts.drafted <= steps
    assert engine.counts.accepted_at == [engine.counts.accepted]
    assert 0 < engine.counts.acceptance == engine.counts.accepted / engine.counts.drafted < 1


def test_what_pages_hold_is_a_matter_of_their_tokens_alone(models):
    """A prompt that is read at once leaves the pages that speculation leaves, those of the modules too."""
    model, settings = models["often right", 2], replace(SETTINGS, speculate=3)
    wrote, read = Engine(model, settings), Engine(model, settings)
    requests = [wrote.submit(prompt(10, i), Sampling(seed=i), max_tokens=45) for i in range(3)]
    wrote.run()
    for request in requests:
        read.submit([*request.prompt, *ids_of(request)], GREEDY, max_tokens=1)
    read.run()
    pages = [engine._groups.pools[0]._pages for engine in (wrote, read)]
    shared = pages[0].keys() & pages[1].keys()
    assert len(shared) == 3 * 13
    for digest in shared:
        contents = [engine._passes.read_page(0, engine._groups.pools[0]._pages[digest]) for engine in (wrote, read)]
        assert contents[0]["entries"].shape[0] == 4 + 2
        for name in ("entries", "states"):
            # What a module has of the very first tokens is of no account.
            one, other = (content[name] for content in contents)
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-4)


def test_an_answer_ends_in_the_middle_of_accepted_drafts(models):
    model = models["right", 1]
    plain = Engine(model, SETTINGS)
    whole = plain.submit([7], GREEDY, max_tokens=24)
    plain.run()
    for at in range(4, 12):
        how = {"stop_ids": [whole.tokens[at].id]}, {"stop": [model.tokenizer.decode([whole.tokens[at].id])]}
        for stop in how:
            expected = plain.submit([7], GREEDY, max_tokens=24, **stop)
            plain.run()
            engine = Engine(model, replace(SETTINGS, speculate=3))
            found = engine.submit([7], GREEDY, max_tokens=24, **stop)
            assert answered(engine, found) == [ids_of(expected)]
            assert (found.text, found.finish) == (expected.text, expected.finish)
            # What is known of its pages afterwards holds.
            longer = [7, *ids_of(found), 9, 4]
            again = [one.submit(longer, GREEDY, max_tokens=5) for one in (engine, plain)]
            plain.run()
            assert answered(engine, again[0]) == [ids_of(again[1])]


@pytest.mark.parametrize("kind", ["right", "often right"])
def test_the_context_and_the_allowance_end_an_answer(models, kind):
    model = models[kind, 1]
    engines = [Engine(model, settings) for settings in (SETTINGS, tight(model))]
    for ids, most in ((prompt(60), 100), (prompt(63), 9), *((prompt(6), most) for most in range(1, 7))):
        answers = [answered(engine, engine.submit(ids, GREEDY, max_tokens=most)) for engine in engines]
        assert answers[0] == answers[1]
        assert len(answers[0][0]) == min(most, 64 - len(ids))


def test_whatever_comes_and_goes_ends_and_leaves_nothing(models):
    model, draw = models["often right", 1], random.Random(0)
    engine, requests = Engine(model, tight(model)), []
    plain = Engine(model, SETTINGS)
    for _ in range(120):
        if draw.random() < 0.25:
            ids, count = prompt(draw.randrange(1, 45), draw.randrange(2)), draw.randrange(1, 20)
            requests.append(engine.submit(ids, Sampling(seed=count), max_tokens=count))
        if requests and draw.random() < 0.05:
            engine.cancel(draw.choice(requests))
        engine.step()
    engine.run()
    assert engine.pages_held == engine.running == engine.waiting == 0
    assert len(requests) > 15
    assert engine.counts.preemptions > 0
    for request in requests:
        assert (request.finish == "length") == (len(request.tokens) == request.max_tokens)
        again = plain.submit(request.prompt, request.sampling, max_tokens=request.max_tokens)
        assert ids_of(request) == answered(plain, again)[0][: len(request.tokens)]


@pytest.mark.parametrize("speculate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_nothing_is_compiled_after_warming_up(models, speculate):
    model = models["often right", 1]
    other = replace(model, config=replace(model.config, name=f"never compiled with {speculate}", norm_topk_prob=False))
    engine = Engine(other, replace(SETTINGS, shortest_table=32, speculate=speculate))
    with compilations() as found:
        engine.warm_up()
        assert len(found) >= 2 + 2 * 2
        del found[:]
        for again in range(2):
            for ids, how, count in MIX:
                engine.submit(ids, how, max_tokens=count)
                engine.step()
            engine.cancel(engine.submit(prompt(20, again), GREEDY, max_tokens=9))
            engine.submit("def ", Sampling(seed=again), max_tokens=9, stop=["zz"])
            engine.run()
        assert found == []


def state_of(config, slots, pages, drafts):
    cache = empty_cache(config, pages, PAGE, jnp.float32)
    seen = jnp.zeros((slots, config.vocab_size), bool)
    return State(cache, jnp.zeros(slots, int), seen, jnp.zeros(slots, int), jnp.zeros((slots, drafts), int))


@pytest.mark.parametrize("how", [{}, {"temperature": 0.6, "top_p": 0.8}], ids=["plain", "cut"])
@pytest.mark.parametrize("speculate", [1, 2])
def test_the_distribution_of_answers(small, random_parameters, how, speculate):
    """Of their first three tokens together, by a chi-squared test at fixed seeds against exact probabilities."""
    vocab_size, rows, ids = 6, 4096, [1, 4, 2]
    config = replace(small, vocab_size=vocab_size, num_nextn_predict_layers=1)
    params, biases = random_parameters(config, 1)
    params["embed"] *= 5
    shared = {"config": config, "runtime": Machine()}

    prefixes = [(*ids, *more) for length in range(3) for more in itertools.product(range(vocab_size), repeat=length)]
    padded = jnp.asarray([[*prefix, *[0] * (5 - len(prefix))] for prefix in prefixes])
    hidden, _ = jax.jit(partial(hidden_states, **shared))(params, biases, params["embed"][padded], context(config, 5))
    scores = logits(params, hidden)
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | how
    next_of = {p: reference(scores[i, len(p) - 1], **settings) for i, p in enumerate(prefixes)}
    expected = np.zeros((vocab_size,) * 3)
    for answer in itertools.product(range(vocab_size), repeat=3):
        expected[answer] = np.prod([next_of[*ids, *answer[:i]][answer[i]] for i in range(3)])

    asked = choice([Sampling(seed=seed, **how) for seed in range(rows)])
    tables, lengths = 1 + jnp.arange(rows * 4).reshape(rows, 4), jnp.zeros(rows, int)
    batch = Batch(jnp.arange(rows), tables, lengths, jax.tree.map(jnp.asarray, asked), jnp.full(rows, 3 + 6))
    state = state_of(config, rows, 1 + 4 * rows, speculate)
    tokens, counts = jnp.tile(jnp.asarray(ids), (rows, 1)), jnp.full(rows, 3)
    everything, last = jnp.ones((1, vocab_size), bool), jnp.ones(rows, bool)
    drawn, state = prefill_and_draft(params, biases, state, batch, tokens, counts, everything, last, **shared)
    answers = [[token] for token in drawn.tokens.tolist()]
    accepted = 0
    for _ in range(2):
        verified, state = verify_and_draft(params, biases, state, batch, **shared)
        for row, (found, count) in enumerate(
            zip(*jax.device_get((verified.drawn.tokens, verified.taken)), strict=True)
        ):
            answers[row] += found[:count].tolist()
            accepted += count - 1
    assert 0.05 < accepted / (2 * rows) < 0.9 * speculate  # both ways are taken

    found = np.zeros_like(expected)
    np.add.at(found, tuple(np.array([answer[:3] for answer in answers]).T), 1)
    assert not found[expected == 0].any()
    likely = rows * expected >= 5
    cells = [np.append(table[likely], table[~likely].sum()) for table in (found, rows * expected)]
    assert likely.sum() > 20
    assert chisquare(*(cell[cells[1] > 0] for cell in cells)).pvalue > 1e-3


def test_wrong_drafts_leave_nothing_behind(models):
    """Neither in the cache nor among the tokens that were seen, and what lies behind a sequence does not matter."""
    model = models["often right", 1]
    how, ids = {"config": model.config, "runtime": Machine.of(model.runtime)}, prompt(5)
    choices = jax.tree.map(jnp.asarray, choice([Sampling(seed=3, repetition_penalty=1.2)]))
    batch = Batch(jnp.arange(1), 3 + jnp.arange(16)[None], jnp.zeros(1, int), choices, jnp.array([60]))
    answers = []
    for fill in (0, jnp.nan):
        state = state_of(model.config, 2, 20, 3)
        state = state._replace(cache=jax.tree.map(lambda array, fill=fill: jnp.full_like(array, fill), state.cache))
        rest = jnp.array([5]), jnp.ones((1, 320), bool), jnp.array([True])
        drawn, state = prefill_and_draft(model.params, model.biases, state, batch, jnp.array([ids]), *rest, **how)
        answers.append(drawn.tokens.tolist())
        wrong = 0
        for _ in range(8):
            verified, state = verify_and_draft(model.params, model.biases, state, batch, **how)
            answers[-1] += verified.drawn.tokens[0, : int(verified.taken[0])].tolist()
            wrong += int(verified.drafted[0] - verified.taken[0] + 1)
            length = int(state.lengths[0])
            assert length == 5 + len(answers[-1]) - 1
            entries = state.cache.arrays["entries"][:, 3:19].reshape(5, 64, -1)
            assert jnp.isfinite(entries[:, :length]).all()
            assert jnp.array_equal(entries[:, length:], jnp.full_like(entries[:, length:], fill), equal_nan=True)
            assert set(jnp.flatnonzero(state.seen[0]).tolist()) == set(answers[-1])
        assert wrong > 5
    assert answers[0] == answers[1]


def test_a_step_touches_the_pages_of_its_requests_only(models):
    """XLA takes little temporary memory, and so copies none of the cache's arrays, of which the smallest is 8 MB."""
    model = models["random", 1]

    def temporary(program, *rest):
        batch = Batch(jnp.arange(2), jnp.ones((2, 8), int), jnp.zeros(2, int), choice([GREEDY] * 2), jnp.zeros(2, int))
        shapes = jax.eval_shape(lambda: state_of(model.config, 3, 64_000, 2))
        how = {"config": model.config, "runtime": Machine.of(model.runtime)}
        compiled = program.alone.lower(model.params, model.biases, shapes, batch, *rest, **how).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    piece = jnp.ones((2, 16), int), jnp.ones(2, int), jnp.ones((1, 320), bool), jnp.ones(2, bool)
    assert max(temporary(verify_and_draft), temporary(prefill_and_draft, *piece)) < 2**20


@pytest.mark.parametrize("cache_format", ["compute", pytest.param("fp8", marks=pytest.mark.slow)])
def test_pages_on_disk_keep_what_modules_need(models, tmp_path, cache_format):
    settings = replace(SETTINGS, disk=str(tmp_path), cache_format=cache_format, speculate=2)
    counts = []
    for cached in (0, 28):
        engine = Engine(models["often right", 1], settings)
        request = engine.submit(prompt(30), GREEDY, max_tokens=30)
        tokens = answered(engine, request)
        engine.close()
        assert request.cached_tokens == cached
        counts.append((tokens, engine.counts.drafted, engine.counts.accepted))
    assert counts[0] == counts[1]
    # Pages without what modules know are others.
    without = Engine(models["often right", 1], replace(settings, speculate=0))
    assert without.submit(prompt(30), GREEDY, max_tokens=1).cached_tokens == 0
    without.run()
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_to_draft_with(models):
    model = models["random", 1].with_modules(0)
    with pytest.raises(ValueError, match="speculate = 2: must be 0, because the model has no MTP modules"):
        Engine(model, replace(SETTINGS, speculate=2))
    with pytest.raises(ValueError, match="speculate = -1: must be at least 0"):
        EngineSettings(speculate=-1)
