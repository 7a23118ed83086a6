"""A forked command is seen from outside as a process of its own; a rank that fails is seen to fail."""

import json
import os
import signal
import subprocess
import sys

import forked
import pytest
from limits import HUNG_S

pytestmark = pytest.mark.slow

SAYS = """
import json, os, sys
print(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get("SAID"), __name__, sys.path[0],
                  "torch" in sys.modules, any(m.startswith("mesa_train") for m in sys.modules)]))
print("on stderr", file=sys.stderr)
sys.exit(7)
"""


@pytest.mark.parametrize("how", ["script", "module", "text"])
def test_a_command_has_its_own_arguments_environment_and_folder(tmp_path, how):
    (tmp_path / "says.py").write_text(SAYS)
    command = {"script": [tmp_path / "says.py"], "module": ["-m", "says"], "text": ["-c", SAYS]}
    environment = {**os.environ, "SAID": "this", "PYTHONPATH": str(tmp_path)}
    done = forked.run([*command[how], "a", "b c"], env=environment, cwd=tmp_path, timeout=HUNG_S)
    assert done.returncode == 7
    assert done.stderr == "on stderr\n"
    arguments, folder, said, name, first, torch, mesa_train = json.loads(done.stdout)
    assert arguments == ["a", "b c"]
    assert folder == str(tmp_path)
    assert (said, name) == ("this", "__main__")
    assert first in ("", str(tmp_path))
    assert torch
    assert not mesa_train
    assert "SAID" not in os.environ


def test_what_goes_wrong_is_an_exit_status_as_python_has_it():
    assert forked.run(["-c", "import sys; sys.exit()"], timeout=HUNG_S).returncode == 0
    for text in ("1 / 0", "import sys; sys.exit('a reason')"):
        done = forked.run(["-c", text], timeout=HUNG_S)
        python = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
        assert done.returncode == python.returncode == 1
        assert done.stderr.splitlines()[-1] == python.stderr.splitlines()[-1]
    child = forked.start(["-c", "import time; time.sleep(36000)"])
    assert child.poll() is None
    os.kill(child.pid, signal.SIGKILL)
    assert child.result(HUNG_S).returncode == -signal.SIGKILL


RANK = """
import os, sys, time
rank = int(os.environ["RANK"])
open(f"{sys.argv[1]}/{rank}", "w").write(os.environ["WORLD_SIZE"])
if sys.argv[2] == "fail":
    if rank == 1:
        sys.exit(3)
    time.sleep(36000)
"""


@pytest.mark.parametrize(("how", "status"), [("end", 0), ("fail", 1)])
def test_a_rank_that_fails_ends_the_others_and_the_launch(tmp_path, how, status):
    (tmp_path / "rank.py").write_text(RANK)
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "3", tmp_path / "rank.py"]
    done = forked.run([*command, tmp_path, how], timeout=HUNG_S)
    assert done.returncode == status
    found = [(tmp_path / str(rank)) for rank in range(3)]
    assert all(not path.exists() or path.read_text() == "3" for path in found)
    assert found[1].exists()
    assert how == "fail" or all(path.exists() for path in found)


def test_a_command_that_hangs_is_ended():
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run(["-c", "import time; time.sleep(36000)"], timeout=0.1)
    assert forked.run(["-c", "print('again')"], timeout=HUNG_S).stdout == "again\n"
