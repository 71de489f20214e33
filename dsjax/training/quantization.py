"""What FP8 does to the tensors of a run: every layer's weights, inputs and gradients, measured on some sequences."""

from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Array, Int, PyTree

from dsjax.config import Config
from dsjax.model.block import block_function
from dsjax.model.context import context
from dsjax.model.layers import cast_weights
from dsjax.model.transformer import bias_of, predictions
from dsjax.numerics.instruments import Observations, Role, Statistics, observed
from dsjax.numerics.weights import quantize_weights
from dsjax.runtime import Runtime, full_precision

ROLES: tuple[Role, ...] = ("weight", "input", "gradient")
STACKS = ("dense", "moe")


def make_observe(config: Config, runtime: Runtime) -> Callable[[PyTree, PyTree, Int[Array, "B S1"]], Observations]:
    """Return the compiled `(params, biases, tokens) -> statistics` of a forward and a backward pass on one device.

    Layers are compiled one by one; names are those of `dense.0.attention.q_a`, `moe.3.moe.experts.down`.

    Raises:
        ValueError: the runtime has no recipe.
    """
    if runtime.recipe is None:
        raise ValueError("nothing is quantized in a run without FP8: precision should be 'fp8' or 'mxfp8'")
    model = config.model
    runtime = replace(runtime, remat="none", exchange=None)  # out of what is made again nothing can be taken
    block = block_function(model, runtime)

    @jax.jit
    @full_precision()
    def observe(params: PyTree, biases: PyTree, tokens: Array) -> Observations:
        params = cast_weights(params, runtime.compute_dtype)
        layers = []
        for stack in STACKS:
            for i in range(jax.tree.leaves(params[stack])[0].shape[0] if stack in params else 0):
                of_layer, bias = jax.tree.map(lambda leaf, i=i: leaf[i], (params[stack], biases.get(stack, {})))
                layers.append((f"{stack}.{i}", of_layer, bias_of(bias)))
        ctx = context(model, tokens.shape[1] - 1, balance_weight=config.train.balance_weight)
        ends = {name: params[name] for name in ("embed", "norm", "head", "mtp") if name in params}
        with observed() as found:
            weights = quantize_weights({name: of_layer for name, of_layer, _ in layers}, runtime.recipe)
            ends = quantize_weights(ends, runtime.recipe)

            def loss(x: Array) -> Array:
                for name, _, bias in layers:
                    x, _ = block(weights[name], x, ctx.for_layer(bias))
                main, mtp, _ = predictions(ends, biases, x, tokens, ctx, config=model, runtime=runtime)
                return main + config.train.mtp_weights[0] * mtp

            x = ends["embed"][tokens[:, :-1]]
            jax.grad(loss)(x)
        return found

    return observe


def summary(found: Observations) -> dict[str, float]:
    """Return the numbers of a metrics line: of every role the mean error, and the worst tensor's other shares."""
    result = {}
    for role in ROLES:
        of_role = [statistics for (_, at), statistics in found.items() if at == role]
        columns = Statistics(*np.asarray(of_role, np.float64).T)
        result |= {
            f"fp8_{role}_error": float(columns.error.mean()),
            f"fp8_{role}_amax": float(columns.amax.max()),
            f"fp8_{role}_underflow": float(columns.underflow.max()),
            f"fp8_{role}_saturation": float(columns.saturation.max()),
        }
    return result
