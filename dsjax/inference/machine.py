"""What a device of a unit shares with others inside a program: heads and tokens with its group, experts with all.

Between the parts of layers a device has its share of the group's tokens [1, T', D]; attention is given them all, of
some heads (report section 3.4: tensor parallelism with sequence parallelism). In a
group of one all of it is the identity, and tokens keep their shape [B, N, D].
"""

from dataclasses import dataclass, field, fields, replace
from itertools import accumulate

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from dsjax.config import DispatchConfig, MeshConfig, ModelConfig
from dsjax.inference.balance import exchange_in_balance
from dsjax.inference.layout import AXES, GROUPS, TENSOR, Layout
from dsjax.inference.replicas import Tables, exchange_over_replicas, exchange_with_shared
from dsjax.model.transformer import logits
from dsjax.parallel.direct import direct_exchange
from dsjax.parallel.exchange import exchange_of
from dsjax.runtime import Exchange, Runtime


@dataclass(frozen=True)
class Machine(Runtime):
    """A runtime that knows the layout of its unit; for use inside `shard_map` where that has several devices."""

    layout: Layout = field(default_factory=Layout)
    mesh: Mesh | None = None
    """Of the unit; None on a single device."""
    one_hop: bool = True
    """Whether tokens go to experts as in decoding, see `parallel.direct`; or over nodes first, as in training."""

    @classmethod
    def of(cls, runtime: Runtime, layout: Layout | None = None, mesh: Mesh | None = None) -> "Machine":
        """Return the machine of a runtime; by default of a single device."""
        return cls(**{f.name: getattr(runtime, f.name) for f in fields(Runtime)}, layout=layout or Layout(), mesh=mesh)

    @property
    def is_divided(self) -> bool:
        """Whether there are other devices."""
        return self.layout.devices > 1

    def is_of(self, group: Int[Array, ""]) -> Bool[Array, ""] | bool:
        """Whether this device is of a group, counted along the nodes and within them."""
        return lax.axis_index(GROUPS) == group if self.is_divided else True

    def heads(self, config: ModelConfig) -> ModelConfig:
        """Return the model as this device computes attention: with its heads alone."""
        return replace(config, num_attention_heads=config.num_attention_heads // self.layout.tensor)

    def share(self, x: Shaped[Array, "B N *_"]) -> Shaped[Array, "b n *_"]:
        """Return this device's share of the tokens of its group, of which each device of it has all."""
        if self.layout.tensor == 1:
            return x
        tokens = _in_shares(x.reshape(1, -1, *x.shape[2:]), self.layout.tensor)
        length = tokens.shape[1] // self.layout.tensor
        return lax.dynamic_slice_in_dim(tokens, lax.axis_index(TENSOR) * length, length, axis=1)

    def together(self, shares: PyTree[Shaped[Array, "b n _"]], shape: tuple[int, int]) -> PyTree:
        """Return the tokens of all devices of the group, in one message: the inverse of `share`.

        Args:
            shape: of the tokens, [B, N].
        """
        if self.layout.tensor == 1:
            return shares
        leaves, structure = jax.tree.flatten(shares)
        with jax.named_scope("tensor"):
            tokens = lax.all_gather(jnp.concatenate([leaf[0] for leaf in leaves], axis=-1), TENSOR, tiled=True)
        tokens = tokens[: shape[0] * shape[1]].reshape(*shape, -1)
        ends = list(accumulate(leaf.shape[-1] for leaf in leaves))[:-1]
        return structure.unflatten(jnp.split(tokens, ends, axis=-1) if ends else [tokens])

    def summed(self, parts: Float[Array, "B N D"]) -> Float[Array, "b n D"]:
        """Return this device's share of the sums of what all devices of the group have of their tokens."""
        if self.layout.tensor == 1:
            return parts
        tokens = _in_shares(parts.reshape(1, -1, parts.shape[-1]), self.layout.tensor)
        with jax.named_scope("tensor"):
            return lax.psum_scatter(tokens, TENSOR, scatter_dimension=1, tiled=True)

    def scores(self, params: PyTree, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Return float32 logits of normalized states, of which each device of the group makes those of some words."""
        own = logits(params, hidden)
        return lax.all_gather(own, TENSOR, axis=own.ndim - 1, tiled=True) if self.layout.tensor > 1 else own

    def exchange_of_layer(self, config: ModelConfig, tables: Tables | None) -> Exchange:
        """Return the exchange of a layer.

        Args:
            tables: of the layer; None where every expert has one slot.
        """
        layout = self.layout
        if self.one_hop:
            exchange = direct_exchange(AXES)
        else:
            mesh = MeshConfig(node=layout.node, local=layout.data * layout.tensor)
            exchange = exchange_of(_Hops(config, mesh), axes=("node", ("data", TENSOR)))
        if tables is not None:
            if layout.replicas == "balanced":
                exchange = exchange_in_balance(exchange, tables, AXES, layout.active or None)
            else:
                exchange = exchange_over_replicas(exchange, tables, AXES)
        return exchange_with_shared(exchange) if layout.shared_as_routed else exchange


@dataclass(frozen=True)
class _Hops:
    """What the sizes of hops depend on."""

    model: ModelConfig
    mesh: MeshConfig
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)


def _in_shares(tokens: Shaped[Array, "1 T *_"], shares: int) -> Shaped[Array, "1 T1 *_"]:
    padding = [(0, 0)] * tokens.ndim
    padding[1] = (0, -tokens.shape[1] % shares)
    return jnp.pad(tokens, padding) if padding[1][1] else tokens
