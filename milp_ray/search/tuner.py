"""Ray Tune, driven for one call of a study: as many trials at once as the cluster holds, until none waits."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.environment import environment
from milp_ray.errors import MilpError

if TYPE_CHECKING:
    from ray.tune import Trainable

    from milp_ray.config.search import SearchSection
    from milp_ray.search.conductor import Conductor
    from milp_ray.search.measure import TrialTask
    from milp_ray.search.searcher import KeepWorkers

# Idle workers that are kept: as many as there may ever be, since nodes join.
_MOST_WORKERS = 10_000
# Loggers of what is raised as well, with its traceback.
_TRACEBACKS = ("ray.tune.execution.experiment_state", "ray.tune.execution.tune_controller")


def run_tune(
    folder: Path,
    conductor: Conductor,
    section: SearchSection,
    task: TrialTask,
    n_slots: int,
    trainable: type[Trainable] | None,
    stack: ExitStack,
) -> None:
    """Run trials until the conductor has none left.

    Args:
        folder: for Tune's files, a folder a call.
        conductor: says what to measure, and takes in what was measured.
        section: what a trial holds of the cluster, and how often it is tried.
        task: what every trial measures its layout on.
        n_slots: trials that run at once, as :func:`count_slots` says.
        trainable: measures a layout in place of :class:`milp_ray.search.trial.MeasureLayout`.
        stack: processes that trials share are ended with it.

    Raises:
        MilpError: the journal or Tune's own files cannot be written, or no process proposes layouts.
    """
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback

    from milp_ray.search.garbage import ShortCollections
    from milp_ray.search.hung import HungTrials
    from milp_ray.search.lost import told_to_tune
    from milp_ray.search.searcher import ErrorReasons, FailureStops, LayoutSearcher
    from milp_ray.search.trial import MeasureLayout
    from milp_ray.search.trial_group import GroupSpec, no_resources
    from milp_ray.search.trial_host import HostSpec, Seats, trial_hosts

    group, spec = GroupSpec.of(section), HostSpec.of(section)
    more: dict[str, Any] = {}
    seats = None
    if group is not None:
        more["group"] = group
    elif spec is not None:
        n_hosts = math.ceil(n_slots / spec.n_trials)
        seats = Seats(n_hosts)
        more["hosts"] = stack.enter_context(trial_hosts(task, spec, n_hosts))
    prepared = tune.with_resources(
        tune.with_parameters(trainable or MeasureLayout, task=task, **more),
        no_resources() if more else {"cpu": section.cpus_per_trial, "gpu": section.gpus_per_trial},
    )
    searcher = LayoutSearcher(conductor, seats)
    collections = ShortCollections()
    callbacks = [ErrorReasons(searcher, section.max_failures), JsonLoggerCallback(), collections]
    if section.patience is not None and not more:
        # (A trial that others compute may wait for them for as long as it takes.)
        callbacks.append(HungTrials(section.patience))
    folder.mkdir(parents=True, exist_ok=True)
    attempt = sum(path.is_dir() for path in folder.iterdir()) + 1
    with _tune_environment(), told_to_tune():
        tuner = tune.Tuner(
            prepared,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=_scheduler(conductor, section),
                num_samples=-1,  # until the searcher says that it has finished
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name=f"attempt-{attempt}",
                storage_path=str(folder.resolve()),
                verbose=0,
                # A trial is one step: there is nothing to go on from. (Tune would save at its end otherwise.)
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=section.max_failures),
                callbacks=callbacks,
                stop=FailureStops(searcher),
            ),
        )
        try:
            with collections:
                tuner.fit()
        except Exception:
            # Tune tells of what happens in its callbacks as a traceback in the text of an error of its own.
            if searcher.failure is None:
                _check_writable(folder)  # Tune hides this cause, too
                raise
        finally:
            if searcher.failure is None:
                searcher.finish()
        if searcher.failure is not None:
            raise searcher.failure


def count_slots(section: SearchSection) -> int:
    """Trials that can run at once, on the cluster as it is now; one at the least, which then waits."""
    n_slots = max(1, int(_room(section, _resources()))) * section.n_sharing
    if section.max_concurrent_trials is not None:
        return min(n_slots, section.max_concurrent_trials)
    return n_slots


def check_room(section: SearchSection) -> None:
    """Refuse to begin where no trial would ever run.

    Raises:
        MilpError: the cluster cannot hold the processes of a single trial.
    """
    resources = _resources()
    if (
        section.max_concurrent_trials is not None
        or (section.n_processes == 1 and section.n_sharing == 1)
        or _room(section, resources) >= 1
    ):
        return
    who = (
        f"the {section.n_processes} processes of a trial"
        if section.n_processes > 1
        else f"{section.n_sharing} trials that share a process"
    )
    raise MilpError(
        f"{who} take {section.cpus_per_trial:g} CPUs (search.cpus_per_trial) and {section.held_gpus:g} "
        "GPUs (search.gpus_per_trial or trials_per_gpu), but the cluster has "
        f"{resources.get('CPU', 0.0):g} CPUs and {resources.get('GPU', 0.0):g} GPUs in all; lower them, "
        "or set search.max_concurrent_trials where nodes are added on demand"
    )


def _resources() -> dict[str, float]:
    """All that the cluster has now."""
    import ray

    resources: dict[str, float] = ray.cluster_resources()
    return resources


def _room(section: SearchSection, resources: dict[str, float]) -> float:
    """How often ``resources`` hold what the process or the processes of a trial do."""
    counts = [resources.get("CPU", 1.0) / section.cpus_per_trial]
    if section.held_gpus:
        counts.append(resources.get("GPU", 0.0) / section.held_gpus)
    return min(counts)


def own_limit(section: SearchSection) -> SearchSection:
    """The section; its limit of trials at once left out where Tune cannot keep what the cluster holds.

    A trial that holds no resources itself would never wait for them.
    """
    if section.n_processes == 1 and section.n_sharing == 1:
        return section
    return section.model_copy(update={"max_concurrent_trials": None})


def _scheduler(conductor: Conductor, section: SearchSection) -> KeepWorkers:
    """Keeps idle workers, and ends trials early where that is asked for."""
    from milp_ray.search.scheduler import RungScheduler
    from milp_ray.search.searcher import KeepWorkers

    if not section.early_stopping.enabled:
        return KeepWorkers(_MOST_WORKERS)
    return RungScheduler(
        _MOST_WORKERS,
        section.early_stopping,
        section.objectives,
        conductor.rungs,
        on_rung=conductor.reached_rung,
    )


def _check_writable(folder: Path) -> None:
    """Whether a folder's disk takes a file as large as those that Tune writes.

    Raises:
        MilpError: it does not.
    """
    from milp_ray.atomic_files import write_bytes

    probe = folder / "probe"
    try:
        write_bytes(probe, bytes(1 << 16))
        probe.unlink()
    except OSError as error:
        said = os.strerror(error.errno or 0)
        raise MilpError(
            f"{folder} cannot be written: {said}. Make room on its disk, or mend it; every trial that ended "
            "before is kept, and the same command goes on from there"
        ) from None


def _trial_name(trial: Any) -> str:
    return f"trial-{trial.config['trial']:04d}-{trial.config['key']}"[:80]


@contextmanager
def _tune_environment() -> Iterator[None]:
    """Settings that Tune takes from the environment only.

    One logger, which is added by hand. An interruption reaches us, since Tune's own handling of it ends in
    advice to use ``Tuner.restore``, which is not how a study is resumed. Nothing is printed between the lines
    of our progress bar: the journal names every failed trial with its reason.

    As many trials may wait for their processes as the conductor hands out, so that these start side by side.
    Where that is one at a time, Tune gives a worker that becomes free to it, ends the process that was
    starting for it, and starts the next one's from the beginning: trials shorter than that would run one
    after the other. Tune's state is written at the beginning and at the end: nothing is resumed from it, and
    writing it holds up Tune's controller the longer the more trials there are.
    """
    wanted = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_MAX_PENDING_TRIALS_PG": str(_MOST_WORKERS),
        "TUNE_GLOBAL_CHECKPOINT_S": "inf",
        # Paths of a configuration are relative to the working directory, in a worker as here.
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }
    loggers = [logging.getLogger(name) for name in _TRACEBACKS]
    before = [logger.level for logger in loggers]
    with environment(wanted):
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
