"""The numbers of a run while it works: for the Ray dashboard, Prometheus, trackers and `milp-ray watch`.

Gauges are set in the driver, since those of processes that live for one trial are lost with them, and have
one tag, the run's name: never anything of a user. Ray exports each as ``ray_<name>``.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from milp_ray.atomic_files import replacing, sync_file
from milp_ray.errors import MilpError

if TYPE_CHECKING:
    from milp_ray.rundir import RunFolder
    from milp_ray.search.journal import TrialRecord
    from milp_ray.trackers import Tracker

# In ASCII: Ray takes nothing else.
DESCRIPTIONS: Mapping[str, str] = {
    "milp_trials_planned": "Trials that the study will have.",
    "milp_trials_running": "Trials that run now.",
    "milp_trials_finished": "Trials that have ended, with values or without.",
    "milp_trials_failed": "Trials that failed for good.",
    "milp_trials_stopped_early": "Trials that were stopped at a rung.",
    "milp_best_validation_loss": "Lowest validation loss of a trial, nats a token.",
    "milp_best_rouge_l": "Highest ROUGE-L of a trial, F-measure times 100.",
    "milp_hypervolume": "Hypervolume of the front.",
    "milp_suggestion_seconds": "Seconds that the latest batch of layouts took to propose.",
    "milp_startup_seconds": "Seconds until the process and the base were there, of the latest trial to end.",
    "milp_idle_slots": "Trial slots that wait for a layout.",
    "milp_users_expected": "Users of the batch; of a stream, as many as its size suggests.",
    "milp_users_finished": "Users that have their adapter, those from before included.",
    "milp_users_failed": "Users that get none.",
    "milp_users_per_minute": "Adapters made a minute since the batch began.",
    "milp_tokens_per_second": "Tokens trained on a second since the batch began, all workers together.",
    "milp_worker_memory_mib": "Resident memory of the largest worker, MiB.",
    "milp_gpu_memory_mib": "Most memory that one process has held on a GPU, MiB; none on CPUs.",
}
_MOMENTARY = ("trials_running", "idle_slots")  # what an earlier command left of them means nothing
_PREFIX = "milp_"
_TAG = "run"
_SECONDS_BETWEEN_WRITES = 1.0
_TIME = "%Y-%m-%dT%H:%M:%SZ"
logger = logging.getLogger("milp_ray")


class Gauges:
    """The gauges of one run; use it as a context manager, which writes the last values at its end.

    Ray is told at once, where a session is open; the run folder's ``gauges.json`` and the trackers at most
    once a second.

    Args:
        run: its name is the value of the one tag.
        trackers: experiment trackers that get the same.
    """

    def __init__(self, run: RunFolder, trackers: Sequence[Tracker] = ()) -> None:
        self._run = run
        self._trackers = trackers
        self._tags = {_TAG: run.path.name}
        self._made: dict[str, Any] = {}
        self._values = {  # without the prefix
            name: value for name, value in _left_by_earlier(run).items() if name not in _MOMENTARY
        }
        self._news: dict[str, tuple[float, int]] = {}  # what the trackers have not yet: value and step
        self._written = -_SECONDS_BETWEEN_WRITES

    def __enter__(self) -> Gauges:
        return self

    def __exit__(self, *_: object) -> None:
        self._write()
        if self._run.gauges_file.is_file():
            sync_file(self._run.gauges_file)

    def set(self, step: int, **values: float | None) -> None:
        """Set gauges by their names without the prefix, such as ``trials_running``; ``None`` sets none.

        Args:
            step: what trackers order the values by: how many trials or users have ended.
        """
        known = {name: float(value) for name, value in values.items() if value is not None}
        unknown = sorted(_PREFIX + name for name in known if _PREFIX + name not in DESCRIPTIONS)
        if unknown:
            raise ValueError(f"there is no gauge {', '.join(unknown)}; DESCRIPTIONS names them all")
        self._values |= known
        self._news |= {name: (value, step) for name, value in known.items()}
        self._tell_ray(known)
        if time.monotonic() - self._written >= _SECONDS_BETWEEN_WRITES:
            self._write()

    def log_trial(self, trial: TrialRecord) -> None:
        """Give trackers a trial that has ended: its values and its layout, at the step of its index."""
        values = {f"trial/{name}": value for name, value in trial.metrics.items() if _is_number(value)}
        values |= {"trial/rank": trial.layout.rank, "trial/n_loras": sum(trial.layout.mask)}
        for tracker in self._trackers:
            tracker.log(values, trial.index)

    def _tell_ray(self, values: Mapping[str, float]) -> None:
        import ray

        if not ray.is_initialized():
            return
        for name, value in values.items():
            self._gauge(_PREFIX + name).set(value, tags=self._tags)

    def _gauge(self, name: str) -> Any:
        from ray.util.metrics import Gauge

        if name not in self._made:
            self._made[name] = Gauge(name, description=DESCRIPTIONS[name], tag_keys=(_TAG,))
        return self._made[name]

    def _write(self) -> None:
        if not self._news:
            return
        now = datetime.now(UTC).strftime(_TIME)
        text = json.dumps({"time": now, "values": dict(sorted(self._values.items()))})
        # Whole or not at all, but not forced to the disk: Tune's controller may be waiting.
        with replacing(self._run.gauges_file) as temporary:
            temporary.write_text(text, encoding="utf-8")
        by_step: dict[int, dict[str, float]] = {}
        for name, (value, step) in self._news.items():
            by_step.setdefault(step, {})[name] = value
        self._news = {}
        for step, values in sorted(by_step.items()):
            for tracker in self._trackers:
                tracker.log(values, step)
        self._written = time.monotonic()


def read_gauges(run: RunFolder) -> dict[str, float]:
    """The latest values of a run by name, without the prefix; empty where there are none.

    Raises:
        MilpError: the file was damaged.
    """
    try:
        found = json.loads(run.gauges_file.read_text(encoding="utf-8"))
        return {name: float(value) for name, value in found["values"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise MilpError(f"{run.gauges_file} cannot be read ({type(error).__name__}); remove it") from None


def _left_by_earlier(run: RunFolder) -> dict[str, float]:
    """What earlier commands left; nothing of a damaged file, for whose sake no run is held up."""
    try:
        return read_gauges(run)
    except MilpError:
        logger.warning("%s was damaged: the numbers of earlier commands are lost", run.gauges_file)
        return {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
