"""How the devices of a unit divide the work of inference (report section 3.4), and where its arrays live.

The devices form a mesh of three axes. Those along `tensor` are a group: they serve the same requests, each computes
some of the heads, and outside of attention each has some of the tokens (sequence parallelism). Groups lie along `data`,
and these along `node`; each has requests and a cache of its own. The experts of a layer are divided over all devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, PyTree

from dsjax.config import ModelConfig
from dsjax.inference.settings import EngineSettings

AXES = ("node", "data", "tensor")
GROUPS = ("node", "data")
"""Axes along which groups lie: what belongs to requests is divided over them."""
TENSOR = "tensor"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Devices of a unit, and how they share the experts."""

    node: int = 1
    """Nodes."""
    data: int = 1
    """Groups of devices in a node."""
    tensor: int = 1
    """Devices of a group."""
    slots: int = 0
    """Experts that a device has room for, in each layer; 0 for as many as it takes to have each once."""
    shared_as_routed: bool = False
    """Whether the shared expert is one of the routed, which every token chooses, and has slots like them."""
    replicas: Literal["even", "balanced"] = "even"
    """Which replica of its expert a token goes to: one after the other, or, decided anew in each layer of each pass, so
    that the fullest device has least to do (dynamic redundancy)."""
    active: int = 0
    """Most experts that a device uses in a layer of a pass, where replicas are balanced; 0 for as many as it has."""
    rebalance: int = 0
    """Steps after which experts are placed anew by the loads that were seen; 0 for never."""
    micro_batches: int = 1
    """Parts of a pass: of two, one computes while the other's tokens travel."""

    def __post_init__(self) -> None:
        """Raises ValueError for what no model can have."""
        for name, low in {"node": 1, "data": 1, "tensor": 1, "slots": 0, "active": 0, "rebalance": 0}.items():
            if getattr(self, name) < low:
                raise ValueError(f"layout.{name} = {getattr(self, name)}: must be at least {low}")
        if self.active and self.replicas != "balanced":
            raise ValueError(f"layout.active = {self.active}: needs layout.replicas = 'balanced'")
        if self.micro_batches not in (1, 2):
            raise ValueError(f"layout.micro_batches = {self.micro_batches}: must be 1 or 2")

    @property
    def devices(self) -> int:
        """Devices of the unit."""
        return self.node * self.data * self.tensor

    @property
    def groups(self) -> int:
        """Groups of devices."""
        return self.node * self.data

    def experts(self, model: ModelConfig) -> int:
        """Return the experts of a layer that have slots."""
        return model.n_routed_experts + self.shared_as_routed

    def total_slots(self, model: ModelConfig) -> int:
        """Return the slots of a layer, on all devices."""
        return self.devices * (self.slots or -(-self.experts(model) // self.devices))

    def is_plain(self, model: ModelConfig) -> bool:
        """Whether every expert has one slot, in their order."""
        return not self.shared_as_routed and self.total_slots(model) == model.n_routed_experts

    def check(self, model: ModelConfig) -> None:
        """Raises ValueError for what the model cannot have."""
        if model.num_attention_heads % self.tensor:
            raise ValueError(
                f"layout.tensor = {self.tensor}: must divide model.num_attention_heads = {model.num_attention_heads}"
            )
        if model.vocab_size % self.tensor:
            raise ValueError(f"layout.tensor = {self.tensor}: must divide model.vocab_size = {model.vocab_size}")
        if self.total_slots(model) < self.experts(model):
            raise ValueError(
                f"layout.slots = {self.slots} on each of {self.devices} devices: must be at least the "
                f"{self.experts(model)} experts of a layer in all"
            )
        if self.shared_as_routed and model.n_shared_experts != 1:
            raise ValueError(
                f"layout.shared_as_routed = True: needs model.n_shared_experts = 1, not {model.n_shared_experts}"
            )
        if self.devices == 1 and not self.is_plain(model):
            raise ValueError(f"layout.slots = {self.slots} on a single device: must be 0, and without shared_as_routed")
        if self.is_plain(model) and (self.replicas == "balanced" or self.rebalance):
            name, value = ("replicas", "balanced") if self.replicas == "balanced" else ("rebalance", self.rebalance)
            raise ValueError(f"layout.{name} = {value!r}: needs more slots than experts; raise layout.slots")


def mesh_of(layout: Layout, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of a unit.

    Args:
        devices: by default the first of all that there are.

    Raises:
        ValueError: there are too few, or some processes of the run have none of them.
    """
    given, devices = devices, jax.devices() if devices is None else devices
    if len(devices) < layout.devices:
        raise ValueError(f"{_spelled(layout)}: there are {len(devices)}")
    holders = {device.process_index for device in devices[: layout.devices]}
    if len(holders) < jax.process_count() and (given is None or holders != {jax.process_index()}):
        raise ValueError(f"{_spelled(layout)}: {jax.process_count()} processes have {len(devices)}, and must share all")
    shape = layout.node, layout.data, layout.tensor
    return jax.make_mesh(shape, AXES, devices=devices[: layout.devices], axis_types=(AxisType.Auto,) * len(AXES))


def _spelled(layout: Layout) -> str:
    sizes = " x ".join(f"layout.{axis}" for axis in AXES)
    return f"{sizes} = {layout.node} x {layout.data} x {layout.tensor} = {layout.devices} devices"


WEIGHTS = {"q": (1, TENSOR), "q_b": (1, TENSOR), "kv_b": (1, TENSOR), "o": (2, TENSOR), "head": (0, TENSOR)}
"""By the name of a stacked array, which of its axes is divided along which of the mesh: those of heads, and of the
vocabulary."""
EXPERTS = (1, AXES)
"""The same of routed experts; all other weights are whole on every device."""


def weight_spec(path: tuple) -> PartitionSpec:
    """Return how the weight at `path` of a tree of stacked parameters is divided."""
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    found = EXPERTS if "experts" in names else WEIGHTS.get(names[-1])
    if found is None:
        return PartitionSpec()
    axis, over = found
    return PartitionSpec(*[None] * axis, over)


def weight_specs(params: PyTree) -> PyTree:
    """Return how all weights are divided."""
    return jax.tree_util.tree_map_with_path(lambda path, _: weight_spec(path), params)


def check_engine(engine: EngineSettings, layout: Layout) -> None:
    """Raises ValueError for settings that cannot be divided over the groups of a layout, or the devices of a group."""
    if engine.slots % layout.groups:
        raise ValueError(
            f"engine.slots = {engine.slots}: must be a multiple of layout.node x layout.data = {layout.groups} groups"
        )
    if engine.prefill_tokens % layout.tensor:
        raise ValueError(
            f"engine.prefill_tokens = {engine.prefill_tokens}: must be a multiple of layout.tensor = {layout.tensor}"
        )


def placed(tree: PyTree, specs: PyTree, mesh: Mesh) -> PyTree:
    """Return arrays where their specs say, see `put`."""
    return jax.tree.map(lambda leaf, spec: put(leaf, NamedSharding(mesh, spec)), tree, specs)


def put(tree: PyTree, sharding: Sharding) -> PyTree:
    """Return arrays where a sharding says. Of several processes all give the same, and each puts what it holds of it:
    `jax.device_put` would ask the others each time whether they do."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def own(leaf: Array | np.ndarray) -> Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(own, tree)
