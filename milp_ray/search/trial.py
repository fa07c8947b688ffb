"""The Tune trainable: one trial measures one layout. The process keeps its base from trial to trial."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ray import tune

from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.worker import safe_reason
from milp_ray.search.measure import TrialTask, measure
from milp_ray.telemetry import prepare_worker

if TYPE_CHECKING:
    from milp_ray.config import BaseSection
    from milp_ray.training.base import Base

FAILED = "failed"  # the key of a result that says why the trial failed


class TrialFailed(Exception):
    """A trial's error, told without any text of a user: Tune writes it to files and logs."""


class MeasureLayout(tune.Trainable):
    """Measures the layout in its config, in one step.

    ``reset_config`` says that the actor may be given another trial, which saves its imports and its base.
    """

    def setup(self, config: dict[str, Any], task: TrialTask) -> None:  # type: ignore[override]
        """Called once an actor; ``task`` comes through the object store (``tune.with_parameters``)."""
        self._task = task
        prepare_worker(task.threads)

    def step(self) -> dict[str, Any]:
        """Train, score, report and be done.

        An error that a retry would meet again (a :class:`MilpError`) is reported as a result; any other one
        is raised, so that Tune retries as often as it is allowed to.
        """
        try:
            layout = CanonicalLayout.from_dict(self.config["layout"])
            return {**measure(_base(self._task.base), layout, self._task), tune.result.DONE: True}
        except MilpError as error:
            return {FAILED: str(error), tune.result.DONE: True}
        except Exception as error:
            reason = safe_reason(error)
        # Raised out here: the caught exception, whose message may quote a text, must not hang on to it.
        raise TrialFailed(reason)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        return True


@lru_cache(maxsize=1)
def _base(section: BaseSection) -> Base:
    from milp_ray.training.base import load_base

    return load_base(section)
