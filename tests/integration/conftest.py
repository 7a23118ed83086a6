"""Writes docs/results/compatibility.jsonl from the outcomes of the tests here.

    MESA_TRAIN_COMPATIBILITY=docs/results/compatibility.jsonl pytest tests/integration
    python scripts/bench/make_tables.py

A test says what it stands for by the marker `compatibility(setup, feature, note="", refused=False)`, in
whose words `{name}` is a parameter of the test. Several tests under one setup and feature make one row:
"works" if all passed, "works, with a note" if there is one, "refused" where the test is that an error
comes. Rows of other setups in the file stay.
"""

import importlib.metadata
import os
from pathlib import Path

_PACKAGES = ["torch", "timm", "transformers", "accelerate", "deepspeed", "peft", "lightning"]
_rows = {}


def pytest_runtest_logreport(report):
    marked = dict(report.user_properties).get("compatibility")
    if marked is None or (report.when != "call" and not report.failed and not report.skipped):
        return
    setup, feature, note, refused = marked
    row = _rows.setdefault((setup, feature), {"note": note, "refused": refused, "outcomes": []})
    row["outcomes"].append(report.outcome)


def pytest_collection_modifyitems(items):
    for item in items:
        marker = item.get_closest_marker("compatibility")
        if marker is None:
            continue
        parameters = _worded(item.callspec.params if hasattr(item, "callspec") else {})
        words = [word.format(**parameters) for word in marker.args]
        note, refused = marker.kwargs.get("note", ""), marker.kwargs.get("refused", False)
        item.user_properties.append(("compatibility", (*words, note, refused)))


def pytest_sessionfinish(session):
    target = os.environ.get("MESA_TRAIN_COMPATIBILITY")
    if not target or not _rows or hasattr(session.config, "workerinput"):
        return
    from mesa_train.utils import records

    path = Path(target)
    known = (
        {(row["setup"], row["feature"]): row for row in records.read(path)} if path.exists() else {}
    )
    versions = {p: _version(p) for p in _PACKAGES}
    for (setup, feature), row in _rows.items():
        known[setup, feature] = {
            "setup": setup,
            "feature": feature,
            "outcome": _outcome(row),
            "note": row["note"],
            "tests": len(row["outcomes"]),
            "versions": {p: v for p, v in versions.items() if v},
        }
    path.unlink(missing_ok=True)
    for row in known.values():
        records.append(path, row)


def _worded(parameters):
    """A test's parameters, with those that are no words said in words."""
    worded = dict(parameters)
    if "reentrant" in worded:
        worded["kind"] = "reentrant" if worded["reentrant"] else "non-reentrant"
    if "after" in worded:
        worded["where"] = "after" if worded["after"] else "before"
    if "how" in worded:
        words = {"before": "before prepare", "after": "after prepare", "enable": "by enable()"}
        worded["how"] = words[worded["how"]]
    if "compiled" in worded:
        worded["extent"] = worded["compiled"].__name__
    return worded


def _outcome(row):
    if "failed" in row["outcomes"]:
        return "fails"
    if "passed" not in row["outcomes"]:
        return "not run"
    if row["refused"]:
        return "refused with an error"
    return "works, with a note" if row["note"] else "works"


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
