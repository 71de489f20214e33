"""Greedy answers are transformers', on torch, of the same weights: `tests/golden/greedy.json`.

`tests/oracle/make_greedy.py` made it.
"""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from dsjax.checkpoint.huggingface import load_huggingface
from dsjax.inference.engine import Engine
from dsjax.inference.load import Model
from dsjax.inference.sampling import Sampling
from dsjax.inference.settings import EngineSettings
from dsjax.model.layout import stack
from dsjax.runtime import Runtime

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "greedy.json").read_text())
NEAR = 1e-3
"""Scores that are nearer than this may change places."""


@pytest.mark.parametrize("variant", CASES)
def test_greedy_answers_are_those_of_transformers(variant, tokenizer):
    config, params, biases = load_huggingface(GOLDEN / variant / "hf")
    params, biases = stack(params, config), stack(biases, config)
    model = Model(config, Runtime(), params, biases, tokenizer, opening=0, context=128, origin="")
    # All together; prompts of 70 tokens are read in three pieces, the beginning of one is known from another.
    engine = Engine(model, EngineSettings(slots=8, page_size=4, prefill_tokens=32))
    rows, requests = load_file(GOLDEN / variant / "golden.safetensors")["input_ids"], []
    for case in CASES[variant]:
        how = Sampling(temperature=0.0, repetition_penalty=case["repetition_penalty"])
        ids = rows[case["row"], : case["length"]].tolist()
        requests.append(engine.submit(ids, how, max_tokens=len(case["ids"]), stop_ids=[]))
    engine.run()
    compared = 0
    for case, request in zip(CASES[variant], requests, strict=True):
        near = [margin < NEAR for margin in case["margins"]]
        certain = near.index(True) if True in near else len(near)
        assert [token.id for token in request.tokens][:certain] == case["ids"][:certain]
        compared += certain
    assert compared > 60
