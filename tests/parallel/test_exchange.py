"""The exchange of a mesh against all experts on all tokens, for routings that a trained router never makes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experts import TanhExperts
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from dsjax.config import MeshConfig
from dsjax.parallel.dispatch import Route
from dsjax.parallel.exchange import exchange_in_rounds
from dsjax.parallel.mesh import EXPERT_AXES, make_mesh

T, K, E, D, F = 12, 3, 16, 6, 5
"""T tokens on each of 8 devices."""
MESHES = [(2, 4), (4, 2), (8, 1), (1, 8)]
KINDS = ["node-limited", "uniform", "one device", "one expert twice", "skewed"]
ALL = P(EXPERT_AXES)


def routing(kind, nodes):
    rng = np.random.default_rng(1)
    count = 8 * T
    match kind:
        case "node-limited":  # experts of at most two nodes, or of two eighths where there are fewer nodes
            groups = max(nodes, 4)
            allowed = [rng.choice(groups, 2, replace=False)[:, None] * (E // groups) for _ in range(count)]
            return np.stack([rng.choice((a + np.arange(E // groups)).ravel(), K, replace=False) for a in allowed])
        case "uniform":
            return np.stack([rng.permutation(E)[:K] for _ in range(count)])
        case "one device":
            return np.tile([6, 7, 6], (count, 1))
        case "one expert twice":
            return np.tile([3, 9, 3], (count, 1))
        case "skewed":
            p = 1.5 ** -np.arange(E)
            return np.stack([rng.choice(E, K, replace=False, p=p / p.sum()) for _ in range(count)])


def route(nodes, devices, *, tight, transport="padded"):
    """`tight` buffers overflow under any routing; the others hold all rows in the first round."""
    node, device = (T // 3, T * K // devices // 2) if tight else (T, 8 * T * K)
    return Route(nodes, devices, E, node, max(device, 1), transport)


@functools.cache
def programs(route):
    """`(value and gradients, rounds)` of the exchange on a mesh, compiled once for all routings."""
    mesh = make_mesh(MeshConfig(node=route.nodes, local=route.devices))

    def on_device(x, weights, up, down, indices):
        y, rounds = exchange_in_rounds(route, TanhExperts(up, down), x, indices, weights)
        return y, rounds[None]

    exchanged = jax.shard_map(on_device, mesh=mesh, in_specs=(ALL,) * 5, out_specs=(ALL, ALL), check_vma=False)

    @jax.jit
    def run(x, weights, up, down, indices, dy):
        y, transpose, rounds = jax.vjp(lambda *a: exchanged(*a, indices), x, weights, up, down, has_aux=True)
        return (y, *transpose(dy)), rounds

    return run


@functools.cache
def arguments():
    rng = np.random.default_rng(3)
    x, weights = rng.normal(size=(8 * T, D)), rng.uniform(0.1, 1, size=(8 * T, K))
    up, down, dy = rng.normal(size=(E, F, D)), rng.normal(size=(E, D, F)), rng.normal(size=(8 * T, D))
    return x, weights, up, down, dy


def dense(indices):
    """Output and gradients in float64, with every expert on every token."""
    x, weights, up, down, dy = arguments()

    def network(x, weights, up, down):
        chosen = jax.nn.one_hot(indices, E, dtype=x.dtype)
        all_experts = jnp.einsum("tef,edf->ted", jnp.tanh(jnp.einsum("td,efd->tef", x, up)), down)
        return jnp.einsum("ted,tke,tk->td", all_experts, chosen, weights)

    with jax.enable_x64(True):
        y, transpose = jax.vjp(jax.jit(network), *map(jnp.asarray, (x, weights, up, down)))
        return [np.asarray(a) for a in (y, *transpose(jnp.asarray(dy)))]


def check(route, indices):
    """Compare with the dense network; return the rounds."""
    x, weights, up, down, dy = (jnp.asarray(a, jnp.float32) for a in arguments())
    got, rounds = programs(route)(x, weights, up, down, jnp.asarray(indices, jnp.int32), dy)
    for name, a, b in zip(("y", "dx", "dweights", "dup", "ddown"), got, dense(indices), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(np.abs(b).max()) + 1e-6, err_msg=name)
    assert len(set(np.asarray(rounds))) == 1
    return int(rounds[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tight", [False, True], ids=["roomy", "tight"])
@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m[0]}x{m[1]}")
def test_outputs_and_gradients(mesh, tight, kind):
    rounds = check(route(*mesh, tight=tight), routing(kind, mesh[0]))
    assert (rounds > 1) == tight


@pytest.mark.parametrize("transport", ["ragged", "gather"])
@pytest.mark.parametrize("kind", ["node-limited", "one device"])
def test_other_transports(transport, kind):
    check(route(2, 4, tight=True, transport=transport), routing(kind, 2))


def test_axes_of_another_mesh():
    """Inference has groups of devices within a node: three axes, of which two are the second hop's."""
    axes = ("node", ("data", "tensor"))
    here = Route(2, 4, E, T // 3, T * K // 8, "padded", axes)
    mesh = jax.make_mesh((2, 2, 2), ("node", "data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    x, weights, up, down, _ = (jnp.asarray(a, jnp.float32) for a in arguments())
    indices = routing("skewed", 2)

    def on_device(x, weights, up, down, indices):
        y, rounds = exchange_in_rounds(here, TanhExperts(up, down), x, indices, weights)
        return y, rounds[None]

    every = P(mesh.axis_names)
    run = jax.shard_map(on_device, mesh=mesh, in_specs=(every,) * 5, out_specs=(every, every), check_vma=False)
    y, rounds = jax.jit(run)(x, weights, up, down, jnp.asarray(indices, jnp.int32))
    expected = dense(indices)[0]
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    assert (rounds > 1).all()


@settings(max_examples=25)
@given(st.lists(st.integers(0, E - 1), min_size=8 * T * K, max_size=8 * T * K))
def test_any_routing(choices):
    check(route(2, 4, tight=True), np.asarray(choices).reshape(8 * T, K))
