"""A small model and requests to an engine, alike for its tests and those of the server."""

from contextlib import contextmanager
from copy import copy

import jax
import numpy as np

from dsjax.config import ModelConfig
from dsjax.inference.sampling import Sampling
from dsjax.inference.settings import EngineSettings

SMALL = ModelConfig(
    name="test",
    vocab_size=320,
    hidden_size=32,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_attention_heads=4,
    q_lora_rank=16,
    kv_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=6,
    v_head_dim=10,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    initializer_range=0.15,
)
TEXT = "def add(a, b):\n    return a + b  # größer, 你好, 😀\n\n\nclass Point:\n    def norm(self):\n        pass\n"
GREEDY = Sampling(temperature=0.0)
SETTINGS = EngineSettings(slots=4, page_size=4, prefill_tokens=16)


def ending(tokenizer, eos):
    """A tokenizer with another token at the end of documents."""
    tokenizer = copy(tokenizer)
    tokenizer.eos = eos
    return tokenizer


def prompt(length, seed=3):
    return [(7 * i * i + seed) % 320 for i in range(length)]


def ids_of(request):
    return [token.id for token in request.tokens]


def answered(engine, *requests):
    """The tokens of each, when all are done."""
    engine.run()
    assert engine.pages_held == 0
    assert all(request.finish for request in requests)
    return [ids_of(request) for request in requests]


MIX = [
    (prompt(1), GREEDY, 20),
    (prompt(16), Sampling(seed=1), 12),
    (prompt(30), Sampling(seed=1, temperature=0.7, top_p=0.8), 25),
    (prompt(37, 5), GREEDY, 8),
    (prompt(5, 9), Sampling(seed=4, top_k=5, repetition_penalty=1.3), 1),
    (prompt(16), Sampling(seed=2, repetition_penalty=1.5, logprobs=3), 30),
    (prompt(30), GREEDY, 9),
]


@contextmanager
def compilations():
    """Counts the programs that XLA compiles inside, of whatever function."""
    found, active = [], True

    def listener(event, *_, **__):
        if active and event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield found
    active = False


def reference(logits, temperature, top_p, top_k):
    """The distribution that a request asks for, in float64 and by sorting."""
    logits = np.asarray(logits, np.float64) / temperature
    if top_k:
        logits = np.where(logits >= np.sort(logits)[-min(top_k, len(logits))], logits, -np.inf)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    enough = int(np.searchsorted(np.cumsum(p[order]), top_p)) if top_p < 1 else len(p) - 1
    p = np.where(p >= p[order[enough]], p, 0)
    return p / p.sum()
