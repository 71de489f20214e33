"""Timelines of schedules as SVG, in the manner of the report's Figure 5."""

from collections.abc import Iterable, Sequence
from html import escape

from dsjax.pipeline.schedule import Kind, Op, Route, Schedule
from dsjax.pipeline.simulate import (
    Cost,
    Span,
    Timeline,
    assign_ticks,
    peak_activations,
    peak_deferred,
    simulate,
    simulate_ticks,
)

# Fill of either direction and of text on it: hues apart for any colour vision, directions apart in grey as well.
COLOURS = {
    Kind.F: (("#E8A33D", "#1F2328"), ("#FBE3B5", "#1F2328")),
    Kind.B: (("#2F6DA8", "#FFFFFF"), ("#B5D3EC", "#1F2328")),
    Kind.I: (("#1E8A6B", "#FFFFFF"), ("#ABE0CE", "#1F2328")),
    Kind.W: (("#7B6BA8", "#FFFFFF"), ("#DAD3EC", "#1F2328")),
}
NAMES = {Kind.F: "forward", Kind.B: "backward", Kind.I: "backward for input", Kind.W: "backward for weights"}
INK, MUTED, EDGE = "#1F2328", "#6B7280", "#3A3F47"

LEFT, RIGHT, TOP, BOTTOM = 62, 140, 58, 78
"""Margins, in pixels: names of ranks; numbers of ranks; title; time axis and legend."""
ROW, GAP = 26, 5
"""Height of a row's boxes and the space between rows."""
UNIT = (12.0, 22.0)
"""Least and greatest width of the shortest box: of two digits, and of what is pleasant."""
LEGEND = 960.0
"""Least width of a picture: that of the legend."""
WIDTH = 1300.0
"""What a timeline takes where the limits of `UNIT` allow."""


def draw(schedule: Schedule, cost: Cost | None = None, *, compiled: bool = False, title: str | None = None) -> str:
    """Return the timeline of a schedule as the text of an SVG file: ranks downward, time rightward.

    compiled: True for the ticks that an SPMD program runs it in, with the waits for neighbours at their ends.
    """
    cost = cost or Cost()
    timeline = simulate(schedule, cost)
    if compiled:
        timeline = simulate_ticks(schedule, assign_ticks(schedule, cost), cost)
    scale = _scale(timeline)
    extent = timeline.makespan * scale
    width, height = max(LEFT + extent + RIGHT, LEGEND), TOP + schedule.ranks * (ROW + GAP) + BOTTOM
    body = [
        *_heading(timeline, cost, title or schedule.name + (", compiled" if compiled else "")),
        *_axis(timeline, scale),
        *(line for rank in range(schedule.ranks) for line in _row(timeline, rank, scale)),
        *_legend(schedule, height - 46),
    ]
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.1f} {height:.1f}" width="{width:.0f}" '
            f'height="{height:.0f}" font-family="Helvetica, Arial, sans-serif" font-size="11">',
            _style(),
            f'<rect width="{width:.1f}" height="{height:.1f}" fill="#FFFFFF"/>',
            *body,
            "</svg>\n",
        )
    )


def _scale(timeline: Timeline) -> float:
    """Pixels per unit of time."""
    shortest = min(span.end - span.start for span in timeline.spans if span.end > span.start)
    return min(max(WIDTH / timeline.makespan, UNIT[0] / shortest), UNIT[1] / shortest)


def _style() -> str:
    """Classes of boxes and labels, and the hatching of bubbles."""
    fills = "".join(
        f".{kind}{slot}{{fill:{fill}}}.t{kind}{slot}{{fill:{text}}}"
        for kind, directions in COLOURS.items()
        for slot, (fill, text) in enumerate(directions)
    )
    return (
        f"<style>{fills}.pair{{fill:none;stroke:{EDGE};stroke-width:1.2}}.label{{font-size:9px;text-anchor:middle}}"
        f".muted{{fill:{MUTED}}}.end{{text-anchor:end}}.middle{{text-anchor:middle}}text{{fill:{INK}}}</style>"
        '<defs><pattern id="bubble" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="6" height="6" fill="#F4F5F7"/><rect width="1.5" height="6" fill="#D5D9DF"/></pattern></defs>'
    )


def _heading(timeline: Timeline, cost: Cost, title: str) -> Iterable[str]:
    schedule = timeline.schedule
    pair = cost.of((Op(Kind.F, 0, 0), Op(Kind.B, 0, 0)))
    times = f"F {cost.forward:g}, I {cost.backward_input:g}, W {cost.backward_weight:g}"
    times += f", B {cost.of((Op(Kind.B, 0, 0),)):g}, F&B {pair:g}"
    if cost.transfer:
        times += f", transfer {cost.transfer:g}"
    facts = (
        f"{schedule.ranks} ranks, {schedule.micro_batches} micro-batches · makespan {timeline.makespan:g}, "
        f"bubble {max(timeline.bubble):.4g} ({max(timeline.bubble) / timeline.makespan:.1%}) · times: {times}"
    )
    yield f'<text x="{LEFT}" y="22" font-size="16" font-weight="bold">{escape(title)}</text>'
    yield f'<text x="{LEFT}" y="40" class="muted">{escape(facts)}</text>'


def _axis(timeline: Timeline, scale: float) -> Iterable[str]:
    """Time below the rows, and the heads of the columns on the right."""
    bottom = TOP + timeline.schedule.ranks * (ROW + GAP)
    step = next(s * 10**power for power in range(-6, 12) for s in (1, 2, 5) if s * 10**power * scale >= 70)
    for i in range(int(timeline.makespan / step) + 1):
        x = LEFT + i * step * scale
        yield f'<path d="M{x:.2f} {bottom}v4" stroke="{MUTED}"/>'
        yield f'<text x="{x:.2f}" y="{bottom + 15}" class="muted middle">{i * step:g}</text>'
    x = LEFT + timeline.makespan * scale
    for i, head in enumerate(("bubble", "held", "W late")):
        yield f'<text x="{x + 44 * (i + 1) - 6:.2f}" y="{TOP - 7}" class="muted end" font-size="10">{head}</text>'


def _row(timeline: Timeline, rank: int, scale: float) -> Iterable[str]:
    """A rank: where it waits, what it runs, its numbers."""
    schedule, y = timeline.schedule, TOP + rank * (ROW + GAP)
    middle = y + ROW / 2 + 4
    yield f'<text x="{LEFT - 8}" y="{middle}" class="end">rank {rank}</text>'
    spans = timeline.of(rank)
    edges = [0.0, *(edge for span in spans for edge in (span.start, span.end)), timeline.makespan]
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        if end - start > 1e-9 * timeline.makespan:
            yield _box("bubble", start, end, y, ROW, scale, 'fill="url(#bubble)"')
    for span in spans:
        yield from _action(schedule.route, span, y, scale)
    x = LEFT + timeline.makespan * scale
    numbers = (f"{timeline.bubble[rank]:.4g}", peak_activations(schedule)[rank], peak_deferred(schedule)[rank])
    for i, number in enumerate(numbers):
        yield f'<text x="{x + 44 * (i + 1) - 6:.2f}" y="{middle}" class="end">{number}</text>'


def _box(kind: str, start: float, end: float, y: float, height: float, scale: float, rest: str = "") -> str:
    """A rectangle in time; a hair's breadth is left to the next."""
    x, width = LEFT + start * scale, (end - start) * scale - 0.8
    return f'<rect class="{kind}" x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" {rest}/>'


def _action(route: Route, span: Span, y: float, scale: float) -> Iterable[str]:
    """The boxes of an action, one above the other if they overlap, each with its micro-batch and a tooltip."""
    height = ROW / len(span.action)
    middle = LEFT + (span.start + span.end) / 2 * scale
    for i, op in enumerate(span.action):
        stage = route.stage(span.rank, op.slot)
        words = f"{NAMES[op.kind]} of micro-batch {op.micro_batch}, stage {stage}, rank {span.rank}"
        tip = f"<title>{words}: {span.start:.6g} to {span.end:.6g}</title>"
        top = y + i * height
        box = _box(f"op {op.kind}{op.slot}", span.start, span.end, top, height, scale)
        yield box.removesuffix("/>") + f">{tip}</rect>"
        yield (
            f'<text class="label t{op.kind}{op.slot}" x="{middle - 0.4:.2f}" y="{top + height / 2 + 3.2:.2f}" '
            f'pointer-events="none">{op.micro_batch}</text>'
        )
    if len(span.action) > 1:
        yield _box("pair", span.start, span.end, y, ROW, scale)


def _legend(schedule: Schedule, y: float) -> Iterable[str]:
    """What colours mean; only kinds that occur."""
    directions: Sequence[str] = {
        "single": [""],
        "bidirectional": ["from the first rank", "from the last"],
        "vee": ["outward", "back"],
    }[schedule.route.kind]
    actions = [action for actions in schedule.lists for action in actions]
    used = {op.kind for action in actions for op in action}
    x = float(LEFT)

    def entry(swatch: str, text: str, width: float) -> str:
        """A swatch and what it means; the next is on its right."""
        nonlocal x
        left, x = x + width + 5, x + width + 17 + 6.4 * len(text)
        return f'{swatch}<text x="{left:.1f}" y="{y + 11:.1f}">{escape(text)}</text>'

    for kind in (kind for kind in COLOURS if kind in used):
        swatch = "".join(
            f'<rect class="{kind}{slot}" x="{x + 15 * slot:.1f}" y="{y:.1f}" width="14" height="14"/>'
            for slot in range(len(directions))
        )
        yield entry(swatch, f"{NAMES[kind]} ({kind})", 15.0 * len(directions))
    if any(len(action) > 1 for action in actions):
        swatch = (
            f'<rect class="F0" x="{x:.1f}" y="{y:.1f}" width="20" height="7"/>'
            f'<rect class="B1" x="{x:.1f}" y="{y + 7:.1f}" width="20" height="7"/>'
            f'<rect class="pair" x="{x:.1f}" y="{y:.1f}" width="20" height="14"/>'
        )
        yield entry(swatch, "overlapped", 20)
    yield entry(f'<rect x="{x:.1f}" y="{y:.1f}" width="20" height="14" fill="url(#bubble)"/>', "bubble", 20)
    notes = "held: activations at most; W late: weight gradients waiting at most"
    if len(directions) > 1:
        notes = f"dark: micro-batches {directions[0]}, light: {directions[1]}; " + notes
    yield f'<text x="{LEFT}" y="{y + 28:.1f}" class="muted">{escape(notes)}</text>'
