"""The exchange of decoding against all experts on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experts import TanhExperts
from jax.sharding import PartitionSpec as P

from dsjax.config import MeshConfig
from dsjax.model.dispatch import exchange_locally
from dsjax.model.moe import RoutedExperts
from dsjax.numerics.weights import quantize_weights
from dsjax.parallel.direct import DirectCourier, direct_exchange
from dsjax.parallel.mesh import EXPERT_AXES, make_mesh
from dsjax.planning.hlo import collectives
from dsjax.runtime import DEEPSEEK, Runtime

T, K, D, F = 12, 3, 32, 16
"""T tokens on each of 8 devices."""
KINDS = ["balanced", "skewed", "one device", "padding", "nothing but padding"]
ALL = P(EXPERT_AXES)


def routing(kind, experts):
    """The experts of all tokens, distinct; `experts` for those of padding."""
    rng = np.random.default_rng(1)
    count = 8 * T
    match kind:
        case "balanced":
            return (np.arange(count)[:, None] + np.arange(K) * (experts // K)) % experts
        case "skewed":
            p = 1.5 ** -np.arange(experts)
            return np.stack([rng.choice(experts, K, replace=False, p=p / p.sum()) for _ in range(count)])
        case "one device":  # as far as it has experts enough
            return np.tile(experts // 2 + np.arange(K), (count, 1))
        case "padding":
            indices = np.stack([rng.permutation(experts)[:K] for _ in range(count)])
            indices[rng.random(count) < 0.4] = experts
            return indices
        case "nothing but padding":
            return np.full((count, K), experts)


@functools.cache
def arguments(experts):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (8 * T, D))
    weights = jax.random.uniform(keys[1], (8 * T, K), minval=0.1)
    gate_up = jax.random.normal(keys[2], (experts, 2, F, D)) / 4
    return x, weights, {"gate_up": gate_up, "down": jax.random.normal(keys[3], (experts, D, F)) / 4}


@functools.cache
def program(experts, axes=EXPERT_AXES, dtype=jnp.float32, recipe=None, transport="padded"):
    mesh = make_mesh(MeshConfig(node=2, local=4) if axes == EXPERT_AXES else MeshConfig(local=8))

    def on_device(x, weights, params, indices):
        routed = RoutedExperts(quantize_weights(params, recipe), Runtime())
        return direct_exchange(axes, transport)(routed, x.astype(dtype), indices, weights, experts)[0]

    return jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=(ALL,) * 4, out_specs=ALL, check_vma=False))


@functools.cache
def locally(experts, dtype=jnp.float32, recipe=None):
    def run(x, weights, params, indices):
        routed = RoutedExperts(quantize_weights(params, recipe), Runtime())
        return exchange_locally(routed, x.astype(dtype), indices, weights, experts)[0]

    return jax.jit(run)


def close(found, expected, tolerance):
    expected = np.asarray(expected, np.float32)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("experts", [8, 16, 64])
def test_equals_all_experts_on_one_device(experts, kind):
    """With fewer, about as many, and more experts on a device than a token has."""
    indices = jnp.asarray(routing(kind, experts), jnp.int32)
    expected = locally(experts)(*arguments(experts), indices)
    close(program(experts)(*arguments(experts), indices), expected, 1e-5)
    np.testing.assert_array_equal(expected[indices[:, 0] == experts], 0)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"axes": "local"}, 1e-5),
        ({"transport": "ragged"}, 1e-5),
        ({"dtype": jnp.bfloat16}, 2e-2),
        ({"recipe": DEEPSEEK}, 1e-5),
    ],
    ids=["one axis", "ragged", "bf16", "fp8"],
)
def test_axes_transports_and_formats(options, tolerance):
    """In FP8 tokens are quantized before they travel, so that where to does not matter."""
    indices = jnp.asarray(routing("padding", 16), jnp.int32)
    numerics = {name: options[name] for name in ("dtype", "recipe") if name in options}
    expected = locally(16, **numerics)(*arguments(16), indices)
    close(program(16, **options)(*arguments(16), indices), expected, tolerance)


@pytest.mark.parametrize("recipe", [None, DEEPSEEK], ids=["fp32", "fp8"])
def test_two_all_to_alls_and_nothing_else_travels(recipe):
    compiled = program(16, recipe=recipe).lower(*arguments(16), jnp.asarray(routing("balanced", 16), jnp.int32))
    found = collectives(compiled.compile().as_text())
    assert [c.kind for c in found] == ["all-to-all"] * 2
    # There: codes and scales, or numbers of float32; three weights and three experts. Back: sums.
    token = D + 4 if recipe else 4 * D
    assert [c.nbytes for c in found] == [8 * T * (token + K * (4 + 2)), 8 * T * 4 * D]


def test_padding_does_not_travel():
    """A device gets a copy of a token for the first of its experts there, and none for the others."""
    experts = 16
    indices = routing("padding", experts)
    mesh = make_mesh(MeshConfig(node=2, local=4))

    def sent(indices):
        plan, arrived, _ = DirectCourier(indices, experts, 1, EXPERT_AXES, "padded").send(
            jnp.ones(len(indices), jnp.int32), jnp.ones(indices.shape)
        )
        return plan.to_device.sent[None], arrived.sum()[None], plan.groups.sizes

    mapped = jax.jit(jax.shard_map(sent, mesh=mesh, in_specs=ALL, out_specs=ALL, check_vma=False))
    sent, arrived, sizes = mapped(jnp.asarray(indices, jnp.int32))
    device = indices.reshape(8, T, K) // (experts // 8)
    expected = (device[..., None] == np.arange(8)).any(axis=2).sum(axis=1)
    np.testing.assert_array_equal(sent, expected)
    np.testing.assert_array_equal(arrived, expected.sum(axis=0))
    np.testing.assert_array_equal(sizes, np.bincount(indices.ravel(), minlength=experts + 1)[:experts])
    assert expected.sum() < (device < 8).sum()


def test_gradients():
    """The ways there and back are each other's transposes, as `runtime.Plan` says."""
    experts = 16
    x, weights, _ = arguments(experts)
    rng = np.random.default_rng(2)
    up, down = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((experts, F, D), (experts, D, F)))
    indices, dy = jnp.asarray(routing("skewed", experts), jnp.int32), jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    mesh = make_mesh(MeshConfig(node=2, local=4))

    def gradients(exchange, *inputs):
        y, transpose = jax.vjp(lambda *a: exchange(TanhExperts(*a[2:]), *a[:1], indices, a[1]), *inputs)
        return y, *transpose(dy)

    def local(experts_, x, indices, weights):
        return exchange_locally(experts_, x, indices, weights, experts)[0]

    def over_mesh(experts_, x, indices, weights):
        def on_device(up, down, x, indices, weights):
            return direct_exchange(EXPERT_AXES)(TanhExperts(up, down), x, indices, weights, experts)[0]

        mapped = jax.shard_map(on_device, mesh=mesh, in_specs=(ALL,) * 5, out_specs=ALL, check_vma=False)
        return mapped(experts_.up, experts_.down, x, indices, weights)

    found = jax.jit(functools.partial(gradients, over_mesh))(x, weights, up, down)
    for a, b in zip(found, jax.jit(functools.partial(gradients, local))(x, weights, up, down), strict=True):
        close(a, b, 1e-5)


def test_experts_that_do_not_divide():
    with pytest.raises(ValueError, match="12 experts, replicas included: should be a multiple of 8 devices"):
        program(12).lower(*arguments(16), jnp.zeros((8 * T, K), jnp.int32))
