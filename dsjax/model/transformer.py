"""The whole model: embedding, layers, final norm, head; and the training loss over them.

Letters of shapes, here and in all of `model/`:
    B sequences   S tokens of a sequence   T tokens (B S)   D hidden_size   V vocab_size   L layers
    H heads       E routed experts         K experts per token   F inner width   R rows grouped by expert
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from dsjax.config import ModelConfig
from dsjax.model.block import Block, block_function
from dsjax.model.context import Context, context
from dsjax.model.layers import RouterBias, cast_weights, embedded, embedding, linear, norm_weight, rms_norm, weight
from dsjax.model.layout import Rows, layers_of, stack
from dsjax.model.losses import cross_entropy
from dsjax.model.moe import MoEAux
from dsjax.model.mtp import MTP, mtp
from dsjax.numerics.weights import quantize_weights
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
        params = quantize_weights(cast_weights(params, runtime.compute_dtype), runtime.recipe)
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


def initial_parameters(config: ModelConfig, seed: int, rows: Rows | None = None) -> tuple[PyTree, PyTree]:
    """Return the parameters and router biases of `Transformer(config, nnx.Rngs(seed))`, stacked.

    Layers of one shape are drawn by one vectorized program, whose compile time does not grow with depth.

    Args:
        rows: the layout of the MoE layers, see `model.layout`.
    """
    key = nnx.Rngs(seed).params()
    layers, dense, depth = config.num_hidden_layers, config.first_k_dense_replace, config.num_nextn_predict_layers

    def draw(make, first: int, rows: Rows) -> tuple[PyTree, PyTree]:
        numbers = jnp.asarray([first if row is None else first + row for row in rows])
        drawn = jax.vmap(lambda i: split(make(_rngs(key, i))))(numbers)
        for at, row in enumerate(rows):
            if row is None:
                drawn = jax.tree.map(lambda leaf, at=at: leaf.at[at].set(0), drawn)
        return drawn

    params = {
        "embed": embedding(config, _rngs(key, layers + depth))[...],
        "norm": norm_weight(config.hidden_size)[...],
        "head": weight(config, _rngs(key, layers + depth + 1), config.vocab_size, config.hidden_size)[...],
    }
    biases = {}
    groups = {
        "dense": (lambda rngs: Block(config, rngs, dense=True), 0, range(dense)),
        "moe": (lambda rngs: Block(config, rngs, dense=False), dense, rows or range(layers - dense)),
        "mtp": (lambda rngs: MTP(config, rngs), layers, range(depth)),
    }
    for name, (make, first, group_rows) in groups.items():
        if len(group_rows):
            params[name], group_biases = draw(make, first, group_rows)
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
    dense = layers_of(params.get("dense", {}), config.first_k_dense_replace)
    x = dense_layers(dense, x, ctx, config=config, runtime=runtime)
    x, aux = moe_layers(params, biases, x, ctx, config=config, runtime=runtime)
    return rms_norm(x, params["norm"], config.rms_norm_eps), aux


def dense_layers(
    layers: Iterable[PyTree], x: Float[Array, "B S D"], ctx: Context, *, config: ModelConfig, runtime: Runtime
) -> Float[Array, "B S D"]:
    """Run the first layers, which have a dense network, from the parameters of each."""
    block = block_function(config, runtime)
    for params in layers:
        x, _ = block(params, x, ctx)
    return x


def moe_layers(
    params: PyTree,
    biases: PyTree,
    x: Float[Array, "B S D"],
    ctx: Context,
    *,
    config: ModelConfig,
    runtime: Runtime,
) -> tuple[Float[Array, "B S D"], MoEAux | None]:
    """Run the layers that have a mixture of experts, in one loop unless the runtime unrolls them."""
    if "moe" not in params:
        return x, None
    block = block_function(config, runtime, in_loop=not runtime.unroll_layers)

    def layer(x: Array, group: tuple[PyTree, PyTree]) -> tuple[Array, MoEAux]:
        layer_params, layer_biases = group
        return block(layer_params, x, ctx.for_layer(bias_of(layer_biases)))

    return jax.lax.scan(layer, x, (params["moe"], biases.get("moe", {})), unroll=runtime.unroll_layers or 1)


def bias_of(layer_biases: PyTree) -> Float[Array, " E"] | None:
    """Return the router bias of one layer, or None where the model has none."""
    return layer_biases["moe"]["bias"] if layer_biases else None


@full_precision()
def logits(params: PyTree, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """Return float32 logits of normalized hidden states."""
    return linear(hidden, params["head"]).astype(jnp.float32)


class Losses(NamedTuple):
    """The training loss of a batch, its parts, and what the routers report."""

    objective: Float[Array, ""]
    """Main loss plus weighted MTP loss; the only one with a gradient."""
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
    mtp_weight: Float[Array, ""] | float | None = 0.0,
) -> Losses:
    """Return the losses of windows of S + 1 tokens, of which the last is a target only.

    The balance loss takes part in gradients through the layers, with `balance_weight`; see `add_loss`.

    Args:
        params: stacked; weights are cast to the compute format here, once.
        biases: router biases, stacked.
        segments: document of each token, where attention is to stop at document borders.
        mtp_weight: of the MTP loss in the objective; None leaves MTP modules out.
    """
    params = quantize_weights(cast_weights(params, runtime.compute_dtype), runtime.recipe)
    ctx = context(config, tokens.shape[1] - 1, segments=segments, balance_weight=balance_weight)
    dense = layers_of(params.get("dense", {}), config.first_k_dense_replace)
    x = dense_layers(dense, embedded(params["embed"], tokens[:, :-1]), ctx, config=config, runtime=runtime)
    x, aux = moe_layers(params, biases, x, ctx, config=config, runtime=runtime)
    found = predictions(params, biases, x, tokens, ctx, config=config, runtime=runtime, mtp_weight=mtp_weight)
    every = [part for part in (aux, found.aux) if part is not None]
    return found._replace(aux=jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *every) if every else None)


def predictions(
    params: PyTree,
    biases: PyTree,
    x: Float[Array, "B S D"],
    tokens: Int[Array, "B S1"],
    ctx: Context,
    *,
    config: ModelConfig,
    runtime: Runtime,
    mtp_weight: Float[Array, ""] | float | None = 0.0,
) -> Losses:
    """Return the losses of the states that the last main layer leaves, and the report of the MTP modules alone.

    Args:
        params: stacked, weights in the compute format; embedding, final norm, head and MTP modules are used.
        mtp_weight: see `losses`.
    """
    depth = config.num_nextn_predict_layers if mtp_weight is not None else 0
    states, all_aux = [rms_norm(x, params["norm"], config.rms_norm_eps)], []
    block = block_function(config, runtime)
    following = embedded(params["embed"], tokens[:, 1:]) if depth else None
    for k in range(depth):
        module, bias = jax.tree.map(lambda leaf, k=k: leaf[k], (params["mtp"], biases.get("mtp", {})))
        # Position i embeds token i + k + 1; the last k positions have none, and no target either.
        ahead = jnp.pad(following[:, k:], ((0, 0), (0, k), (0, 0)))
        layer_ctx = ctx.for_layer(bias_of(bias.get("block", {})))
        hidden, module_aux = mtp(module, states[-1], ahead, layer_ctx, block, config=config)
        states.append(hidden)
        all_aux.append(module_aux)

    # State k predicts the token k further than the next one, where there is one; sums are divided by all S positions.
    batch, length = tokens.shape[0], tokens.shape[1] - 1
    targets = [jnp.pad(tokens[:, 1 + k :], ((0, 0), (0, k))) for k in range(1 + depth)]
    shares = jnp.arange(length) < length - jnp.arange(1 + depth)[:, None]
    shares = jnp.broadcast_to(shares[:, None] / (batch * length), (1 + depth, batch, length))
    of_losses = jnp.asarray([1.0] + [mtp_weight / depth for _ in range(depth)], jnp.float32)
    objective, token_losses = cross_entropy(
        jnp.concatenate([state.reshape(batch * length, -1) for state in states]),
        params["head"],
        jnp.stack(targets).ravel(),
        (shares * of_losses[:, None, None]).ravel(),
        chunk=runtime.loss_chunk,
    )
    main, *mtp_losses = (token_losses.reshape(shares.shape) * shares).sum((1, 2))
    mtp_loss = sum(mtp_losses, jnp.float32(0)) / max(depth, 1)
    return Losses(
        objective, main, mtp_loss, jax.tree.map(lambda *leaves: jnp.stack(leaves), *all_aux) if depth else None
    )
