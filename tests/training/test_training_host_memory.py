"""The memory that a process on a CPU counts on: its threads' share, within what a container may take."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from milp_ray.training import host_memory
from milp_ray.training.host_memory import process_memory

GIB = 2**30
LIBRARIES = GIB // 2


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Eight cores and 64 GiB, 40 of which nobody uses; this process holds one."""
    memory = SimpleNamespace(total=64 * GIB, available=40 * GIB)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=GIB))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(psutil, "Process", lambda: process)
    monkeypatch.setattr(host_memory, "_n_cores", lambda: 8)
    monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(host_memory, "_OWN_CGROUPS", tmp_path / "own")


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


@pytest.mark.parametrize(
    ("threads", "expected"),
    [
        (1, 8),
        (2, 16),
        (8, 41),  # what is free, and what the process holds itself
        (32, 41),
    ],
)
def test_a_thread_counts_on_a_core_s_share_of_what_is_there(threads: int, expected: int) -> None:
    assert process_memory(threads) == expected * GIB - LIBRARIES


def test_a_container_s_limit_is_the_machine_s_memory(tmp_path: Path) -> None:
    write(tmp_path, own="0::/pod/worker")
    write(tmp_path / "pod", memory__max=16 * GIB, memory__current=12 * GIB)
    write(tmp_path / "pod/worker", memory__max="max", memory__current=12 * GIB)
    assert process_memory(1) == 2 * GIB - LIBRARIES
    assert process_memory(8) == 5 * GIB - LIBRARIES
    # Pages of files that were read are given up when memory is short.
    write(tmp_path / "pod", memory__stat=f"anon {9 * GIB}\ninactive_file {3 * GIB}")
    assert process_memory(8) == 8 * GIB - LIBRARIES


def test_limits_of_the_first_version_of_control_groups_count_as_well(tmp_path: Path) -> None:
    write(tmp_path, own="9:cpu,cpuacct:/\n8:memory:/slurm\n0::/")
    group = tmp_path / "memory/slurm"
    write(group, memory__limit_in_bytes=16 * GIB, memory__usage_in_bytes=4 * GIB)
    assert process_memory(8) == 13 * GIB - LIBRARIES
    write(group, memory__limit_in_bytes=2**63 - 4096)  # how it says that there is none
    assert process_memory(8) == 41 * GIB - LIBRARIES


def test_no_memory_is_no_negative_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=GIB, available=0))
    assert process_memory(1) == 0
