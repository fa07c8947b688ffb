"""Peak memory counts this process and what it started, and shared pages once."""

from __future__ import annotations

import subprocess
import sys

from milp_ray.resident_memory import PeakMemory, peak_memory, tree_mib


def test_a_child_s_memory_counts_while_it_lives() -> None:
    before = tree_mib()
    code = "block = bytearray(b'x') * (96 << 20); print('ready', flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.readline()
    during = tree_mib()
    child.communicate("\n")
    assert during - before > 90
    assert tree_mib() < during - 60


def test_the_peak_is_kept_when_memory_is_given_back() -> None:
    peak = PeakMemory()
    peak.sample()
    low = peak.mib
    block = bytearray(b"x") * (96 << 20)
    peak.sample()
    high = peak.mib
    del block
    peak.sample()
    assert high - low > 80
    assert peak.mib == high


def test_the_watcher_measures_at_both_ends() -> None:
    with peak_memory(interval=3600) as peak:
        at_start = peak.mib
        block = bytearray(b"x") * (96 << 20)
    assert at_start > 0
    assert peak.mib - at_start > 80
    assert len(block) == 96 << 20
