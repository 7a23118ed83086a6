"""The tables of open-world detection: a line per detector, and a line per decision by energies."""

from tables.open_world import open_world, open_world_energies

ROW = {
    "variant": "ore", "name": "plain", "seed": 0, "stage": "t2_ft", "energy": "off", "images": 100,
    "map_known": 0.4, "map_previous": 0.3, "map_current": 0.5, "unknown_recall": 0.7, "wi": 0.2,
    "aose": 390, "device": "a CPU", "device_type": "cpu", "threads": 1, "commit": "abc",
    "versions": {"torch": "2.14.1"}, "date": "2030-01-02T03:04:05+00:00",
}  # fmt: skip


def test_a_decision_is_compared_with_the_same_runs():
    lowered = {**ROW, "energy": "known_tail", "aose": 300}
    other = {**ROW, "seed": 1, "aose": 1000}
    text = open_world_energies.render([ROW, other, lowered])
    assert "| off | 390 | 40.0 | 70.0 | 20.0 |" in text
    assert "| known_tail, lowest 5 % | 300 | 40.0 | 70.0 | 20.0 |" in text
    assert "over 1 runs" in text


def test_baselines_follow_the_detector_and_have_no_energies():
    baseline = {**ROW, "variant": "faster_rcnn", "unknown_recall": 0.0}
    lowered = {**ROW, "energy": "known_tail", "aose": 1}
    text = open_world.render([baseline, {**ROW, "name": "mesa8"}, lowered, ROW])
    lines = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")][2:]
    assert lines == ["| ORE, plain", "| ORE, mesa8", "| plain Faster R-CNN, plain"]
    assert "| 390 | 1 |" in text
