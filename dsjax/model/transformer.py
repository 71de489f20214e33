"""The whole model: embedding, layers, final norm, head; and the training loss over them.

Letters of shapes, here and in all of `model/`:
    B sequences   S tokens of a sequence   T tokens (B S)   D hidden_size   V vocab_size   L layers
    H heads       E routed experts         K experts per token   F inner width   R rows grouped by expert
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from dsjax.config import ModelConfig
from dsjax.model.block import Block, block_function
from dsjax.model.context import Context, context
from dsjax.model.layers import RouterBias, cast_weights, embedding, linear, norm_weight, rms_norm, weight
from dsjax.model.layout import stack
from dsjax.model.losses import cross_entropy
from dsjax.model.moe import MoEAux
from dsjax.model.mtp import MTP, mtp
from dsjax.runtime import Runtime, full_precision


class Transformer(nnx.Module):
    """Parameters of a DeepSeek model, under paths that mirror it; calling it gives the logits of the main model."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        key = rngs.params()
        layers, dense = config.num_hidden_layers, config.first_k_dense_replace
        self.layers = nnx.List([Block(config, _rngs(key, i), dense=i < dense) for i in range(layers)])
        depth = config.num_nextn_predict_layers
        if depth:
            self.mtp = nnx.List([MTP(config, _rngs(key, layers + k)) for k in range(depth)])
        self.embed = embedding(config, _rngs(key, layers + depth))
        self.norm = norm_weight(config.hidden_size)
        self.head = weight(config, _rngs(key, layers + depth + 1), config.vocab_size, config.hidden_size)

    @full_precision()
    def __call__(
        self, tokens: Int[Array, "B S"], runtime: Runtime | None = None
    ) -> tuple[Float[Array, "B S V"], MoEAux | None]:
        """Return float32 logits of the next token at every position, and what the MoE layers report."""
        runtime = runtime or Runtime()
        params, biases = (stack(tree, self.config) for tree in split(self))
        params = cast_weights(params, runtime.compute_dtype)
        ctx = context(self.config, tokens.shape[1])
        hidden, aux = hidden_states(params, biases, params["embed"][tokens], ctx, config=self.config, runtime=runtime)
        return logits(params, hidden), aux


def _rngs(key: Array, index: int | Array) -> nnx.Rngs:
    return nnx.Rngs(params=jax.random.fold_in(key, index))


def split(module: nnx.Module) -> tuple[PyTree, PyTree]:
    """Return a module's parameters and router biases as plain nested dicts; a `Transformer`'s are canonical."""
    _, params, biases = nnx.split(module, nnx.Param, RouterBias)
    return _plain(nnx.to_pure_dict(params)), _plain(nnx.to_pure_dict(biases))


def _plain(tree: PyTree) -> PyTree:
    return {str(key): _plain(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def abstract_parameters(config: ModelConfig) -> tuple[PyTree, PyTree]:
    """Return shapes and dtypes of parameters and router biases, in the canonical layout, without making any."""
    return split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))


def initial_parameters(config: ModelConfig, seed: int) -> tuple[PyTree, PyTree]:
    """Return the parameters and router biases of `Transformer(config, nnx.Rngs(seed))`, stacked.

    Layers of one shape are drawn by one vectorized program, whose compile time does not grow with depth.
    """
    key = nnx.Rngs(seed).params()
    layers, dense, depth = config.num_hidden_layers, config.first_k_dense_replace, config.num_nextn_predict_layers

    def draw(make, first: int, count: int) -> tuple[PyTree, PyTree]:
        return jax.vmap(lambda i: split(make(_rngs(key, i))))(jnp.arange(first, first + count))

    params = {
        "embed": embedding(config, _rngs(key, layers + depth))[...],
        "norm": norm_weight(config.hidden_size)[...],
        "head": weight(config, _rngs(key, layers + depth + 1), config.vocab_size, config.hidden_size)[...],
    }
    biases = {}
    groups = {
        "dense": (lambda rngs: Block(config, rngs, dense=True), 0, dense),
        "moe": (lambda rngs: Block(config, rngs, dense=False), dense, layers - dense),
        "mtp": (lambda rngs: MTP(config, rngs), layers, depth),
    }
    for name, (make, first, count) in groups.items():
        if count:
            params[name], group_biases = draw(make, first, count)
            biases |= {name: group_biases} if group_biases else {}
    return params, biases


def hidden_states(
    params: PyTree,
    biases: PyTree,
    x: Float[Array, "B S D"],
    ctx: Context,
    *,
    config: ModelConfig,
    runtime: Runtime,
) -> tuple[Float[Array, "B S D"], MoEAux | None]:
    """Run all main layers over embedded tokens and return the states after the final norm, and the MoE layers' report.

    Args:
        params: stacked, weights in the compute format.
        biases: router biases, stacked.
    """
    dense_block = block_function(config, runtime)
    moe_block = block_function(config, runtime, in_loop=not runtime.unroll_layers)
    for i in range(config.first_k_dense_replace):
        x, _ = dense_block(jax.tree.map(lambda leaf, i=i: leaf[i], params["dense"]), x, ctx)
    aux = None
    if "moe" in params:

        def layer(x: Array, group: tuple[PyTree, PyTree]) -> tuple[Array, MoEAux]:
            layer_params, layer_biases = group
            return moe_block(layer_params, x, ctx.for_layer(_bias(layer_biases)))

        x, aux = jax.lax.scan(layer, x, (params["moe"], biases.get("moe", {})), unroll=runtime.unroll_layers or 1)
    return rms_norm(x, params["norm"], config.rms_norm_eps), aux


def _bias(layer_biases: PyTree) -> Float[Array, " E"] | None:
    """Return the router bias of one layer, or None where the model has none."""
    return layer_biases["moe"]["bias"] if layer_biases else None


@full_precision()
def logits(params: PyTree, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """Return float32 logits of normalized hidden states."""
    return linear(hidden, params["head"]).astype(jnp.float32)


class Losses(NamedTuple):
    """The parts of the training loss of a batch, and what the routers report."""

    main: Float[Array, ""]
    """Mean cross-entropy of the next token, in nats."""
    mtp: Float[Array, ""]
    """Mean over MTP modules of their cross-entropy; each sums over the T - k tokens it predicts and divides by T."""
    aux: MoEAux | None
    """Of all MoE layers, MTP modules last."""


def losses(
    params: PyTree,
    biases: PyTree,
    tokens: Int[Array, "B S1"],
    *,
    config: ModelConfig,
    runtime: Runtime,
    segments: Int[Array, "B S"] | None = None,
    balance_weight: Float[Array, ""] | float = 0.0,
    with_mtp: bool = True,
) -> Losses:
    """Return the losses of windows of S + 1 tokens, of which the last is a target only.

    The balance loss takes part in gradients through the layers, with `balance_weight`; see `add_loss`.

    Args:
        params: stacked; weights are cast to the compute format here, once.
        biases: router biases, stacked.
        segments: document of each token, where attention is to stop at document borders.
    """
    batch, length = tokens.shape[0], tokens.shape[1] - 1
    params = cast_weights(params, runtime.compute_dtype)
    embedded = params["embed"][tokens]
    ctx = context(config, length, segments=segments, balance_weight=balance_weight)
    hidden, aux = hidden_states(params, biases, embedded[:, :-1], ctx, config=config, runtime=runtime)

    def mean_loss(hidden: Float[Array, "B S D"], ahead: int) -> Float[Array, ""]:
        """Return the cross-entropy of the token `ahead` further than the next one, divided by all S positions."""
        targets = jnp.pad(tokens[:, 1 + ahead :], ((0, 0), (0, ahead)))
        has_target = jnp.arange(length) < length - ahead
        weights = jnp.broadcast_to(has_target / (batch * length), (batch, length))
        flat = hidden.reshape(batch * length, -1)
        return cross_entropy(flat, params["head"], targets.ravel(), weights.ravel(), chunk=runtime.loss_chunk)

    main, depth = mean_loss(hidden, 0), config.num_nextn_predict_layers
    if not (with_mtp and depth):
        return Losses(main, jnp.float32(0), aux)

    block, mtp_losses, all_aux = block_function(config, runtime), [], [aux] if aux is not None else []
    for k in range(depth):
        module, bias = jax.tree.map(lambda leaf, k=k: leaf[k], (params["mtp"], biases.get("mtp", {})))
        # Position i embeds token i + k + 1; the last k positions have none, and no target either.
        ahead = jnp.pad(embedded[:, 1 + k :], ((0, 0), (0, k), (0, 0)))
        layer_ctx = ctx.for_layer(_bias(bias.get("block", {})))
        hidden, module_aux = mtp(module, hidden, ahead, layer_ctx, block, config=config)
        mtp_losses.append(mean_loss(hidden, k + 1))
        all_aux.append(jax.tree.map(lambda leaf: leaf[None], module_aux))
    aux = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *all_aux)
    return Losses(main, sum(mtp_losses) / depth, aux)
