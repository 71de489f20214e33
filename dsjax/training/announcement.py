"""What a run shows before it starts: machine, mesh, model, data."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from dsjax.config import Config
from dsjax.data.tokens import TokenCache
from dsjax.model.causal_attention import resolve as resolve_attention
from dsjax.model.flops import parameter_count, peak
from dsjax.model.grouped_matmul import buffer_rows, default_alignment
from dsjax.model.grouped_matmul import resolve as resolve_grouped_matmul
from dsjax.pallas.choice import resolve as resolve_fp8
from dsjax.parallel.exchange import bytes_of_round, route_of
from dsjax.parallel.transport import resolve as resolve_transport
from dsjax.pipeline.simulate import simulate
from dsjax.pipeline.stages import stage_layout
from dsjax.pipeline.step import program_of
from dsjax.runtime import Runtime
from dsjax.training.progress import quantity
from dsjax.training.schedule import Schedule


def announce(console: Console, config: Config, runtime: Runtime, mesh: Mesh, data: TokenCache) -> None:
    """Show what the run is made of, before it starts."""
    device, count = jax.local_devices()[0], parameter_count(config.model)
    attention = resolve_attention(runtime.attention, device.platform, runtime.compute_dtype)
    dtype = jnp.dtype(runtime.compute_dtype).name
    products = f"grouped matmul {_grouped_matmul(config, runtime)}"
    if recipe := runtime.recipe:
        dtype = f"FP8 (E4M3) in tiles of 1 x {recipe.tile} with {dtype} between"
        impl = "xla" if recipe.tile != 128 else resolve_fp8(recipe.impl)
        why = ", as there is no Hopper GPU" if recipe.impl == "auto" and recipe.tile == 128 else ""
        by = {"xla": f"XLA{why}", "mosaic": "kernels for Hopper", "interpret": "kernels, interpreted"}
        products = f"FP8 products by {by[impl]}"
    console.print(f"device    {device.device_kind}, {dtype}; attention {attention}, {products}")
    _announce_mesh(console, config, mesh, runtime)
    console.print(f"peak      {peak(device)[1]}; MFU counts attention as causal")
    mtp = f", and {quantity(count.mtp)} in MTP modules" if count.mtp else ""
    console.print(
        f"model     {config.model.name}: {quantity(count.main)} parameters, {quantity(count.active)} active{mtp}"
    )
    epochs = Schedule(config).first_sequence(config.train.steps) * config.data.sequence_length / len(data.train)
    console.print(
        f"data      {config.data.source}: {data.train_documents} documents, {quantity(len(data.train))} tokens "
        f"({epochs:.2f} epochs in this run); {data.validation_documents} documents, "
        f"{quantity(len(data.validation))} tokens held out"
    )
    console.print(f"run       {config.run}, {config.train.steps} steps")


def _grouped_matmul(config: Config, runtime: Runtime) -> str:
    """Return the implementation of the experts' products in the compute format."""
    platform, model = jax.local_devices()[0].platform, config.model
    alignment, route = default_alignment(platform), route_of(config, tokens_of_device(config))
    rows = buffer_rows(route.devices * route.device_capacity, route.experts_of_device, alignment)
    dtype = jnp.dtype(runtime.compute_dtype)
    matrix = 2 * model.moe_intermediate_size * model.hidden_size * dtype.itemsize
    copied_bytes = rows // alignment * matrix
    return resolve_grouped_matmul(
        runtime.grouped_matmul, platform, dtype=dtype, alignment=alignment, copied_bytes=copied_bytes
    )


def _announce_pipeline(console: Console, config: Config) -> None:
    """Show the schedule of a step after the ramp. Raise ValueError if there is none for some step's micro-batches."""
    train = config.train
    sizes = Schedule(config).batch_sizes()
    # A schedule that cannot be is found before any step is compiled.
    *ramp, program = [program_of(config, size // (train.micro_batch_size or size)) for size in sizes]
    schedule = program.schedule
    if others := {p.schedule.name: p.schedule.micro_batches for p in ramp if p.schedule.name != schedule.name}:
        ((name, largest),) = others.items()
        console.print(f"pipeline  {name} in the batch ramp, up to {largest} micro-batches: {schedule.name} needs more")
    layers = ", ".join(map(str, stage_layout(config.model, schedule.route.stages).counts))
    timeline = simulate(schedule)
    bubble = max(timeline.bubble) / timeline.makespan
    console.print(
        f"pipeline  {schedule.name}, {schedule.ranks} ranks, {schedule.micro_batches} micro-batches in "
        f"{len(program.ticks)} ticks, bubble {bubble:.0%}; MoE layers of the stages: {layers}; a rank holds the "
        f"activations of {program.pools.residuals} micro-batches and {program.pools.tapes} waiting weight gradients"
    )


def tokens_of_device(config: Config) -> int:
    """Return how many tokens of a micro-batch a device gets."""
    micro_batch = config.train.micro_batch_size or config.train.batch_size
    return micro_batch * config.data.sequence_length // config.mesh.batch_shards


def _announce_mesh(console: Console, config: Config, mesh: Mesh, runtime: Runtime) -> None:
    """Show how the run is divided over devices, and how tokens travel."""
    if mesh.size == 1:
        if (idle := jax.device_count() - 1) and mesh.devices.flat[0].platform != "cpu":
            console.print(f"mesh      1 device; {idle} more are idle: --mesh.data, --mesh.node, --mesh.local use them")
        return
    processes = len({device.process_index for device in mesh.devices.flat})
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    console.print(f"mesh      {axes}: {mesh.size} devices in {processes} process{'es' if processes > 1 else ''}")
    if config.mesh.pipe > 1:
        _announce_pipeline(console, config)
    if config.mesh.expert_shards == 1:
        return
    tokens = tokens_of_device(config)
    route = route_of(config, tokens)
    slots = [
        f"{count} {what} of {capacity}"
        for what, count, capacity in (
            ("nodes", route.nodes, route.node_capacity),
            ("devices", route.devices, route.device_capacity),
        )
        if count > 1
    ]
    to_nodes, to_devices = bytes_of_round(
        route, config.model, jnp.dtype(runtime.compute_dtype).itemsize, runtime.recipe
    )
    transport = resolve_transport(route.transport, mesh.devices.flat[0].platform)
    console.print(
        f"exchange  {transport}; {tokens} tokens per device, slots for {', '.join(slots)}; a device sends "
        f"{quantity(to_nodes)}B to other nodes and {quantity(to_devices)}B within its own, per MoE layer and round"
    )


def peak_of_all(mesh: Mesh) -> float | None:
    """Return the peak FLOP/s of all devices together, None where it is not known; simulated ones share their CPU."""
    device = mesh.devices.flat[0]
    of_one, _ = peak(device)
    count = len({d.process_index for d in mesh.devices.flat}) if device.platform == "cpu" else mesh.size
    return of_one and of_one * count
