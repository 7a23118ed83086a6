"""`python ARGUMENT...` in a process forked from one that has imported PyTorch and timm already.

Many tests start a Python process, and a launch of two ranks starts three. A core spends 6 seconds on the imports of
each. Here a server pays them once, and forks a child for each command. `run` gives what `subprocess.run` gives: the
exit status and both streams of a process of its own, with its own environment and working directory.

The server imports `PACKAGES` only, and no part of mesa_train: a child imports that itself. torchrun and `accelerate
launch` run as they are, up to the agent that starts the ranks. The child forks these too, with the variables that the
agent would set. A test of the agent itself, or of imports, has to start its process without this module.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

PACKAGES = ["torch", "timm", "accelerate", "accelerate.commands.launch", "torch.distributed.run"]
_server = None


def run(arguments, *, env=None, cwd=None, timeout=None):
    """`subprocess.run([sys.executable, *arguments], capture_output=True, text=True)` in a child of the server."""
    return start(arguments, env=env, cwd=cwd).result(timeout)


def start(arguments, *, env=None, cwd=None):
    """A `Child` that runs. A server has one at a time."""
    global _server
    if _server is None or _server.process.poll() is not None:
        _server = Server()
    return Child(_server, list(map(str, arguments)), env, cwd)


class Server:
    """The process that forks."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # One thread, as a fork needs; and a question for GPUs that leaves them untouched.
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
            start_new_session=True,
        )
        atexit.register(self.end)

    def send(self, job):
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, timeout):
        """A line of the server, which the caller has to wait for; None if there is none in time."""
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            return None
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self.process.stdout.fileno(), 1)
            assert byte, "the server has ended"
            line += byte
        return int(line)

    def end(self):
        """End the server and all that it forked."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Child:
    """A command that runs."""

    def __init__(self, server, arguments, env, cwd):
        self.arguments, self._server, self._status = arguments, server, None
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        for stream in self._streams:
            stream.touch()
        server.send(
            {
                "arguments": arguments,
                "environment": dict(os.environ if env is None else env),
                "folder": str(Path(cwd or ".").resolve()),
                "streams": list(map(str, self._streams)),
            }
        )
        self.pid = server.answer(None)

    def poll(self):
        """The exit status, or None while the command runs."""
        return self._wait(0)

    def result(self, timeout=None):
        """Wait for the end: a `CompletedProcess` with the exit status and both streams."""
        with self._folder:
            if self._wait(timeout) is None:
                self._server.end()
                raise subprocess.TimeoutExpired(self.arguments, timeout)
            output = [stream.read_text(errors="replace") for stream in self._streams]
        return subprocess.CompletedProcess(self.arguments, self._status, *output)

    def _wait(self, timeout):
        if self._status is None:
            self._status = self._server.answer(timeout)
        return self._status


# --- the server's side ---


def _serve():
    for package in PACKAGES:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(package)
    import torch.distributed.launcher.api

    torch.distributed.launcher.api.launch_agent = _launch
    # A child's collections would copy the pages of all that is imported.
    gc.freeze()
    answers = os.dup(1)
    for line in sys.stdin.buffer:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            os.close(answers)
            os.chdir(job["folder"])
            for number, path in enumerate((os.devnull, *job["streams"])):
                file = os.open(path, os.O_RDWR)
                os.dup2(file, number)
                os.close(file)
            _interpret(job["arguments"], job["environment"])
        os.write(answers, b"%d\n" % child)
        _, status = os.waitpid(child, 0)
        os.write(answers, b"%d\n" % os.waitstatus_to_exitcode(status))


def _interpret(arguments, environment):
    """In a forked process: do what `python ARGUMENTS...` does with this environment, and end."""
    status = 0
    try:
        _main(arguments, environment)
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            sys.stderr.write(f"{status}\n")
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    # What the interpreter does at its end, apart from taking all modules to pieces.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _main(arguments, environment):
    import numpy
    import torch

    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    # The first is this file's folder.
    known = [path for path in sys.path[1:] if path not in paths]
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    # As in a process that starts, no two have the same random numbers.
    random.seed()
    numpy.random.seed()  # noqa: NPY002 - what libraries use
    importlib.invalidate_caches()
    if arguments[0] == "-u":
        arguments = arguments[1:]
        sys.stdout.reconfigure(write_through=True)
    first, *rest = arguments
    paths = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.path[:] = ["", *paths, *known]
    if first == "-c":
        sys.argv[:] = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv[:] = rest
        # The server may have imported it.
        sys.modules.pop(rest[0], None)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = arguments
        sys.path[0] = str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


def _launch(config, entrypoint, arguments, health_check_server=None):
    """Instead of torch's agent, with a `LaunchConfig`: fork the ranks, wait for them, and end all if one fails."""
    assert entrypoint == sys.executable
    assert config.max_nodes == 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = config.nproc_per_node
    shared = {
        "GROUP_RANK": 0,
        "GROUP_WORLD_SIZE": 1,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "ROLE_NAME": config.role,
        "ROLE_WORLD_SIZE": world,
        "TORCHELASTIC_MAX_RESTARTS": config.max_restarts,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_RUN_ID": config.run_id,
        "WORLD_SIZE": world,
    }
    running, failed = set(), False
    for rank in range(world):
        own = dict.fromkeys(("LOCAL_RANK", "RANK", "ROLE_RANK"), rank)
        child = os.fork()
        if child == 0:
            variables = {name: str(value) for name, value in {**shared, **own}.items()}
            _interpret(list(arguments), {**os.environ, **variables})
        running.add(child)
    while running:
        child, status = os.wait()
        running.discard(child)
        if status and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGTERM)
    if failed:
        sys.exit(1)
    return {}


if __name__ == "__main__":
    _serve()
