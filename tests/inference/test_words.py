"""What one process tells another of a request is all that matters for its answer."""

import json
from operator import methodcaller

import numpy as np
import pytest

from dsjax.inference.engine import Engine
from dsjax.inference.load import Model
from dsjax.inference.sampling import Sampling
from dsjax.inference.settings import EngineSettings
from dsjax.inference.words import _described, _request
from dsjax.runtime import Runtime


@pytest.fixture(scope="module")
def engine(small, random_parameters, tokenizer):
    params, biases = random_parameters(small)
    model = Model(small, Runtime(), params, biases, tokenizer, opening=0, context=64, origin="")
    return Engine(model, EngineSettings(slots=2))


REQUESTS = [
    ("def ad", {}),
    ("", {"stop": ["\n", "größer"]}),
    ("a = 'größ", {"sampling": Sampling(temperature=0.1 + 0.2, top_p=1 / 3, seed=2**32 - 1, logprobs=2)}),
    ([5, 6, 7], {"stop_ids": {3, 4}, "sampling": Sampling(repetition_penalty=1.1)}),
    (np.arange(5), {"sampling": Sampling(seed=np.int64(3), temperature=np.float32(0.7)), "stop_ids": np.arange(3)}),
]


@pytest.mark.parametrize(("prompt", "how"), REQUESTS)
def test_a_request_is_the_same_elsewhere(engine, tokenizer, prompt, how):
    request = engine.submit(prompt, max_tokens=30, **how)
    other = _request(json.loads(json.dumps(_described(request), default=methodcaller("item"))), tokenizer)
    for name in ("number", "prompt", "sampling", "max_tokens"):
        assert getattr(other, name) == getattr(request, name)
    assert set(other.stop_ids) == set(request.stop_ids)
    assert (other.first is None) == (request.first is None)
    assert request.first is None or (other.first == request.first).all()
    pushed = [token for token in tokenizer.encode(["add(größer, 你好)\n😀"])[0] if token not in request.stop_ids]
    for each in (request, other):
        for token in pushed:
            if each.finish is None:
                each.text += each.stops.push(each.text_stream.push(token))[0]
    assert other.text == request.text != ""
