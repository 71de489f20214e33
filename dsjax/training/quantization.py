"""What FP8 does to the tensors of a run: every layer's weights, inputs and gradients, measured on some sequences; and
of every step its weights, counted as they are quantized."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Array, Int, PyTree

from dsjax.config import Config
from dsjax.model.block import block_function
from dsjax.model.context import context
from dsjax.model.layers import cast_weights
from dsjax.model.transformer import bias_of, predictions
from dsjax.numerics.instruments import Counts, Observations, Role, Statistics, observed
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
                weight = config.train.mtp_weights[0]
                found = predictions(ends, biases, x, tokens, ctx, config=model, runtime=runtime, mtp_weight=weight)
                return found.objective

            x = ends["embed"][tokens[:, :-1]]
            jax.grad(loss)(x)
        return found

    return observe


def shares(counts: Mapping[str, Counts]) -> dict[str, float]:
    """Return what FP8 did to the weights of a step, in the worst kind of matrices: the numbers of a metrics line.

    `fp8_weights_to_zero` is the share of the numbers that are not zero whose code is, `fp8_weights_largest` the share
    of codes at E4M3's largest (one number of each block or tile is there by construction, about 6e-5 or 0.03 of all),
    `fp8_weights_not_finite` the number of codes that are NaN. Covered are the weights that a step quantizes once: all
    without a pipeline, with one the MoE layers but not the dense layers and MTP modules at its ends.
    """
    if not counts:
        return {}
    there = {kind: max(float(found.there), 1.0) for kind, found in counts.items()}
    return {
        "fp8_weights_to_zero": max(float(found.to_zero) / there[kind] for kind, found in counts.items()),
        "fp8_weights_largest": max(float(found.largest) / there[kind] for kind, found in counts.items()),
        "fp8_weights_not_finite": sum(float(found.not_finite) for found in counts.values()),
    }


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
