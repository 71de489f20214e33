"""What a layer keeps for its backward pass under each rematerialization."""

import re

import jax
import jax.numpy as jnp
import pytest

from dsjax.model.block import SAVED, block_function
from dsjax.model.context import context
from dsjax.runtime import Runtime

ONCE = ["attention_out", "gate_up", "latent", "latent", "norm_in", "norm_in"]


def kept(capsys, small, parameters, kind, runtime):
    """Names of the activations that one layer keeps, and how many of them have none."""
    params, biases = parameters
    ctx = context(small, 24).for_layer(biases["moe"]["moe"]["bias"][0])
    layer = jax.tree.map(lambda leaf: leaf[0], params[kind])
    block = block_function(small, runtime)
    jax.ad_checkpoint.print_saved_residuals(lambda p, x: block(p, x, ctx)[0].sum(), layer, jnp.ones((2, 24, 32)))
    lines = [
        line for line in capsys.readouterr().out.splitlines() if not re.search("from (the argument|a constant)", line)
    ]
    names = [match[1] for line in lines if (match := re.search(r"named '(\w+)'", line))]
    return sorted(names), len(lines) - len(names)


@pytest.mark.parametrize(
    ("attention", "of_attention"), [("plain", []), ("chunked", ["attention_lse"])], ids=["plain", "chunked"]
)
def test_report_keeps_what_is_named_and_once(capsys, small, small_parameters, attention, of_attention):
    """Norms, MLA up-projections, SwiGLU and the scores are recomputed; nothing else is, and nothing is kept twice.

    The plan of the dispatch is many small arrays of integers.
    """
    runtime = Runtime(remat="report", attention=attention)
    dense = sorted([*ONCE, *of_attention])
    assert kept(capsys, small, small_parameters, "dense", runtime) == (dense, 0)
    moe = sorted([*dense, "dispatched", "gate_up", "router_logits"])
    names, others = kept(capsys, small, small_parameters, "moe", runtime)
    assert ([name for name in names if name != "plan"], others) == (moe, 0)
    assert set(names) | {"attention_lse"} == set(SAVED)


def test_full_keeps_nothing_and_none_keeps_more(capsys, small, small_parameters):
    assert kept(capsys, small, small_parameters, "moe", Runtime(remat="full")) == ([], 0)
    _, others = kept(capsys, small, small_parameters, "moe", Runtime(remat="none"))
    assert others > 10
