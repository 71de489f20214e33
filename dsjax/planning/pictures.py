"""A plan as a picture: what takes memory on the devices of each rank, and the step in time."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dsjax.pipeline.draw import COLOURS, NAMES
from dsjax.planning.memory import CATEGORIES
from dsjax.planning.report import Report

GROUPS = {
    "weights and gradients": ("weights_fp8", "weights_16bit", "gradients", "edges", "router_biases"),
    "their second copy": ("second_copy",),
    "master weights, moments": ("master_weights", "moments"),
    "activations": ("activations",),
    "deferred gradients": ("deferred_gradients",),
    "buffers and work": ("messages", "tokens", "communication_buffers", "working_set"),
}
"""Categories of `planning.memory`, a colour each."""
HUES = ("#2F6DA8", "#B5D3EC", "#7B6BA8", "#E8A33D", "#1E8A6B", "#9AA3AF")

assert sorted(sum(GROUPS.values(), ())) == sorted(CATEGORIES)


def draw_plan(report: Report, file: Path) -> None:
    """Write the picture of a plan, PNG or SVG by the file's name."""
    ranks = report.config.mesh.pipe
    figure = Figure(figsize=(13, 2.4 + 0.28 * ranks), layout="constrained")
    memory, time = figure.subplots(1, 2, width_ratios=(1, 1.5))
    _draw_memory(memory, report)
    _draw_time(time, report)
    figure.suptitle(
        f"{report.config.model.name} on {report.config.mesh.devices} x {report.chip.name}",
        fontsize=12,
        x=0.01,
        ha="left",
    )
    figure.savefig(file, dpi=150)


def _draw_memory(axes: Axes, report: Report) -> None:
    """Draw a bar for each rank; what its own layers do not fill is pale."""
    held, used = report.memory.device, report.memory.used_by_rank
    for rank in range(report.config.mesh.pipe):
        left = 0.0
        for (_, names), hue in zip(GROUPS.items(), HUES, strict=True):
            whole = sum(held[name] for name in names) / 1e9
            filled = sum(used[rank].get(name, held[name]) for name in names) / 1e9
            axes.barh(rank, filled, left=left, color=hue)
            axes.barh(rank, whole - filled, left=left + filled, color=hue, alpha=0.25)
            left += whole
    axes.axvline(report.chip.memory_bytes / 1e9, color="#1F2328", linewidth=1)
    axes.set(xlabel="GB of a device; pale: not filled by the rank's own layers", ylabel="rank", title="Memory")
    axes.invert_yaxis()
    handles = [Patch(color=hue, label=name) for name, hue in zip(GROUPS, HUES, strict=True)]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, fontsize=8, frameon=False)


def _draw_time(axes: Axes, report: Report) -> None:
    model = report.models["program"]
    for span in model.timeline.spans:
        height = 0.8 / len(span.action)
        for place, op in enumerate(span.action):
            fill = COLOURS[op.kind][op.slot % 2][0]
            axes.barh(
                span.rank - 0.4 + height * (place + 0.5), span.end - span.start, height, left=span.start, color=fill
            )
    step = model.step()
    axes.axvspan(step.pipeline, step.total, color="#9AA3AF", alpha=0.5, linewidth=0)
    axes.set(xlabel="seconds, estimated; grey: gradients and weights", title="A step of the program")
    axes.invert_yaxis()
    handles = [Patch(color=COLOURS[kind][0][0], label=NAMES[kind]) for kind in COLOURS]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, fontsize=8, frameon=False)
