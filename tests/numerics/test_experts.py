"""Routed experts in FP8 with their exchange: against one expert after another, over meshes, and their bytes."""

import dataclasses

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsjax.config import Config, MeshConfig, TrainConfig
from dsjax.model.block import block_function
from dsjax.model.context import context
from dsjax.model.dispatch import exchange_locally
from dsjax.model.moe import RoutedExperts
from dsjax.numerics.weights import apart, quantize_weights, together
from dsjax.pallas.matmul import reference as matmul
from dsjax.pallas.quantize import reference as quantize
from dsjax.parallel.dispatch import Route
from dsjax.parallel.exchange import bytes_of_round, exchange_in_rounds, exchange_of, route_of
from dsjax.parallel.mesh import EXPERT_AXES, make_mesh
from dsjax.pipeline.chunk import split_vjp
from dsjax.runtime import DEEPSEEK, MXFP8, Runtime
from dsjax.settings import load_model_config

T, K, E, D, F = 48, 3, 16, 96, 160


def error(found, expected):
    return float(jnp.linalg.norm((found - expected).ravel()) / jnp.linalg.norm(expected.ravel()))


@pytest.fixture(scope="module")
def arguments():
    """x, weights of choices, gate_up, down, dy, indices; of eight devices."""
    keys = jax.random.split(jax.random.key(0), 6)
    indices = jax.vmap(lambda key: jax.random.permutation(key, E)[:K])(jax.random.split(keys[5], 8 * T))
    return (
        jax.random.normal(keys[0], (8 * T, D)),
        jax.random.uniform(keys[1], (8 * T, K), minval=0.1),
        jax.random.normal(keys[2], (E, 2, F, D)) / 10,
        jax.random.normal(keys[3], (E, D, F)) / 6,
        jax.random.normal(keys[4], (8 * T, D)),
        indices.astype(jnp.int32),
    )


def experts(recipe, gate_up, down):
    return RoutedExperts(quantize_weights({"gate_up": gate_up, "down": down}, recipe), Runtime())


def locally(recipe, arguments):
    """Output and gradients."""
    *inputs, dy, indices = arguments

    def run(x, weights, gate_up, down):
        return exchange_locally(experts(recipe, gate_up, down), x, indices, weights, E)[0]

    y, transpose = jax.vjp(run, *inputs)
    return y, *transpose(dy)


def test_the_forward_pass_is_that_of_one_expert_after_another(arguments):
    """Composed of the definitions: which rows share a buffer must not matter, to the last bits of float32."""
    x, weights, gate_up, down, _, indices = arguments
    quantized = quantize.tiles(x, power_of_two=True)
    total = np.zeros((8 * T, D), np.float64)
    for e in range(E):
        tokens, choice = np.nonzero(np.asarray(indices) == e)
        rows = tuple(array[tokens] for array in quantized)
        hidden = matmul.scaled_matmul(*rows, *quantize.blocks(gate_up[e].reshape(2 * F, D)), out_dtype=jnp.float32)
        activated = quantize.swiglu_tiles(hidden, weights[tokens, choice])
        result = matmul.scaled_matmul(*activated, *quantize.blocks(down[e]), out_dtype=jnp.float32)
        np.add.at(total, tokens, result)
    found = jax.jit(lambda: locally(DEEPSEEK, arguments)[0])()
    assert error(found, total) < 1e-6


@pytest.mark.parametrize("recipe", [DEEPSEEK, MXFP8], ids=["1x128", "1x32"])
def test_gradients_are_close_to_those_of_the_unquantized(arguments, recipe):
    found = jax.jit(lambda: locally(recipe, arguments))()
    expected = jax.jit(lambda: locally(None, arguments))()
    for name, a, b in zip(("y", "dx", "dweights", "dgate_up", "ddown"), found, expected, strict=True):
        assert a.shape == b.shape
        assert error(a, b) < 0.13, name


@pytest.mark.parametrize("tight", [False, True], ids=["roomy", "tight"])
def test_over_a_mesh(arguments, tight):
    """Tokens are quantized before they travel: y, dx and the gradients of weights of choices do not depend on where to.

    Those of experts do, by rounding: 128 rows of an expert share a scale, and which ones depends on the mesh.
    """
    route = Route(2, 4, E, T // 3 if tight else T, T * K // 8 if tight else 8 * T * K, "padded")
    mesh = make_mesh(MeshConfig(node=2, local=4))
    *inputs, dy, indices = arguments

    def on_device(x, weights, gate_up, down, indices):
        y, rounds = exchange_in_rounds(route, experts(DEEPSEEK, gate_up, down), x, indices, weights)
        return y, rounds[None]

    all_ = P(EXPERT_AXES)
    exchanged = jax.shard_map(on_device, mesh=mesh, in_specs=(all_,) * 5, out_specs=(all_, all_), check_vma=False)

    @jax.jit
    def run(*inputs):
        y, transpose, rounds = jax.vjp(lambda *a: exchanged(*a, indices), *inputs, has_aux=True)
        return (y, *transpose(dy)), rounds

    found, rounds = run(*inputs)
    expected = jax.jit(lambda: locally(DEEPSEEK, arguments))()
    assert (rounds > 1).all() == tight
    for name, a, b in zip(("y", "dx", "dweights", "dgate_up", "ddown"), found, expected, strict=True):
        assert error(a, b) < (0.06 if name in ("dgate_up", "ddown") else 1e-6), name


def arrays_sent(function, arguments):
    """Bytes of every row that the first round's all-to-alls send, read off the traced program."""
    found = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "all_to_all":
                aval = eqn.invars[0].aval
                found.append(aval.size // (aval.shape[0] * aval.shape[1]) * aval.dtype.itemsize)
            if "overflow" not in str(eqn.source_info.name_stack):
                for inner in jex.jaxprs_in_params(eqn.params):
                    visit(inner)

    visit(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


def released(tokens):
    """A layer of DeepSeek-V3 on one of 8 nodes of 8 devices: config, runtime, abstract arguments of its chunk."""
    config = Config(
        model=dataclasses.replace(load_model_config("v3_671b")),
        train=TrainConfig(steps=1, batch_size=64),
        mesh=MeshConfig(node=8, local=8),
    )
    model = config.model
    own = model.n_routed_experts // config.mesh.expert_shards

    def weights():
        from flax import nnx

        from dsjax.model.block import Block

        params = nnx.to_pure_dict(nnx.state(Block(model, nnx.Rngs(0), dense=False), nnx.Param))
        cut = lambda leaf: leaf[:own].astype(jnp.bfloat16)  # noqa: E731
        params["moe"]["experts"] = jax.tree.map(cut, params["moe"]["experts"])
        return apart(quantize_weights(params, DEEPSEEK))

    masters, quantized = jax.eval_shape(weights)
    x = jax.ShapeDtypeStruct((1, tokens, model.hidden_size), jnp.bfloat16)
    ctx = jax.eval_shape(lambda: context(model, tokens, balance_weight=1e-4))
    bias = jax.ShapeDtypeStruct((model.n_routed_experts,), jnp.float32)
    runtime = Runtime(
        compute_dtype=jnp.bfloat16,
        recipe=DEEPSEEK,
        attention="chunked",
        exchange=exchange_of(config),
    )
    block = block_function(model, runtime)

    def chunk(masters, x, ctx):
        quantized, shared, bias = ctx
        return block(together(masters, quantized), x, shared.for_layer(bias))

    return config, chunk, (masters, x, (quantized, ctx, bias))


def test_bytes_of_the_released_model():
    """Per token: 7,392 bytes sent there and 14,336 back, forward and backward; about 153 KB kept."""
    tokens = 4096
    config, chunk, arguments = released(tokens)
    mesh = jax.sharding.AbstractMesh((8, 8), EXPERT_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    found = {}

    def on_device(*arguments):
        split = split_vjp(chunk, *arguments)
        found["kept"] = split.residual_avals
        found["sent"] = arrays_sent(split.fwd, arguments)
        masters, x, ctx = arguments
        found["sent back"] = arrays_sent(split.bwd, (masters, split.residual_avals, ctx, x, masters))
        return split.fwd(*arguments)[0]

    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    jax.eval_shape(mapped, *arguments)

    # Beside a token travel its eight weights and experts, beside a copy of it one of each.
    codes, sums = 7168 + 56 * 4, 7168 * 2
    assert found["sent"] == [codes + 8 * (4 + 2), codes + 4 + 2, sums, sums]
    assert found["sent back"] == [codes, codes, sums + 4, sums + 8 * 4]
    route = route_of(config, tokens)
    per_row = (2 * (codes + sums) + 8 * (4 + 4 + 2), 2 * (codes + sums) + 4 + 4 + 2)
    assert bytes_of_round(route, config.model, 2, DEEPSEEK) == (
        7 * route.node_capacity * per_row[0],
        7 * route.device_capacity * per_row[1],
    )

    # Of buffers with slack and padding, what an even routing fills: eight rows for every token.
    kept = {}
    rows = {8 * route.device_capacity, max(leaf.shape[0] for leaf in found["kept"] if leaf.ndim)}
    for leaf in found["kept"]:
        size = leaf.size * leaf.dtype.itemsize
        filled = 8 * tokens / leaf.shape[0] if leaf.ndim and leaf.shape[0] in rows else 1
        kept["all"] = kept.get("all", 0) + size / tokens
        kept["filled"] = kept.get("filled", 0) + size * filled / tokens
    print({name: f"{size / 1e3:.0f} KB per token" for name, size in kept.items()})
    assert abs(kept["filled"] / 153e3 - 1) < 0.1
    assert kept["all"] < 1.3 * kept["filled"]
