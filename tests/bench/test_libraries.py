"""The programs of five libraries: they run with one line, and the rows and the table have their numbers."""

import sys

import libraries
import pytest
from tables import families

ROW = {
    "program": "timm_loop", "library": "timm", "model": "Swin-T", "line": "mesa-train run train.py",
    "images": 5, "one_image_bytes": 100 << 20, "device": "a CPU", "device_type": "cpu",
    "threads": 1, "versions": {"torch": "2"}, "commit": "abc", "date": "2030-01-02T03:04:05",
}  # fmt: skip


def test_the_table_compares_with_plain():
    plain = {**ROW, "policy": "plain", "line": "", "peak_bytes": 180 << 20, "losses": [2.0, 1.0]}
    coded = {**ROW, "policy": "mesa8", "peak_bytes": 120 << 20, "losses": [2.0, 1.01]}
    lines = families.libraries.render([plain, coded]).splitlines()
    assert lines[2] == (
        "| timm | Swin-T | `mesa-train run train.py`, mesa8 | 180.0 MiB | 120.0 MiB | "
        "20.0 MiB, 5.0 MiB | True | 1.00% |"
    )
    assert len([line for line in lines if line.startswith("| timm")]) == 1


@pytest.mark.parametrize("option", ["programs", "policies"])
def test_wrong_names_are_refused(option, tmp_path):
    given = {"programs": "timm_loop", "policies": "plain", option: "keras"}
    with pytest.raises(SystemExit, match=rf"--{option} must be of .*, got 'keras'"):
        libraries.main(**given, images=2, out=tmp_path / "rows.jsonl")


def test_a_program_that_fails_shows_its_output(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("raise RuntimeError('no data')")
    monkeypatch.setattr(libraries, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match=r"broken with plain failed(.|\n)*no data"):
        libraries.run("broken", "plain", 1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no os.wait4")
@pytest.mark.parametrize("program", libraries.PROGRAMS)
def test_a_program_has_plains_first_loss(program):
    for package in {"transformers_trainer": ["transformers"], "lightning_module": ["lightning"],
                    "open_clip_loss": ["open_clip"]}.get(program, []):  # fmt: skip
        pytest.importorskip(package)
    plain, coded = (libraries.run(program, policy, 1)[1] for policy in ("plain", "mesa8"))
    assert plain[0] == coded[0]
    assert coded == pytest.approx(plain, rel=0.02)
    assert coded != plain
