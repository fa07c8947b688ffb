"""One progress display for every stage: a bar on a terminal, a few plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

PLAIN_INTERVAL_SECONDS = 15.0  # between two lines of a log; the last one comes in any case


class Progress(Protocol):
    """Where a stage says how far it is."""

    def advance(self, n: int = 1, note: str | None = None) -> None:
        """Count ``n`` more; ``note`` is a short remark shown from now on, such as "2 failed"."""

    def set_total(self, total: int) -> None:
        """Say how many there are in all, where that was not known at the start."""


@contextmanager
def progress(
    label: str,
    total: int | None = None,
    *,
    unit: str = "",
    file: TextIO | None = None,
    interval: float = PLAIN_INTERVAL_SECONDS,
) -> Iterator[Progress]:
    """Show the progress of one stage.

    Args:
        label: the stage, such as "personalize".
        total: how many there are to do; ``None`` while it is not known.
        unit: what is counted, such as "users".
        file: standard output unless another stream is given; a bar is drawn only where it is a terminal.
        interval: seconds between plain lines.
    """
    stream = file or sys.stdout
    if not stream.isatty():
        plain = _PlainProgress(label, total, unit, stream, interval)
        try:
            yield plain
        finally:
            plain.close()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichBar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RichBar(*columns, console=Console(file=stream)) as bar:
        yield _BarProgress(bar, bar.add_task(label, total=total, note=""))


class _BarProgress:
    def __init__(self, bar: RichProgress, task: TaskID) -> None:
        self._bar = bar
        self._task = task

    def advance(self, n: int = 1, note: str | None = None) -> None:
        self._bar.advance(self._task, n)
        if note is not None:
            self._bar.update(self._task, note=note)

    def set_total(self, total: int) -> None:
        self._bar.update(self._task, total=total)


class _PlainProgress:
    """Lines such as ``personalize: 40/120 users, 2 failed, 31 s``, one an interval and one at the end."""

    def __init__(self, label: str, total: int | None, unit: str, stream: TextIO, interval: float) -> None:
        self._label = label
        self._total = total
        self._unit = unit
        self._stream = stream
        self._interval = interval
        self._done = 0
        self._note = ""
        self._written: str | None = None
        self._started = self._last = time.monotonic()

    def advance(self, n: int = 1, note: str | None = None) -> None:
        self._done += n
        self._note = self._note if note is None else note
        if time.monotonic() - self._last >= self._interval:
            self._write()

    def set_total(self, total: int) -> None:
        self._total = total

    def close(self) -> None:
        if self._state() != self._written:
            self._write()

    def _state(self) -> str:
        count = f"{self._done}" if self._total is None else f"{self._done}/{self._total}"
        return ", ".join(part for part in (f"{count} {self._unit}".strip(), self._note) if part)

    def _write(self) -> None:
        self._last = time.monotonic()
        self._written = self._state()
        seconds = self._last - self._started
        print(f"{self._label}: {self._written}, {seconds:.0f} s", file=self._stream, flush=True)
