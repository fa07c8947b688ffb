"""Garbage collection that never holds up Tune's controller for long."""

from __future__ import annotations

import gc
from typing import Any

from ray import tune

_NEVER = 1_000_000_000  # of the youngest generation but one, until the oldest is looked through
_TRIALS = 50


class ShortCollections(tune.Callback):
    """Collects among what the last trials have left, instead of among everything; a context manager.

    Python looks through all objects whenever their number has grown by a quarter, and nothing else runs
    meanwhile: the longer, the more libraries are imported and the more trials there were. Here what has
    stayed is set aside after every few trials.
    """

    def __init__(self) -> None:
        self._thresholds = gc.get_threshold()
        self._n_ended = 0

    def __enter__(self) -> ShortCollections:
        gc.set_threshold(*self._thresholds[:2], _NEVER)
        _set_aside()
        return self

    def __exit__(self, *_: object) -> None:
        gc.set_threshold(*self._thresholds)
        gc.unfreeze()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """One trial more has ended."""
        self._one_more()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """One trial more has ended, or will be tried again."""
        self._one_more()

    def _one_more(self) -> None:
        self._n_ended += 1
        if self._n_ended % _TRIALS == 0:
            _set_aside()


def _set_aside() -> None:
    gc.collect()
    gc.freeze()
