"""Pictures of schedules: valid XML, a box for every op, nothing outside and nothing on top of something else."""

import itertools
from xml.etree import ElementTree

import pytest

from dsjax.pipeline.draw import draw
from dsjax.pipeline.schedule import SCHEDULES, dualpipe, dualpipe_v, one_f_one_b, zb1p
from dsjax.pipeline.simulate import Cost, simulate

SVG = "{http://www.w3.org/2000/svg}"


def rectangles(picture, kind):
    """(left, top, right, bottom) of the boxes of a class."""
    for element in picture.iter(f"{SVG}rect"):
        if kind in element.get("class", "").split():
            x, y, width, height = (float(element.get(name)) for name in ("x", "y", "width", "height"))
            assert width > 0 and height > 0
            yield x, y, x + width, y + height


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("name", "ranks", "micro_batches"),
    [("gpipe", 4, 8), ("1f1b", 1, 3), ("zb1p", 8, 20), ("dualpipe", 8, 20), ("dualpipe", 16, 64), ("dualpipev", 4, 10)],
)
def test_geometry(name, ranks, micro_batches, compiled):
    schedule = SCHEDULES[name](ranks, micro_batches)
    cost = Cost(8.9, 14.7, 6.3, overlapped=26.0) if compiled else Cost()
    picture = ElementTree.fromstring(draw(schedule, cost, compiled=compiled, title="a < b & c"))
    _, _, width, height = map(float, picture.get("viewBox").split())
    ops, bubbles = list(rectangles(picture, "op")), list(rectangles(picture, "bubble"))
    assert len(ops) == sum(len(action) for actions in schedule.lists for action in actions)
    pairs = sum(len(action) == 2 for actions in schedule.lists for action in actions)
    # One more in the legend.
    assert len(list(rectangles(picture, "pair"))) == pairs + (pairs > 0)
    for x0, y0, x1, y1 in ops + bubbles:
        assert x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height
    for element in picture.iter(f"{SVG}text"):
        assert 0 <= float(element.get("x")) <= width and 0 <= float(element.get("y")) <= height
    # Boxes of a row do not overlap, and rows do not either.
    by_row = sorted(ops + bubbles, key=lambda box: (box[1], box[0]))
    rows = {top: list(boxes) for top, boxes in itertools.groupby(by_row, key=lambda box: box[1])}
    for boxes in rows.values():
        assert all(a[2] <= b[0] for a, b in itertools.pairwise(boxes))
    full = sorted({(box[1], box[3]) for box in ops + bubbles if box[3] - box[1] > 20})
    assert len(full) == schedule.ranks
    assert all(a[1] < b[0] for a, b in itertools.pairwise(full))


def test_boxes_are_to_scale():
    """Work and bubble of each rank fill its row, and a B is as wide as two Fs."""
    schedule = one_f_one_b(4, 6)
    picture = ElementTree.fromstring(draw(schedule))
    timeline = simulate(schedule)
    boxes = list(rectangles(picture, "op")) + list(rectangles(picture, "bubble"))
    left, right = min(box[0] for box in boxes), max(box[2] for box in boxes)
    unit = (right - left + 0.8) / timeline.makespan
    widths = {round((x1 - x0 + 0.8) / unit, 2) for x0, _, x1, _ in rectangles(picture, "op")}
    assert widths == {1.0, 2.0}
    total = sum(x1 - x0 + 0.8 for x0, _, x1, _ in boxes)
    assert total == pytest.approx(schedule.ranks * timeline.makespan * unit, rel=1e-4)


@pytest.mark.parametrize("schedule", [dualpipe(4, 8), dualpipe_v(2, 4), zb1p(3, 5)])
def test_every_box_says_what_it_is(schedule):
    picture = ElementTree.fromstring(draw(schedule))
    tips = [
        element.findtext(f"{SVG}title") for element in picture.iter(f"{SVG}rect") if element.findtext(f"{SVG}title")
    ]
    assert len(set(tips)) == len(tips)
    labels = [int(e.text) for e in picture.iter(f"{SVG}text") if "label" in e.get("class", "").split()]
    assert sorted(labels) == sorted(op.micro_batch for actions in schedule.lists for a in actions for op in a)
    # Directions are told apart: each of two slots has boxes of its own class.
    classes = {
        element.get("class").split()[1]
        for element in picture.iter(f"{SVG}rect")
        if element.get("class", "").startswith("op ")
    }
    assert {name[1] for name in classes} == {str(slot) for slot in range(schedule.route.slots)}
