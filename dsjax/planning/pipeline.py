"""What a run's pipeline does, in units of a forward pass: who runs what, how long ranks wait, what they hold."""

from collections.abc import Iterator
from typing import Any

from dsjax.config import Config
from dsjax.pipeline.program import compile_program
from dsjax.pipeline.simulate import Timeline, peak_activations, peak_deferred, simulate, simulate_ticks
from dsjax.pipeline.stages import schedule_of, stage_layout
from dsjax.training.schedule import Schedule


def pipeline(config: Config) -> dict[str, Any] | None:
    """Return a pipeline's figures after the batch ramp, by stage or rank, in units of an F; None without a pipeline.

    Raises:
        ValueError: too few layers, or micro-batches of some step that have no schedule.
    """
    if config.mesh.pipe == 1:
        return None
    sizes = Schedule(config).batch_sizes()
    *ramp, schedule = [schedule_of(config, size // (config.train.micro_batch_size or size)) for size in sizes]
    program, route = compile_program(schedule), schedule.route
    layout, dense = stage_layout(config.model, route.stages), config.model.first_k_dense_replace

    def time(line: Timeline) -> dict[str, Any]:
        return {"makespan": line.makespan, "bubble": line.bubble, "bubble_share": max(line.bubble) / line.makespan}

    return {
        "schedule": schedule.name,
        "ranks": route.ranks,
        "micro_batches": schedule.micro_batches,
        "batch_ramp": [[step.name, step.micro_batches] for step in ramp],
        "moe_layers": [[dense + layer for layer in layout.layers(stage)] for stage in range(route.stages)],
        "stages": [[route.stage(rank, slot) for slot in range(route.slots)] for rank in range(route.ranks)],
        "time": time(simulate(schedule)),
        "peak_activations": peak_activations(schedule),
        "peak_deferred": peak_deferred(schedule),
        "compiled_time": time(simulate_ticks(schedule, program.ticks)),
        "ticks": len(program.ticks),
        "segments": [[start, stop, [len(p.opcodes) for p in phases]] for start, stop, phases in program.segments],
        "buffers": program.pools._asdict(),
    }


def pipeline_lines(plan: dict[str, Any] | None) -> Iterator[str]:
    """Write a pipeline's figures for people."""
    if plan is None:
        yield "pipeline  none, mesh.pipe = 1: micro-batches follow one another"
        return

    def time(of: dict[str, Any]) -> str:
        return f"{of['makespan']:g} units, bubble {max(of['bubble']):g} ({of['bubble_share']:.1%})"

    segments = (f"{start} to {stop - 1} ({'+'.join(map(str, codes))})" for start, stop, codes in plan["segments"])
    yield f"pipeline  {plan['schedule']}, {plan['ranks']} ranks, {plan['micro_batches']} micro-batches"
    if plan["batch_ramp"]:
        yield "ramp      " + ", ".join(f"{count} ({name})" for name, count in plan["batch_ramp"]) + " micro-batches"
    yield f"time      {time(plan['time'])}; F = I = W = 1, B = 2, F&B = 3"
    yield f"compiled  {time(plan['compiled_time'])}; {plan['ticks']} ticks (and opcodes): {', '.join(segments)}"
    yield f"buffers   {', '.join(f'{name} {depth}' for name, depth in plan['buffers'].items())}"
    moe = plan["moe_layers"]
    for rank, stages in enumerate(plan["stages"]):
        own = ", ".join(f"{stage} (layers {moe[stage][0]} to {moe[stage][-1]})" for stage in stages)
        held = f"holds {plan['peak_activations'][rank]} activations, {plan['peak_deferred'][rank]} deferred W"
        yield f"rank {rank:<4} stage {own}; waits {plan['time']['bubble'][rank]:g} units, {held}"
