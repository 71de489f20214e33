"""The order of a pair: what waits for what, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.pipeline.overlap import _NETWORK, interleaved
from dsjax.pipeline.totals import SCOPE

LAYERS = 2


def scoped(name, x):
    """Something that stands for the network, in a scope of its name."""
    with jax.named_scope(name):
        return x[::-1]


def forward(x, weights):
    with jax.named_scope("F"):
        for attention, mlp in weights:
            x = scoped("combine", scoped("dispatch", x @ attention) @ mlp)
        return x + 1


def pair(x, dy, weights, inputs):
    """A forward and a backward pass of layers that share nothing; products are told by the shape of their result."""
    y, gradients = forward(x, weights), []
    with jax.named_scope("B"):
        for layer in reversed(range(LAYERS)):
            attention, mlp = weights[layer]
            dy = scoped("combine", dy)
            gradients.append(inputs[layer].T @ dy)
            dy = scoped("dispatch", dy @ mlp.T) @ attention.T
    return y, dy, gradients


@pytest.fixture(scope="module")
def arguments():
    """Widths 10 + layer behind attention and 20 + layer behind the MLP; backward 30 + layer of inputs of the MLP."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    widths = [5, 10, 20, 11, 21]
    weights = [(normal(widths[2 * i], widths[2 * i + 1]), normal(widths[2 * i + 1], widths[2 * i + 2])) for i in (0, 1)]
    return normal(4, 5), normal(4, 21), weights, [normal(4, 30 + layer) for layer in range(LAYERS)]


def ancestors(function, arguments):
    """For every product, by the shape of its result and its order, the products that it waits for."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    behind, products = {}, {}
    for eqn in jaxpr.eqns:
        before = set().union(*(behind.get(v, set()) for v in eqn.invars if not isinstance(v, jax.extend.core.Literal)))
        if eqn.primitive.name == "dot_general":
            stack = str(eqn.source_info.name_stack)
            name = f"{'F' if 'F' in stack else 'B'} {eqn.outvars[0].aval.shape}"
            products[name] = before
            before = before | {name}
        behind |= dict.fromkeys(eqn.outvars, before)
    return products


F_ATTENTION, F_MLP = ["F (4, 10)", "F (4, 11)"], ["F (4, 20)", "F (4, 21)"]
B_MLP, B_ATTENTION = ["B (4, 11)", "B (4, 10)"], ["B (4, 20)", "B (4, 5)"]
WEIGHTS = ["B (31, 21)", "B (30, 20)"]
"""Of layers in the order in which a pass has them."""


def test_components_take_turns(arguments):
    before, after = (ancestors(function, arguments) for function in (pair, interleaved(pair)))
    assert before.keys() == after.keys() == {*F_ATTENTION, *F_MLP, *B_MLP, *B_ATTENTION, *WEIGHTS}
    assert not any(name.startswith("B") for at, names in before.items() if at.startswith("F") for name in names)
    # Figure 4: attention (F), MLP (B), MLP (F), attention (B), and the next layer of both.
    order = [F_ATTENTION[0], B_MLP[0], F_MLP[0], B_ATTENTION[0], F_ATTENTION[1], B_MLP[1], F_MLP[1], B_ATTENTION[1]]
    for i, name in enumerate(order[1:]):
        assert order[i] in after[name], f"{name} should wait for {order[i]}"
        assert not after[name] & set(order[i + 2 :]), f"{name} should wait for nothing that comes later"


def test_nobody_waits_for_gradients_of_weights(arguments):
    for waits_for in ancestors(interleaved(pair), arguments).values():
        assert not waits_for & set(WEIGHTS)


def test_results_keep_their_bits(arguments):
    found, expected = (jax.jit(function)(*arguments) for function in (interleaved(pair), pair))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    taken = jax.jit(jax.grad(lambda x: interleaved(pair)(x, *arguments[1:])[0].sum()))(arguments[0])
    np.testing.assert_array_equal(taken, jax.grad(lambda x: pair(x, *arguments[1:])[0].sum())(arguments[0]))


def test_a_single_chunk_is_left_alone(arguments):
    x, _, weights, _ = arguments
    assert ancestors(interleaved(forward), (x, weights)) == ancestors(forward, (x, weights))


def test_gradients_of_an_overflow_are_not_on_the_network():
    """Nobody waits for them; but their name says what they are, for those that count collectives."""
    assert not _NETWORK.search(f"B/{SCOPE}/cond") and "overflow" in SCOPE
