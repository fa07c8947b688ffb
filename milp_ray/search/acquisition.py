"""The search for the best new layout under an acquisition function.

Only canonical layouts that may still be proposed are ever looked at: all of them where they are few, else a
pool of random ones and of the neighbours of likely points of the front, and from the best of the pool a climb
from neighbour to neighbour.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from milp_ray.search.features import CanonicalRows, Rows, row_keys

Score = Callable[[Rows], NDArray[np.float64]]


@dataclass(frozen=True)
class Effort:
    """How hard to look."""

    try_all: int = 2048  # a space of at most so many layouts is tried as a whole
    n_random: int = 1024  # random layouts of the pool
    n_front: int = 8  # points of the front whose neighbours are in the pool
    n_kept: int = 512  # best of all tried layouts that are tried again once another point is pending
    n_starts: int = 4  # layouts from which to climb
    n_rounds: int = 12  # steps of a climb at most


EFFORT = Effort()


class NewLayouts:
    """The layouts of a space that may be proposed, and the best of them under one score after another.

    Args:
        rows: of the space.
        unavailable: keys (:func:`row_keys`) of layouts that were measured, failed or are being measured.
        front: rows of likely points of the front, the likeliest first.
        rng: of the random layouts of the pool.
    """

    def __init__(
        self,
        rows: CanonicalRows,
        unavailable: Collection[bytes],
        front: Rows,
        rng: np.random.Generator,
        effort: Effort = EFFORT,
    ) -> None:
        self._rows = rows
        self._unavailable = set(unavailable)
        self._effort = effort
        self._is_small = rows.space.n_canonical <= effort.try_all
        if self._is_small:
            self._pool = rows.all()
        else:
            near = [rows.neighbours(row) for row in front[: effort.n_front]]
            self._pool = np.concatenate([*near, rows.random(effort.n_random, rng)])

    def take_best(self, score: Score) -> Rows | None:
        """The row with the highest score, which is unavailable from then on; ``None``: none is left.

        Equal scores go to the smaller row, so that the order of trying does not matter.
        """
        tried = _Tried(score, self._unavailable)
        tried.add(self._pool)
        if not tried.keys:
            return None
        if not self._is_small:
            self._climb(tried)
            # Another pending point makes no layout better, so the next best one is among the best now.
            self._pool = tried.ranked(self._effort.n_kept)
        best = tried.ranked(1)[0]
        self._unavailable.add(best.tobytes())
        return best

    def _climb(self, tried: _Tried) -> None:
        """From each start to its best neighbour for as long as that is better; all starts at once."""
        current = list(tried.ranked(self._effort.n_starts))
        for _ in range(self._effort.n_rounds):
            if not current:
                return
            around = [self._rows.neighbours(row) for row in current]
            tried.add(np.concatenate(around))
            moved: dict[bytes, Rows] = {}
            for row, near in zip(current, around, strict=True):
                best = tried.best_of(near)
                if best is not None and tried.score_of(best) > tried.score_of(row):
                    moved[best.tobytes()] = best
            current = list(moved.values())


class _Tried:
    """Rows with their scores; none is scored twice."""

    def __init__(self, score: Score, unavailable: Collection[bytes]) -> None:
        self._score = score
        self._unavailable = unavailable
        self._scores: dict[bytes, float] = {}

    @property
    def keys(self) -> Collection[bytes]:
        return self._scores.keys()

    def add(self, rows: Rows) -> None:
        """Score those that are available and new."""
        fresh: dict[bytes, int] = {}
        for index, key in enumerate(row_keys(rows)):
            if key not in self._scores and key not in self._unavailable:
                fresh.setdefault(key, index)
        if fresh:
            scores = self._score(rows[list(fresh.values())]).tolist()
            self._scores.update(zip(fresh, scores, strict=True))

    def score_of(self, row: Rows) -> float:
        return self._scores[row.tobytes()]

    def best_of(self, rows: Rows) -> Rows | None:
        """The best of those of ``rows`` that are available."""
        keys = [key for key in row_keys(rows) if key in self._scores]
        return None if not keys else _row(min(keys, key=self._order))

    def ranked(self, n: int) -> Rows:
        """The best ``n`` rows, the best first."""
        keys = sorted(self._scores, key=self._order)[:n]
        return np.stack([_row(key) for key in keys])

    def _order(self, key: bytes) -> tuple[float, bytes]:
        return (-self._scores[key], key)


def _row(key: bytes) -> Rows:
    return np.frombuffer(key, dtype=np.uint8)
