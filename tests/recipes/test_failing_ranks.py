"""Files that fail under two launched processes: one line with the path, both end, the last good checkpoint stays."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HUNG_S

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def launched(folder, *cases):
    """By case (the codes of both ranks, the lines that both say of the folder).

    No launcher is between: it would end the second process when the first has ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2"),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("failing_worker.py")]
    ranks = []
    for rank in ("0", "1"):
        with (folder / f"stderr-{rank}").open("w") as told:
            ranks.append(
                subprocess.Popen(
                    [*command, folder, *cases],
                    env={**environment, "RANK": rank, "LOCAL_RANK": rank},
                    cwd=ROOT,
                    stdout=subprocess.DEVNULL,
                    stderr=told,
                )
            )
    codes = [rank.wait(HUNG_S) for rank in ranks]
    told = [(folder / f"stderr-{rank}").read_text() for rank in range(2)]
    last = [line for text in told for line in text.splitlines() if str(folder) in line]
    assert (folder / "found-0.json").is_file(), told
    both = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]
    assert [list(found) for found in both] == [list(cases[:-1])] * 2, told
    outcomes = {
        case: ([f[case]["code"] for f in both], [*both[0][case]["said"], *both[1][case]["said"]])
        for case in cases[:-1]
    }
    return outcomes | {cases[-1]: (codes, last)}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_recipes_whose_folders_fill_or_become_read_only_or_are_removed(tmp_path):
    cases = ("litv2 full", "litv2 read-only", "fsdp2 full", "fsdp2 read-only", "fsdp2 removed")
    outcomes = launched(tmp_path, *cases)
    for case, (codes, (line,)) in outcomes.items():
        litv2, out = case.startswith("litv2"), tmp_path / case
        assert codes == ([1, 1] if litv2 else [2, 2]), case
        if "removed" in case:
            assert line == (
                f"error: [Errno 2] the run's folder was removed: '{out}'; "
                "no checkpoint is there yet"
            )
            assert not out.exists()
            continue
        folder = out / "checkpoints" if litv2 else out
        why = "Permission denied: " if "read-only" in case else ""
        assert line.startswith(
            f"{'litv2' if litv2 else 'error'}: {folder}/step-00000004 could not be written ({why}"
        ), line
        assert line.endswith(f"; the last good checkpoint is {folder}/step-00000002"), line
        kept = ["last", "step-00000002"] if litv2 else ["metrics.jsonl", "step-00000002"]
        assert names(folder) == kept, case


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_shards_of_zero3_that_one_rank_cannot_write_and_cannot_read(tmp_path):
    outcomes = launched(tmp_path, "zero3 full", "zero3 damaged")
    out = tmp_path / "zero3 full"
    codes, (line,) = outcomes["zero3 full"]
    assert codes == [2, 2]
    assert line.startswith(f"error: {out}/step-00000004 could not be written (")
    assert line.endswith(f"; the last good checkpoint is {out}/step-00000002")
    codes, (line,) = outcomes["zero3 damaged"]
    assert codes == [2, 2]
    assert line.startswith(
        f"error: {out}/step-00000002 cannot be read, it is damaged or of another run ("
    )
    # The reason is that of the rank that failed, not that a peer left.
    assert "peer" not in line
    assert names(out) == ["metrics.jsonl", "step-00000002"]
