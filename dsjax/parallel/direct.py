"""The exchange of decoding: one all-to-all there and one back, between all devices that hold experts.

Few tokens do not repay a second hop. So a token goes straight to every device that holds one of its experts, once
whatever the number of its experts there, and comes back as one sum. The buffer for a device has a row for each token:
nothing overflows, whatever the routing, and no device has to tell another how much it will send. DeepEP's low-latency
mode does the same with a copy per expert.

It is hop, sort and sum of `parallel.dispatch`; only which item goes where is of its own.

Dimensions: T tokens of a device, K experts of a token, N devices, C = N T rows that may arrive, X experts of a device,
H = min(K, X) most experts of a token on one device, R rows of expert inputs, D width.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, PyTree, Shaped

from dsjax.config import Transport
from dsjax.model.dispatch import LocalPlan, sort_by_expert
from dsjax.model.grouped_matmul import Groups
from dsjax.parallel.dispatch import Hop, hop, line_up
from dsjax.parallel.mesh import Axes
from dsjax.runtime import Exchange, ExpertFunction


def direct_exchange(axes: Axes, transport: Transport = "padded") -> Exchange:
    """Return the exchange over the devices along `axes`, for use inside `shard_map`.

    Expert e lives on device e // (num_experts / N) of the N, counted along the first axis first. Nothing is sent for a
    token whose experts are all `num_experts`, and its result is zero. Sums of a token's experts on a device, and of
    what its devices send, are in float32, in the order of its experts. A token's experts must be distinct.

    Args:
        axes: of the mesh.
        transport: `ragged` sends the rows in use alone, and asks for their number first.
    """

    def exchange(
        experts: ExpertFunction,
        x: Float[Array, "T D"],
        indices: Int32[Array, "T K"],
        weights: Float[Array, "T K"],
        num_experts: int,
    ) -> tuple[Float[Array, "T D"], Int32[Array, ""]]:
        devices = lax.axis_size(axes)
        if num_experts % devices:
            raise ValueError(f"{num_experts} experts, replicas included: should be a multiple of {devices} devices")
        courier = DirectCourier(indices, num_experts, experts.alignment, axes, transport)
        y, _ = experts(courier, x, weights)
        return y, jnp.ones((), jnp.int32)

    return exchange


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["to_device", "within_device", "choice"], meta_fields=["choices"]
)
@dataclass(frozen=True)
class DirectPlan:
    """The way of tokens to their experts, and back; see `runtime.Plan`. What arrives has C rows."""

    to_device: Hop
    """A row per device that a token goes to."""
    within_device: LocalPlan
    """From what arrives to rows grouped by expert."""
    choice: Int32[Array, "C H"]
    """Which of the token's K experts are on this device: those first, others behind."""
    choices: int
    """K."""

    @property
    def groups(self) -> Groups:
        return self.within_device.groups

    def again(self, tokens: PyTree[Shaped[Array, "T ..."]]) -> PyTree[Shaped[Array, "C ..."]]:
        return self.to_device.there(tokens)[0]

    def expand(self, arrived: PyTree[Shaped[Array, "C ..."]]) -> PyTree[Shaped[Array, "R ..."]]:
        return self.within_device.expand(arrived)

    def expand_weights(self, arrived: Float[Array, "C K"]) -> Float[Array, "R"]:
        return self.within_device.expand_weights(jnp.take_along_axis(arrived, self.choice, axis=1))

    def row_sources(self) -> Int32[Array, "R"]:
        return self.within_device.row_sources()

    def back(self, rows: PyTree[Float[Array, "R ..."]]) -> PyTree[Float[Array, "T ..."]]:
        return self.to_device.back(self.within_device.back(rows))[0]

    def back_with_weights(
        self, rows: Float[Array, "R ..."], of_rows: Float[Array, "R"]
    ) -> tuple[Float[Array, "T ..."], Float[Array, "T K"]]:
        tokens, own = self.within_device.back_with_weights(rows, of_rows)
        numbers = jnp.zeros((len(own), self.choices), own.dtype)
        numbers = jnp.put_along_axis(numbers, self.choice, own, axis=1, inplace=False)
        return self.to_device.back((tokens, numbers))[0]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["indices"],
    meta_fields=["num_experts", "alignment", "axes", "transport"],
)
@dataclass(frozen=True)
class DirectCourier:
    """Takes tokens to experts on any of the devices along `axes`; a `runtime.Courier`."""

    indices: Int32[Array, "T K"]
    """The experts of each token; `num_experts` for none."""
    num_experts: int
    alignment: int
    """Of the rows, see `group_rows`."""
    axes: Axes
    transport: Transport

    def send(
        self, tokens: PyTree[Shaped[Array, "T ..."]], weights: Float[Array, "T K"]
    ) -> tuple[DirectPlan, PyTree[Shaped[Array, "C ..."]], Float[Array, "C K"]]:
        """Send all that a token brings in one message; see `runtime.Courier`."""
        devices, (count, k) = lax.axis_size(self.axes), self.indices.shape
        per_device = self.num_experts // devices
        device = self.indices // per_device
        # Several experts on one device are one item: the first of them goes, the others go nowhere.
        again = (device[:, :, None] == device[:, None, :]) & jnp.tri(k, k=-1, dtype=bool)
        queues = line_up(jnp.where(again.any(axis=2), devices, device).reshape(-1), devices)
        to_device = hop(queues, count, count, 0, axis=self.axes, transport=self.transport)
        # Experts travel as numbers from 1, so that the zeros of unused rows mean none.
        experts = (self.indices + 1).astype(jnp.int16 if self.num_experts < 2**15 - 1 else jnp.int32)
        (tokens, weights, experts), _ = to_device.there((tokens, weights, experts))
        own = experts.astype(jnp.int32) - 1 - lax.axis_index(self.axes) * per_device
        own = jnp.where((own >= 0) & (own < per_device), own, per_device)
        # A token has no more than X of its K experts here: the rows of the others would be memory for nothing.
        choice = jnp.argsort(own, axis=1)[:, : min(k, per_device)].astype(jnp.int32)
        within = sort_by_expert(jnp.take_along_axis(own, choice, axis=1), per_device, self.alignment)
        return DirectPlan(to_device, within, choice, k), tokens, weights
