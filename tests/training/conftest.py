"""Several processes over gloo that train one job together."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


class Group:
    """Running processes, and a connection to each in the order of ranks."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], connections: list[Connection]) -> None:
        self.processes = processes
        self.compiled: Path | None = None  # where DeepSpeed would put what it compiles
        self._connections = connections

    def run(self, **arguments: Any) -> list[dict[str, Any]]:
        """What :func:`pair_member.run_job` gives in every process; an error in one of them is raised."""
        for connection in self._connections:
            connection.send(arguments)
        waiting, answers = list(self._connections), {}
        while waiting:
            ready = wait(waiting, timeout=120)
            assert ready, "the processes wait for each other"
            for connection in ready:
                answer = connection.recv()
                if isinstance(answer, Exception):
                    raise answer
                answers[self._connections.index(connection)] = answer
                waiting.remove(connection)
        return [answers[rank] for rank in range(len(answers))]


@contextmanager
def _group(folder: Path, size: int = 2, **variables: str) -> Iterator[Group]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    # A launcher's leftovers must not be taken for the group's.
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    socket = str(folder / "socket")
    script = str(Path(__file__).parent / "pair_member.py")
    with ExitStack() as stack, Listener(socket) as listener:
        processes = [
            subprocess.Popen(
                [sys.executable, script, str(rank), str(size), socket, str(folder / "store")],
                env=environment,
                cwd=folder,
            )
            for rank in range(size)
        ]
        for process in processes:
            stack.callback(process.wait)
            stack.callback(process.kill)
        connections: dict[int, Any] = {}
        for _ in processes:
            connection = listener.accept()
            connections[connection.recv()] = connection
        yield Group(processes, [connections[rank] for rank in range(size)])
        for connection in connections.values():
            connection.close()


@pytest.fixture(scope="session")
def process_group() -> Callable[..., Any]:
    """``process_group(folder, size, **environment)``: a context in which the processes run."""
    return _group


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    """Two processes; they are started once and train one job after the other.

    They find neither a compiler nor ninja, and nothing that was compiled before.
    """
    folder = tmp_path_factory.mktemp("pair")
    nothing = {name: str(folder / name.lower()) for name in ("PATH", "TORCH_EXTENSIONS_DIR")}
    with _group(folder, **nothing, CC="", CXX="") as group:
        group.compiled = folder / "torch_extensions_dir"
        yield group
