"""The cluster that these tests share, and the table of how long it took to recover."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.launched import NAMES, Cluster, prepare
from support.machines import Network, what_is_missing

SECONDS = "seconds"  # the property of a test's report that holds what it measured


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Iterator[Cluster]:
    """A head node and two workers of two logical GPUs each, brought up with `ray up`."""
    missing = what_is_missing()
    if missing is not None:
        pytest.fail(f"the launcher cannot be tested here: {missing}", pytrace=False)
    folder = tmp_path_factory.mktemp("machines")
    prepare(folder)
    with Network(folder, NAMES) as network:
        shutil.copytree(tiny_llama_dir, network.storage / tiny_llama_dir.name)
        yield Cluster(network)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests have measured, one line a measurement."""
    reports = [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]
    measured = [pair for report in reports for name, pair in report.user_properties if name == SECONDS]
    if measured:
        terminalreporter.section("seconds")
        for what, seconds in measured:
            terminalreporter.line(f"{seconds:7.1f}  {what}")
