"""What a deployment will cost, for people as lines, for programs as nested plain values."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax

from dsjax.inference.deployment import Deployment
from dsjax.parallel.xla_flags import MEMORY_SHARE
from dsjax.planning.chips import ChipName
from dsjax.planning.serving import ServingReport, report_of_serving
from dsjax.settings import load_run


@dataclass(frozen=True)
class ServingPlan:
    """Say what a deployment needs of each device, and how many tokens it reads or writes per second; nothing runs."""

    chip: ChipName = "h800"
    """Device to plan for; the rates are measured on `h800` and scaled to others by their data sheets."""
    json: bool = False
    """Whether to print JSON."""


def show_plan(argv: Sequence[str]) -> None:
    """Print the plan of the deployment that a command line names.

    Raises:
        ValueError: one line about the first thing that is wrong.
    """
    jax.config.update("jax_platforms", "cpu")  # plans are made where there is no accelerator, and beside its users
    deployment, options = load_run(argv, ServingPlan, "plan", Deployment)
    report = report_of_serving(deployment, options.chip)
    print(json.dumps(as_dict(report), indent=2) if options.json else "\n".join(lines(report)))


def lines(report: ServingReport) -> Iterator[str]:
    """Write a report for people."""
    deployment, layout, chip = report.deployment, report.deployment.layout, report.chip
    model, engine = deployment.model, deployment.engine
    yield (
        f"{model.name} on {layout.devices} {chip.name}: {layout.groups} groups of {layout.tensor}, "
        f"{layout.total_slots(model)} slots for {layout.experts(model)} experts of a layer, "
        f"{'fp8' if deployment.precision == 'fp8' else 'bf16'}"
    )
    yield ""
    unit, size_of = ("GB", 1e9) if report.total >= 1e9 else ("MB", 1e6)
    yield f"memory of a device                     {unit}"
    for name, size in report.memory.items():
        yield f"  {name:34}{size / size_of:7.2f}"
    room = chip.memory_bytes * MEMORY_SHARE
    yield f"  {'together':34}{report.total / size_of:7.2f}  of {room / 1e9:.1f} GB"
    if not report.fits:
        yield f"  does not fit: lower engine.slots = {engine.slots} or engine.context, or set engine.cache_bytes"
    yield ""
    what = f"{report.tokens} tokens of a device" if deployment.work == "prefill" else f"{report.tokens} requests of one"
    unit, length = ("ms", 1e-3) if max(report.parts.values()) >= 1e-4 else ("us", 1e-6)
    yield f"a layer of {what}, {unit} (estimates from published rates)"
    for name, seconds in report.parts.items():
        yield f"  {name:34}{seconds / length:7.3f}"
    how = "beside each other" if layout.micro_batches == 2 else "one after the other"
    yield f"  Computing and network {how}, {model.num_hidden_layers} layers: {report.pass_seconds / length:.1f} {unit}"
    yield ""
    rate = report.tokens_per_s_per_device
    yield f"{deployment.work}: {rate:,.0f} tokens/s per device, {rate * layout.devices:,.0f} in all"
    if deployment.work == "decode":
        yield f"  {1 / report.pass_seconds:.1f} tokens/s for each of {engine.slots} requests of {engine.context} tokens"
    if report.published:
        yield f"  {report.published}"


def as_dict(report: ServingReport) -> dict[str, Any]:
    """Return a report as plain values."""
    return {
        "devices": report.deployment.layout.devices,
        "chip": report.chip.name,
        "work": report.deployment.work,
        "memory_bytes": report.memory,
        "memory_bytes_total": report.total,
        "fits": report.fits,
        "layer_seconds": report.parts,
        "pass_seconds": report.pass_seconds,
        "tokens_per_s_per_gpu": report.tokens_per_s_per_device,
        "layout": asdict(report.deployment.layout),
    }
