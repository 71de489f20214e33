"""What a run will cost, put together: for people as lines, for programs as nested plain values."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from dsjax.config import Config
from dsjax.parallel.xla_flags import MEMORY_SHARE
from dsjax.planning.aot import traced_for
from dsjax.planning.chips import CHIPS, Chip, ChipName
from dsjax.planning.cost import CostModel, Hop, StepTime
from dsjax.planning.memory import CATEGORIES, Memory, memory_of
from dsjax.planning.pipeline import pipeline, pipeline_lines
from dsjax.planning.rates import published
from dsjax.runtime import runtime_of


@dataclass(frozen=True)
class Report:
    """A run on a chip."""

    config: Config
    chip: Chip
    memory: Memory
    models: dict[str, CostModel]
    """By system, see `planning.cost`."""
    pipeline: dict[str, Any] | None
    """See `planning.pipeline`."""

    @property
    def room(self) -> float:
        """Bytes of a device that the run may take."""
        return self.chip.memory_bytes * MEMORY_SHARE

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.room


def on_devices(config: Config, devices: int) -> Config:
    """Return the run on another number of devices: with more or fewer copies of all experts, each with as many
    sequences of a micro-batch as before.

    Raises:
        ValueError: no number of copies has so many devices.
    """
    mesh, train = config.mesh, config.train
    copy = mesh.pipe * mesh.node * mesh.local
    if devices < 1 or devices % copy:
        raise ValueError(
            f"devices = {devices}: must be a multiple of mesh.pipe x mesh.node x mesh.local = {copy}: what is left is "
            "mesh.data"
        )
    data = devices // copy
    micro_batch = train.micro_batch_size * data // mesh.data
    return replace(config, mesh=replace(mesh, data=data), train=replace(train, micro_batch_size=micro_batch))


def report_of(config: Config, chip: ChipName) -> Report:
    """Return what a run costs on a chip.

    Raises:
        ValueError: settings that no program can be made for.
    """
    on, figures = CHIPS[chip], pipeline(config)
    with traced_for(on):
        memory = memory_of(config, runtime_of(config))
    rates = published(on, fp8=config.precision in ("fp8", "mxfp8"))
    models = {system: CostModel(config, on, rates, memory, system) for system in ("report", "program")}
    return Report(config, on, memory, models, figures)


def as_dict(report: Report) -> dict[str, Any]:
    """Return the report as plain values; figures at the top are those at the report's rates, in SI units."""
    steps = {system: model.step() for system, model in report.models.items()}
    model = report.models["program"]
    return {
        "chip": asdict(report.chip),
        "devices": report.config.mesh.devices,
        "mesh": asdict(report.config.mesh),
        "tokens_per_s_per_gpu": steps["report"].tokens_per_s_per_gpu,
        "step_time_s": steps["report"].total,
        "mfu": steps["report"].mfu,
        "memory_bytes_total": report.memory.total,
        "memory_bytes": report.memory.device,
        "memory_fits": report.fits,
        "memory_used_by_rank": report.memory.used_by_rank,
        "host_memory_bytes": report.memory.host,
        "estimates": {system: {"step_time_s": step.total} | asdict(step) for system, step in steps.items()},
        "layer_s": asdict(model.layer) | {"pair": model.pair},
        "hops": [hop._asdict() for hop in hops(report)],
        "pipeline": report.pipeline,
    }


def hops(report: Report) -> list[Hop]:
    """Return what a device sends, and how long it takes: per MoE layer and micro-batch, and between stages."""
    model = report.models["program"]
    sent = [
        hop._replace(where=f"{part.replace('_', ' of ')}, {hop.where}")
        for part in model.rates.exchange
        for hop in model.hops(part)
    ]
    if report.config.mesh.pipe > 1:
        sent.append(Hop("to the next stage", report.memory.activation_bytes, model.transfer))
    return sent


def lines(report: Report) -> Iterator[str]:
    """Write the report for people."""
    config, chip, memory = report.config, report.chip, report.memory
    mesh = " x ".join(f"{axis} {getattr(config.mesh, axis)}" for axis in ("pipe", "data", "node", "local"))
    tokens = config.train.batch_size * config.data.sequence_length
    yield f"run       {config.model.name}, {config.precision}, {amount(tokens, '')} tokens a step"
    yield f"devices   {config.mesh.devices} x {chip.name}: {mesh}"
    yield from pipeline_lines(report.pipeline)
    yield ""
    yield from _memory_lines(report)
    yield ""
    yield from _time_lines(report)
    if not report.fits:
        yield ""
        yield f"It does not fit: {amount(memory.total, 'B')} of {amount(report.room, 'B')}. What saves memory:"
        yield from (f"  {line}" for line in advice(report))


def _memory_lines(report: Report) -> Iterator[str]:
    memory, chip = report.memory, report.chip
    yield "memory    of each device"
    for name, what in CATEGORIES.items():
        if memory.device[name]:
            yield f"  {name.replace('_', ' '):22}{amount(memory.device[name], 'B'):>9}   {what}"
    verdict = "fits" if report.fits else "does not fit"
    yield (
        f"  {'together':22}{amount(memory.total, 'B'):>9}   {verdict}: {amount(chip.memory_bytes, 'B')}, of which "
        f"a run may take {amount(report.room, 'B')}"
    )
    if host := sum(memory.host.values()):
        yield f"  {'in host memory':22}{amount(host, 'B'):>9}   moving average, and a copy on its way"
    yield f"  A layer keeps {amount(memory.residuals_per_token, 'B')} of activations per token of a device."


def _time_lines(report: Report) -> Iterator[str]:
    names = {"report": "as the report's system", "program": "as the program of dsjax"}
    yield "time      estimates, at the rates of DeepSeek's published profile, scaled by data sheets"
    yield f"  {'':24}{'tokens/s/GPU':>13}{'step':>10}{'MFU':>7}{'bubble':>8}{'update':>10}"
    for system, model in report.models.items():
        step: StepTime = model.step()
        yield (
            f"  {names[system]:24}{step.tokens_per_s_per_gpu:13,.0f}{amount(step.total, 's'):>10}{step.mfu:7.1%}"
            f"{step.bubble / step.pipeline:8.1%}{amount(step.update, 's'):>10}"
        )
    model = report.models["program"]
    layer, ends = model.layer, model.ends
    passes = {"F": layer.forward, "I": layer.backward_input, "W": layer.backward_weight}
    yield "  a layer computes " + ", ".join(f"{name} {amount(seconds, 's')}" for name, seconds in passes.items())
    if report.config.mesh.pipe > 1:
        yield f"  a layer's F beside one's B {amount(model.pair, 's')}"
        first = f"{amount(ends.first_forward, 's')} in F and {amount(ends.first_backward, 's')} in B"
        yield f"  besides its layers, the first stage takes {first}, the last {amount(ends.last, 's')} in F"
    for where, nbytes, seconds in hops(report):
        yield f"  {where:36}{amount(nbytes, 'B'):>9}{amount(seconds, 's'):>10}"


def advice(report: Report) -> list[str]:
    """Return settings that save memory, with what they save by arithmetic, most first."""
    config, held = report.config, report.memory.device
    found: list[tuple[float, str]] = []
    tapes = max((rank["deferred_gradients"] for rank in report.memory.used_by_rank), default=0)
    if config.mesh.pipe > 1 and config.pipeline.max_deferred != 1 and tapes:
        depth = report.pipeline["buffers"]["tapes"]
        if depth > 1:
            found.append((held["deferred_gradients"] * (1 - 1 / depth), "--pipeline.max-deferred 1"))
    sequences = (config.train.micro_batch_size or config.train.batch_size) // config.mesh.batch_shards
    waiting = held["activations"] + held["deferred_gradients"]
    work = held["working_set"] + held["communication_buffers"]
    if sequences > 1:
        smaller = config.train.micro_batch_size // sequences or config.mesh.batch_shards
        found.append(((waiting + work) * (1 - 1 / sequences), f"--train.micro-batch-size {smaller}"))
    if config.precision not in ("fp8", "mxfp8") and report.chip.fp8_flops:
        found.append((waiting * 0.45 + held["weights_16bit"] * 0.45, "--precision fp8"))
    if config.train.remat != "full":
        found.append((held["activations"] * 0.8, "--train.remat full, which computes every layer once more"))
    experts = config.model.n_routed_experts // config.mesh.expert_shards
    if experts > 1:
        share = report.models["program"].expert_share
        weights = held["weights_fp8"] + held["weights_16bit"] + held["gradients"] + held["second_copy"]
        saved = weights * share / 2
        found.append((saved, f"--mesh.node {config.mesh.node * 2}: fewer experts on a device"))
    if held["second_copy"]:
        found.append((held["second_copy"], "--pipeline.schedule dualpipev: weights once, with half as many ranks"))
    return [f"{amount(saved, 'B'):>8}  {change}" for saved, change in sorted(found, reverse=True)]


def amount(value: float, unit: str) -> str:
    """Return a figure in the unit of its size: 1.9 GB, 58.7 MB, 1.17 ms."""
    steps = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3), ("", 1), ("m", 1e-3), ("u", 1e-6), ("n", 1e-9))
    least = 1e-9 if unit == "s" else 1
    prefix, size = next(((p, s) for p, s in steps if value >= s >= least and (unit != "s" or s <= 1)), ("", 1))
    return f"{value / size:.3g} {prefix}{unit}"
