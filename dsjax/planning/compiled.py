"""XLA's own figures of a run's step, made for GPUs that are not there: all that it decides before machine code."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.config import Config
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.sharding import batch_spec
from dsjax.parallel.xla_flags import compiler_options
from dsjax.planning.aot import COMPILER_OPTIONS, HopperName, gpu_devices, require_plugin
from dsjax.planning.chips import CHIPS
from dsjax.planning.hlo import Collective, collectives
from dsjax.planning.memory import Memory
from dsjax.planning.scheduled import Options, Scheduled, scheduled
from dsjax.runtime import runtime_of
from dsjax.training.state import drawn_state, state_shardings
from dsjax.training.step import Knobs, make_train_step

QUICK = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
"""Which of the products' kernels is fastest changes neither memory nor order."""


@dataclass(frozen=True)
class Compiled:
    """A step as XLA would run it."""

    argument_bytes: int
    """State, tokens: of each device."""
    temporary_bytes: int
    """All else that exists at once."""
    hidden_all_to_all: float
    """Of the bytes that pairs of a forward and a backward pass send by all-to-all, the share with products in flight;
    0 where there are none."""
    collectives: dict[str, int]
    """How many of each kind, by what the program calls them: see `purpose`."""
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    """Of the process that compiles."""

    @property
    def total_bytes(self) -> int:
        """What the program needs of each device; results take the place of arguments."""
        return self.argument_bytes + self.temporary_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return asdict(self) | {"total_bytes": self.total_bytes}

    def lines(self, planned: Memory) -> Iterator[str]:
        """Write the figures for people, beside those of the plan."""
        state = sum(planned.device[name] for name in ("master_weights", "moments", "router_biases", "tokens"))
        rows = (
            ("state and tokens", state, self.argument_bytes),
            ("all else", planned.total - state, self.temporary_bytes),
            ("together", planned.total, self.total_bytes),
        )
        yield (
            f"compiled  by XLA up to machine code, which is not made, in {self.seconds:.0f} s "
            f"({self.cpu_seconds:.0f} s of CPU time) and {self.peak_rss_bytes / 1e9:.1f} GB"
        )
        yield f"  {'GB of each device':22}{'planned':>9}{'XLA':>9}"
        for name, plan, xla in rows:
            yield f"  {name:22}{plan / 1e9:9.2f}{xla / 1e9:9.2f}"
        if self.hidden_all_to_all:
            yield f"  Of the all-to-all bytes in pairs {self.hidden_all_to_all:.1%} have products in flight."
        found = ", ".join(f"{count} {what}" for what, count in sorted(self.collectives.items()))
        yield f"  collectives: {found}"


def compile_step(config: Config, chip: HopperName) -> Compiled:
    """Return XLA's figures of the training step of a run; for errors see `scheduled_step`."""
    made = scheduled_step(config, chip)
    found = collectives(made.text)
    pairs = [c for c in found if c.kind == "all-to-all" and "pair" in c.op_name and "overflow" not in c.op_name]
    sent = sum(c.nbytes for c in pairs)
    return Compiled(
        argument_bytes=made.argument_bytes,
        temporary_bytes=made.temporary_bytes,
        hidden_all_to_all=sum(c.nbytes for c in pairs if c.products) / sent if sent else 0.0,
        collectives=dict(Counter(f"{c.kind} ({purpose(c)})" for c in found)),
        seconds=made.seconds,
        cpu_seconds=made.cpu_seconds,
        peak_rss_bytes=made.peak_rss_bytes,
    )


def scheduled_step(config: Config, chip: HopperName) -> Scheduled:
    """Have XLA compile the training step of a run for its number of GPUs, up to machine code.

    Raises:
        ValueError: the devices are no whole nodes.
        RuntimeError: the CUDA plugin is not installed.
        ChildProcessError: XLA failed, or memory was out.
    """
    per_node = _per_node(config, chip)
    if config.mesh.devices % per_node:
        raise ValueError(f"{config.mesh.devices} devices: must be a multiple of {per_node}, those of a node")
    require_plugin()
    return scheduled(_compile, config, chip)


def _compile(options: Options, config: Config, chip: HopperName) -> None:
    train, per_node = config.train, _per_node(config, chip)
    jax.config.update("jax_platforms", "cpu")  # no GPU is asked, also where there is one
    with gpu_devices(config.mesh.devices // per_node, per_node, chip) as devices:
        mesh = make_mesh(config.mesh, devices)
        state = jax.eval_shape(lambda: drawn_state(config))
        state = jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
            state,
            state_shardings(state, mesh),
        )
        micro_batch = train.micro_batch_size or train.batch_size
        shape = train.batch_size // micro_batch, micro_batch, config.data.sequence_length + 1
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, batch_spec(3, axis=1)))
        number = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
        step = make_train_step(config, runtime_of(config), mesh, end_of_document=0)
        lowered = step.lower(state, tokens, Knobs(number, number, number))
        flags = compiler_options(config, "gpu")
        lowered.compile(compiler_options=COMPILER_OPTIONS | QUICK | flags | options)


def _per_node(config: Config, chip: HopperName) -> int:
    return min(CHIPS[chip].devices_per_node, config.mesh.devices)


def purpose(collective: Collective) -> str:
    """Return what a collective is for, by the scopes of the program that was traced; "unnamed" for XLA's own."""
    words = {
        "overflow": "expert exchange, overflow",
        "dispatch": "expert exchange",
        "combine": "expert exchange",
    }
    name = collective.op_name
    for word, what in words.items():
        if word in name:
            return what
    kinds = {
        "all-gather": "weights",
        "reduce-scatter": "gradients",
        "collective-permute": "between stages",
        "all-reduce": "sums",
        "all-to-all": "other",
    }
    return kinds.get(collective.kind, "other") if name else "unnamed"
