"""The Tune trainable: one trial measures one layout. The process keeps its base from trial to trial."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ray import tune

from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.worker import safe_reason
from milp_ray.search.measure import Measurement, TrialTask
from milp_ray.search.trial_group import GroupFailed, GroupMeasurement, GroupSpec, TrialGroup
from milp_ray.search.trial_host import Host, HostFailed, HostMeasurement
from milp_ray.telemetry import prepare_worker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milp_ray.config.base import BaseSection
    from milp_ray.training.base import Base

FAILED = "failed"  # the key of a result that says why the trial failed


class TrialFailed(Exception):
    """A trial's error, told without any text of a user: Tune writes it to files and logs."""


class MeasureLayout(tune.Trainable):
    """Measures the layout in its config: a step for each rung, and one more for the final values.

    A rung's result has the key :data:`milp_ray.search.rungs.RUNG` and no value under the name of a final one;
    the last result has the final values only. ``reset_config`` says that the actor may be given another
    trial, which saves its imports and its base. With a ``group`` the work is done by processes of its own,
    with ``hosts`` by the one that the trial's config names, which other trials share.
    """

    # between the steps of a trial
    _measurement: Measurement | GroupMeasurement | HostMeasurement | None = None
    _group: TrialGroup | None = None
    _hosts: Sequence[Host] = ()

    def setup(  # type: ignore[override]
        self,
        config: dict[str, Any],
        task: TrialTask,
        group: GroupSpec | None = None,
        hosts: Sequence[Host] = (),
    ) -> None:
        """Called once an actor; ``task`` comes through the object store (``tune.with_parameters``)."""
        self._task = task
        self._hosts = hosts
        self._group = None if group is None else TrialGroup(task, group)
        prepare_worker(task.threads)

    def __repr__(self) -> str:
        return "layout-trial"

    def step(self) -> dict[str, Any]:
        """Train up to the next rung and report it, or train to the end, score, report and be done.

        An error that a retry would meet again (a :class:`MilpError`) is reported as a result; any other one
        is raised, so that Tune retries as often as it is allowed to.
        """
        try:
            return self._advance()
        except MilpError as error:
            self._forget()
            return {FAILED: str(error), tune.result.DONE: True}
        except (GroupFailed, HostFailed) as error:
            self.cleanup()
            reason = str(error)
        except Exception as error:
            self.cleanup()
            reason = safe_reason(error)
        # Raised out here: the caught exception, whose message may quote a text, must not hang on to it.
        raise TrialFailed(reason)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Forget the trial at hand, which may have been stopped at a rung, and take the next one."""
        self._forget()
        return True

    def cleanup(self) -> None:
        """Remove what the trial at hand kept for its next step; called when the actor ends."""
        self._forget()
        if self._group is not None:
            self._group.end()

    def _forget(self) -> None:
        if self._measurement is not None:
            self._measurement.close()
            self._measurement = None

    def _advance(self) -> dict[str, Any]:
        if self._measurement is None:
            self._measurement = self._begin(CanonicalLayout.from_dict(self.config["layout"]))
        if self._measurement.has_rungs_left:
            return self._measurement.next_rung()
        result = self._measurement.finish()
        self._forget()
        return {**result, tune.result.DONE: True}

    def _begin(self, layout: CanonicalLayout) -> Measurement | GroupMeasurement | HostMeasurement:
        if self._hosts:
            host = self._hosts[self.config["host"]]
            return HostMeasurement(host, self.config["trial"], layout, len(self._task.rungs))
        if self._group is not None:
            return self._group.measurement(layout)
        return Measurement(_base(self._task.base, self._task.gpu_share), layout, self._task)


@lru_cache(maxsize=1)
def _base(section: BaseSection, share: float) -> Base:
    from milp_ray.training.base import load_base

    return load_base(section, share=share)
