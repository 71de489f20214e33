"""Engines on units of several devices, beside one on a single device."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from engines import MIX, SETTINGS, answered, compilations, ids_of, prompt

from dsjax.inference import forward, passes
from dsjax.inference.engine import Engine
from dsjax.inference.fingerprint import fingerprint
from dsjax.inference.layout import Layout
from dsjax.inference.load import Model
from dsjax.inference.sampling import Sampling
from dsjax.runtime import Runtime

UNIT = replace(SETTINGS, slots=8, context=96, shortest_table=96)
PREFILL = Layout(node=2, data=2, tensor=2, slots=2, micro_batches=2)
DECODE = Layout(node=4, tensor=2, slots=2, shared_as_routed=True, replicas="balanced", micro_batches=2)
LAYOUTS = {
    "groups of one": (Layout(node=2, data=4), 0),
    "one group": (Layout(tensor=4), 0),
    "one group, speculating": (Layout(tensor=4), 1),
    "prefill, scaled down": (PREFILL, 0),
    "decode, scaled down": (DECODE, 0),
    "decode, scaled down, speculating": (DECODE, 2),
}


@pytest.fixture(scope="module")
def model(small, random_parameters, tokenizer):
    config = replace(small, num_nextn_predict_layers=1)
    params, biases = random_parameters(config)
    return Model(config, Runtime(), params, biases, tokenizer, opening=0, context=96, origin="")


@pytest.fixture(scope="module", autouse=True)
def turns():
    """With two micro-batches the three MoE layers are a loop of turns of two, and one behind it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "MOST_LAYERS", 2)
        yield


def submitted(engine):
    return [engine.submit(ids, how, max_tokens=count, stop_ids=[]) for ids, how, count in MIX]


@pytest.fixture(scope="module")
def alone(model):
    engine = Engine(model, UNIT)
    return answered(engine, *submitted(engine))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "decode, scaled down" else pytest.mark.slow) for name in LAYOUTS],
)
def test_answers_are_those_of_one_device(model, alone, name):
    """In float32, whatever is sampled, and when requests come; with two micro-batches, replicas, speculation."""
    layout, speculate = LAYOUTS[name]
    engine = Engine(model.on_unit(layout), replace(UNIT, speculate=speculate))
    early = submitted(engine)
    engine.step()
    assert answered(engine, *early, *submitted(engine)) == [*alone, *alone]


@pytest.mark.slow
@pytest.mark.parametrize("replicas", ["even", "balanced"])
def test_experts_follow_the_loads_while_the_model_answers(model, alone, replicas, monkeypatch):
    """Answers stay as they are, nothing is compiled, and devices become more equal."""
    monkeypatch.setattr(passes, "COUNTED_STEPS", 3)
    layout = replace(DECODE, replicas=replicas, micro_batches=1, rebalance=6)
    engine = Engine(model.on_unit(layout), UNIT)
    engine.warm_up()
    first = engine.rebalancer.placement
    with compilations() as compiled:
        for _ in range(3):
            assert answered(engine, *submitted(engine)) == alone
        for text in ("def add", "class P"):  # whose first token is not free
            engine.submit(text, max_tokens=4)
        engine.run()
    assert not compiled and engine.rebalancer.moved > 0
    loads = engine.rebalancer.loads.average
    assert engine.rebalancer.placement.imbalance(loads).mean() < first.imbalance(loads).mean()
    # The shared expert has as much as all others of a token together.
    np.testing.assert_allclose(loads[:, -1], loads[:, :-1].sum(axis=1) / model.config.num_experts_per_tok)
    engine.close()


@pytest.mark.slow
def test_padding_goes_to_no_expert(model, monkeypatch):
    """Every token that is read is counted once for each of its experts, and nothing else is."""
    monkeypatch.setattr(passes, "COUNTED_STEPS", 1)
    engine = Engine(model.on_unit(replace(DECODE, rebalance=10_000)), UNIT)
    seen, decode, read = [], engine._passes.decode, []
    monkeypatch.setattr(engine.rebalancer, "observe", seen.append)
    monkeypatch.setattr(engine._passes, "decode", lambda rows: read.append(len(rows)) or decode(rows))
    answered(engine, *submitted(engine))
    for _ in range(2):  # the last loads are looked at a step later
        engine.step()
    tokens = sum(read) + engine.counts.prompt_tokens_read
    assert [int(n) for n in sum(seen)[:, -1]] == [tokens] * 3
    engine.close()


@pytest.mark.slow
def test_groups_have_prefixes_of_their_own_and_share_those_on_disk(model, tmp_path):
    settings = replace(UNIT, slots=4)
    layout, how = Layout(node=4), Sampling(temperature=0.0)
    engine = Engine(model.on_unit(layout), settings)

    def answer(*numbers):
        requests = [engine.submit(prompt(33, n), how, max_tokens=4, stop_ids=[]) for n in numbers]
        engine.run()
        return requests

    answer(3)
    (again,) = answer(3)
    assert again.cached_tokens == 32  # the group that knows most has it, though others are as free
    both = answer(3, 3)
    assert sorted(request.cached_tokens for request in both) == [0, 32]
    settings = replace(settings, disk=str(tmp_path))
    engine = Engine(model.on_unit(layout), settings)
    answer(3)
    engine.close()
    engine = Engine(model.on_unit(layout), settings)
    assert [request.cached_tokens for request in answer(3, 3)] == [32, 32]
    assert ids_of(again) == ids_of(answer(3)[0])
    assert engine.prefix.found_in_tier >= 64


def test_units_of_one_model_know_each_other(model):
    """However they divide it; and one expert of another model is enough for another name."""
    experts = model.params["moe"]["moe"]["experts"]
    changed = experts | {"down": experts["down"].at[1, 5, 0, 0].add(1)}
    params = model.params | {"moe": model.params["moe"] | {"moe": model.params["moe"]["moe"] | {"experts": changed}}}
    names = [
        [fingerprint(unit, 4, "compute") for unit in (each, *(each.on_unit(layout) for layout in (PREFILL, DECODE)))]
        for each in (model, replace(model, params=params))
    ]
    assert [len(set(found)) for found in names] == [1, 1]
    assert names[0] != names[1]


@pytest.mark.slow
def test_pages_pass_from_a_unit_that_reads_to_one_that_writes_and_back(model, tmp_path):
    settings, how = replace(UNIT, disk=str(tmp_path)), Sampling(temperature=0.0)
    reader, writer = (Engine(model.on_unit(layout), settings) for layout in (PREFILL, DECODE))
    whole = Engine(model, UNIT)
    request = whole.submit(prompt(40), how, max_tokens=20, stop_ids=[])
    whole.run()
    ids, answer = request.prompt, ids_of(request)

    def found(unit, ids, count):
        request = unit.submit(ids, how, max_tokens=count, stop_ids=[])
        unit.run()
        for pool in unit._groups.pools:
            pool._tier.flush()
        return request.cached_tokens, ids_of(request)

    assert found(reader, ids, 1) == (0, answer[:1])
    assert found(writer, ids, 20) == (36, answer)
    assert found(reader, [*ids, *answer[:18]], 2) == (56, answer[18:])


@pytest.mark.slow
def test_requests_are_preempted_within_their_group(model, alone):
    """Each group's cache holds less than its requests need at the same time."""
    pages = 16
    unit = model.on_unit(Layout(node=2))
    page_bytes = Engine(unit, UNIT)._passes.page_bytes
    engine = Engine(unit, replace(UNIT, cache_bytes=pages * page_bytes))
    requests = [submitted(engine) for _ in range(2)]
    assert answered(engine, *requests[0], *requests[1]) == [*alone, *alone]
    assert engine.counts.preemptions > 0


def test_what_a_unit_cannot_have(model):
    with pytest.raises(ValueError, match=r"layout.tensor = 3: must divide model.num_attention_heads = 4"):
        model.on_unit(Layout(tensor=3))
    with pytest.raises(ValueError, match=r"engine.slots = 6: must be a multiple of layout.node x layout.data = 4"):
        Engine(model.on_unit(Layout(node=4)), replace(UNIT, slots=6))
    with pytest.raises(ValueError, match=r"= 16 x 1 x 1 = 16 devices: there are 8"):
        model.on_unit(Layout(node=16))


def test_a_device_has_its_share_alone(model):
    """Of experts, heads and the vocabulary; and of the cache that of its group."""
    unit = model.on_unit(Layout(node=2, tensor=4))
    weights = unit.params
    shard = {
        name: leaf.addressable_shards[0].data.shape
        for name, leaf in {
            "experts": weights["moe"]["moe"]["experts"]["down"],
            "queries": weights["moe"]["attention"]["q_b"],
            "head": weights["head"],
            "router": weights["moe"]["moe"]["router"],
        }.items()
    }
    assert shard == {"experts": (3, 1, 32, 16), "queries": (3, 14, 16), "head": (80, 32), "router": (3, 8, 32)}
    state = Engine(unit, UNIT)._passes._state
    (entries,) = state.cache.arrays.values()
    assert entries.addressable_shards[0].data.shape[1] * 2 == entries.shape[1]
    assert len(jax.devices()) == 8
