"""Charts: labels that keep apart, the Pareto front, and what is drawn for incomplete rows."""

import random

import pytest

from mesa_train.report.charts import place

pytest.importorskip("matplotlib")

from mesa_train.planner.plan import Plan, Prediction
from mesa_train.policy import Policy
from mesa_train.report.charts import as_svg, family, pareto, save_png, tradeoff, where
from mesa_train.report.frontier import draw


def overlapping(corners, sizes):
    boxes = [(x, y, x + w, y + h) for (x, y), (w, h) in zip(corners, sizes, strict=True)]
    return [
        (i, j)
        for i, a in enumerate(boxes)
        for j, b in enumerate(boxes[:i])
        if min(a[2], b[2]) - max(a[0], b[0]) > 0.01 and min(a[3], b[3]) - max(a[1], b[1]) > 0.01
    ]


@pytest.mark.parametrize("seed", range(5))
def test_labels_keep_apart(seed):
    draw = random.Random(seed)
    # Nine points in a crowd and nine on a wide field, as the methods of a comparison lie.
    points = [(300 + draw.gauss(0, 30), 200 + draw.gauss(0, 30)) for _ in range(9)]
    points += [(draw.uniform(50, 700), draw.uniform(50, 400)) for _ in range(9)]
    sizes = [(draw.uniform(40, 110), 14) for _ in points]
    corners = place(points, sizes, (0, 0, 760, 450))
    assert overlapping(corners, sizes) == []
    for (x, y), (w, h), (a, b) in zip(points, sizes, corners, strict=True):
        assert 0 <= a <= 760 - w
        assert 0 <= b <= 450 - h
        assert not (a < x < a + w and b < y < b + h)


def test_labels_of_points_in_one_place():
    points, sizes = [(100.0, 100.0)] * 4, [(60.0, 12.0)] * 4
    assert overlapping(place(points, sizes, (0, 0, 300, 200)), sizes) == []


def test_labels_keep_off_the_line():
    (corner,) = place(
        [(100.0, 100.0)], [(60.0, 12.0)], (0, 0, 300, 200), lines=[(100, 100), (300, 100)]
    )
    assert not corner[1] < 100 < corner[1] + 12 or corner[0] + 60 <= 100


def test_pareto():
    points = [(1, 9), (2, 5), (3, 6), (4, 4), (2, 5), (5, 4)]
    assert [points[i] for i in pareto(points)] == [(1, 9), (2, 5), (4, 4)]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("plain+adamw8bit", "plain"),
        ("mesa8+checkpoint", "mesa_train"),
        ("checkpoint", "checkpointing"),
        ("compile:mesa8", "torch.compile"),
        ("plan.yaml", "mesa_train"),
        ("save_on_cpu", "other"),
    ],
)
def test_families(method, expected):
    assert family(method) == expected


def test_drawn(tmp_path):
    rows = [
        {"method": m, "saved_bytes": k << 20, "step_ms": s, "by_operator": {"linear": k << 20}}
        for m, k, s in (("plain", 500, 100.0), ("mesa8", 150, 107.0), ("compile", 490, 80.0))
    ]
    for name, chart in (("a", tradeoff(rows, "a")), ("b", where(rows, "b"))):
        save_png(chart, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        svg = as_svg(chart, name, "words")
        assert svg.startswith("<svg")
        assert 'aria-label="words"' in svg
        assert "currentColor" in svg
        assert ">mesa8<" in svg


def test_too_little_to_draw():
    assert tradeoff([{"method": "plain", "saved_bytes": 5, "step_ms": 1.0}], "") is None
    assert where([{"method": "plain", "note": "failed"}], "") is None


def test_frontier_with_baselines(tmp_path):
    plain = Prediction(500 << 20, 900 << 20, 1.0, 1.0, 0.01)
    plans = [
        Plan(Policy(), Prediction(k << 20, p << 20, t, t, e), {}, 0.0, plain)
        for k, p, t, e in ((50, 450, 1.2, 0.2), (120, 520, 1.1, 0.02), (500, 900, 1.0, 0.01))
    ]
    baselines = [
        {"method": "plain", "peak_bytes": 900 << 20, "step_ms": 10.0},
        {"method": "checkpoint", "peak_bytes": 480 << 20, "step_ms": 13.0},
        {"method": "plain+adamw8bit", "peak_bytes": 400 << 20, "step_ms": 11.0},
        {"method": "compile", "note": "refused"},
    ]
    chart = draw(plans, baselines, "title")
    texts = {text.get_text() for text in chart.axes[0].texts}
    # Other optimizer states are another budget, and what failed has no place.
    assert {"plain", "checkpoint", "20.0%", "2.0%"} <= texts
    assert not {"plain+adamw8bit", "compile"} & texts
    save_png(chart, tmp_path / "frontier.png")
    untimed = [
        Plan(Policy(), Prediction(1, 10 << 20, None, None, 0.1), {}, 0.0, plain),
        Plan(Policy(), Prediction(1, 20 << 20, None, None, 0.01), {}, 0.0, plain),
    ]
    assert draw(untimed, [], "").axes[0].get_ylabel() == "gradient error, %"
