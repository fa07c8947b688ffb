"""What the fault tests share: a cluster, processes that work on it, and the table of what they measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from support.clusters import Driver, Nodes, own_ray_folder

_PROPERTY = "fault"


@pytest.fixture
def new_cluster() -> Iterator[Callable[[], Nodes]]:
    """``new_cluster()``: a head; every cluster of the test is taken down at its end."""
    clusters: list[Nodes] = []
    with own_ray_folder():

        def start() -> Nodes:
            clusters.append(Nodes())
            return clusters[-1]

        yield start
        for cluster in clusters:
            cluster.close()


@pytest.fixture
def nodes(new_cluster: Callable[[], Nodes]) -> Nodes:
    """A cluster whose head has no CPUs."""
    return new_cluster()


@pytest.fixture
def drive() -> Iterator[Callable[..., Driver]]:
    """``drive(*arguments, address=…)``: a Python process on a cluster; none outlives the test."""
    drivers: list[Driver] = []

    def start(*arguments: object, address: str) -> Driver:
        drivers.append(Driver(*arguments, address=address))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.kill()


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """``measured(fault, lost, seconds, until)``: a row of the table that is printed at the end."""

    def note(fault: str, lost: str, seconds: float, until: str) -> None:
        record_property(_PROPERTY, (fault, lost, f"{seconds:.1f} s", until))

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the rows of all tests that passed."""
    rows = [
        (*value, report.nodeid.rpartition("::")[2])
        for report in terminalreporter.getreports("passed")
        if report.when == "call"
        for name, value in report.user_properties
        if name == _PROPERTY
    ]
    if not rows:
        return
    terminalreporter.section("faults: what was lost, and the time to recover")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.line("  ".join(cells).rstrip())
