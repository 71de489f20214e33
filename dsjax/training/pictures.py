"""The pictures of a run, drawn from its `metrics.jsonl`: losses, expert load, schedule and health."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from dsjax.parallel.placement import Placement, plan_placement
from dsjax.training.metrics import Record
from dsjax.training.progress import quantity

# Okabe and Ito's palette, which readers with any colour vision can tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#6B7280"


def draw_pictures(folder: Path, records: Sequence[Record], baselines: Mapping[str, float], layers: Sequence[str]):
    """Draws `loss.png`, `expert_load.png`, `expert_placement.png` and `schedule.png` into `folder`.

    baselines: nats per token by name, drawn as horizontal lines. layers: names of the layers with routed experts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _save(loss_picture(records, baselines), folder / "loss.png")
    _save(schedule_picture(records), folder / "schedule.png")
    if layers:
        _save(expert_load_picture(records, layers), folder / "expert_load.png")
    if records[-1]["expert_load_over_mean_last_layer"]:
        _save(placement_picture(records), folder / "expert_placement.png")


def loss_picture(records: Sequence[Record], baselines: Mapping[str, float]) -> Figure:
    """Training and validation losses against the step."""
    figure, (axes,) = _figure(1, height=5.2)
    steps, loss = _series(records, "loss")
    axes.plot(steps, loss, color=BLUE, alpha=0.22, linewidth=0.9)
    axes.plot(steps, _smooth(loss), color=BLUE, linewidth=1.6, label="training")
    mtp_steps, mtp = _series(records, "loss_mtp")
    if np.any(mtp):
        axes.plot(mtp_steps, _smooth(mtp), color=GREY, linewidth=1.1, linestyle=(0, (1, 1.2)), label="training, MTP")
    curves = (("val_loss", "validation", ORANGE, "o"), ("val_loss_ema", "validation, averaged weights", GREEN, "D"))
    for key, label, color, marker in curves:
        at, values = _series(records, key)
        if len(at):
            label = f"{label}: {values[-1]:.3f}"
            axes.plot(at, values, color=color, marker=marker, markersize=4.5, linewidth=1.6, label=label)
    for name, value in baselines.items():
        axes.axhline(value, color=GREY, linewidth=1, linestyle=(0, (6, 3)), zorder=1)
        axes.annotate(
            f"{name}: {value:.3f}", (1, value), xycoords=("axes fraction", "data"), xytext=(-4, 3),
            textcoords="offset points", ha="right", va="bottom", color=GREY, fontsize=9,
        )  # fmt: skip
    _mark_skipped(axes, records)
    axes.set_ylim(*_loss_limits(loss, mtp, [*_series(records, "val_loss")[1], *baselines.values()]))
    axes.set_ylabel("nats per token")
    axes.set_title("Loss", loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 1.0))
    _token_axis(axes, records)
    return figure


def expert_load_picture(records: Sequence[Record], layers: Sequence[str]) -> Figure:
    """Heat maps over time: the busiest expert of each layer, and every expert of the last main layer."""
    records = [record for record in records if record["expert_load_max_over_mean_per_layer"]]
    per_layer = np.array([record["expert_load_max_over_mean_per_layer"] for record in records]).T
    experts = np.array([record["expert_load_over_mean_last_layer"] for record in records]).T
    figure = _blank_figure(height=3.6 + 0.28 * len(layers) + 3.2)
    top, bottom = figure.subplots(2, 1, height_ratios=[0.28 * len(layers) + 1.2, 3.2], sharex=True)
    edges = _edges([record["step"] for record in records])
    mesh = top.pcolormesh(
        edges, np.arange(len(layers) + 1), per_layer, cmap="magma_r", vmin=1, vmax=_ceiling(per_layer)
    )
    every = -(-len(layers) // 16)
    top.set_yticks(np.arange(0, len(layers), every) + 0.5, layers[::every])
    top.invert_yaxis()
    top.set_title("Load of the busiest expert of each layer", loc="left", fontweight="bold")
    figure.colorbar(mesh, ax=top, label="max / mean", extend="max", pad=0.015)
    last = [name for name in layers if not name.startswith("MTP")][-1:]
    spread = max(0.5, _ceiling(experts) - 1)
    mesh = bottom.pcolormesh(
        edges, np.arange(len(experts) + 1), experts, cmap="RdBu_r", vmin=1 - spread, vmax=1 + spread
    )
    bottom.yaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set(xlabel="step", ylabel="expert")
    bottom.set_title(f"Load of every expert of {last[0]}" if last else "", loc="left", fontweight="bold")
    figure.colorbar(mesh, ax=bottom, label="load / mean", extend="max", pad=0.015)
    for axes in (top, bottom):
        axes.spines[:].set_visible(False)
    return figure


def placement_picture(records: Sequence[Record]) -> Figure:
    """What redundant experts would do for the last main layer: load of the fullest of some devices over their mean.

    Loads are the mean of the last quarter of the records; `parallel.placement` places 0, 1, 2 ... redundant experts on
    each device.
    """
    latest = records[-max(1, len(records) // 4) :]
    loads = np.mean([record["expert_load_over_mean_last_layer"] for record in latest], axis=0)[None]
    experts = loads.shape[1]
    devices = max(d for d in range(1, min(experts // 2, 32) + 1) if experts % d == 0) if experts > 1 else 1
    slots = range(experts, 2 * experts + 1, devices)
    as_numbered = Placement(np.arange(experts, dtype=np.int32)[None], experts, devices).imbalance(loads)[0]
    planned = [plan_placement(loads, count, devices).imbalance(loads)[0] for count in slots]
    figure, (axes,) = _figure(1, height=3.6)
    axes.axhline(as_numbered, color=GREY, linewidth=1, linestyle=(0, (6, 3)), label="in the order of their numbers")
    redundant = [count - experts for count in slots]
    axes.plot(redundant, planned, color=BLUE, marker="o", markersize=4.5, linewidth=1.6, label="placed by load (EPLB)")
    axes.set_xlabel(f"redundant experts, beside {experts} on {devices} devices")
    axes.set_ylabel("fullest device / mean")
    axes.set_ylim(0.98, max(as_numbered, *planned) * 1.03)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    axes.set_title("Redundant experts for the last layer", loc="left", fontweight="bold")
    return figure


def schedule_picture(records: Sequence[Record]) -> Figure:
    """Learning rate, batch size, gradient norm and speed against the step."""
    panels: list[tuple[str, str, str, Callable | None]] = [
        ("learning_rate", "learning rate", PURPLE, lambda value, _: f"{value:.2g}"),
        ("batch_size", "sequences per step", GREEN, None),
        ("grad_norm", "gradient norm", RED, None),
        ("tokens_per_s", "tokens per second", BLUE, lambda value, _: quantity(value)),
    ]
    figure, every_axes = _figure(len(panels), height=8.4)
    for axes, (key, label, color, form) in zip(every_axes, panels, strict=True):
        steps, values = _series(records, key)
        axes.plot(steps, values, color=color, linewidth=1.5, drawstyle="steps-post" if key == "batch_size" else None)
        axes.set_title(label.capitalize(), loc="left", fontweight="bold", fontsize=10)
        if key == "grad_norm" and np.all(values > 0) and len(values):
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(0, max([*values, 1e-12]) * 1.12)
        if form:
            axes.yaxis.set_major_formatter(FuncFormatter(form))
        if key == "batch_size":
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    _mark_skipped(every_axes[2], records)
    every_axes[-1].set_xlabel("step")
    return figure


def _blank_figure(height: float) -> Figure:
    return Figure(figsize=(9.5, height), layout="constrained", facecolor="white")


def _figure(rows: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    """A figure of its own (no pyplot: its figures are global, and a notebook's backend stays as it is)."""
    figure = _blank_figure(height)
    every_axes = np.atleast_1d(figure.subplots(rows, 1, sharex=True))
    for axes in every_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#C4C8CF")
        axes.tick_params(color="#C4C8CF")
        axes.grid(axis="y", color="#E5E7EB", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, every_axes


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)


def _series(records: Sequence[Record], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have a number under `key`."""
    found = [(record["step"], record[key]) for record in records if isinstance(record.get(key), int | float)]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps, float), np.array(values, float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over a fortieth of the curve, centred, shorter at its ends."""
    half = len(values) // 80
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(half, np.minimum(at, len(values) - 1 - at))
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)


def _loss_limits(loss: np.ndarray, mtp: np.ndarray, others: Sequence[float]) -> tuple[float, float]:
    """Limits of the loss axis: the first twentieth of the run, where every loss falls steeply, may leave at the top."""
    later = [*_smooth(loss)[len(loss) // 20 :], *_smooth(mtp)[len(mtp) // 20 :], *others, 0.0, 1.0]
    lowest = min([*_smooth(loss), *others, max(later)])
    span = max(max(later) - lowest, 0.1)
    return max(lowest - 0.12 * span, 0), max(later) + 0.05 * span


def _token_axis(axes: Axes, records: Sequence[Record]) -> None:
    """Steps below; above, the tokens that the model had read by then (a batch ramp bends that scale)."""
    axes.set_xlabel("step")
    if len(records) < 2:
        return
    steps, tokens = _series(records, "tokens")
    # On to both sides of the records, where the axis goes on too.
    beyond = tokens[-1] + steps[-1] * (tokens[-1] - tokens[-2]) / (steps[-1] - steps[-2])
    steps, tokens = np.array([0, *steps, 2 * steps[-1]]), np.array([0, *tokens, beyond])
    above = axes.secondary_xaxis(
        "top", functions=(lambda at: np.interp(at, steps, tokens), lambda at: np.interp(at, tokens, steps))
    )
    above.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value)))
    above.set_xlabel("tokens", color=GREY)
    above.tick_params(colors=GREY)
    above.spines[:].set_visible(False)


def _mark_skipped(axes: Axes, records: Sequence[Record]) -> None:
    skipped = [record["step"] for record in records if record["loss"] is None or record["grad_norm"] is None]
    if skipped:
        label = f"{len(skipped)} skipped"
        height = np.full(len(skipped), 0.985)
        axes.plot(skipped, height, "v", color=RED, label=label, transform=axes.get_xaxis_transform(), clip_on=False)


def _edges(steps: Sequence[int]) -> np.ndarray:
    """Borders of the cells around `steps`, which need not be evenly spaced."""
    steps = np.asarray(steps, float)
    middles = (steps[1:] + steps[:-1]) / 2
    first, last = (steps[0] - 0.5, steps[-1] + 0.5) if len(steps) == 1 else (2 * steps[0] - middles[0], None)
    return np.concatenate([[first], middles, [2 * steps[-1] - middles[-1] if last is None else last]])


def _ceiling(values: np.ndarray) -> float:
    """Where a colour scale ends: the first steps, before any balance, may lie above it."""
    return max(float(np.quantile(values, 0.98)), 1.5)
