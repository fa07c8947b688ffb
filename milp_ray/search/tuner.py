"""Ray Tune, driven for one call of a study: as many trials at once as the cluster holds, until none waits."""

from __future__ import annotations

import gc
import math
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
    """
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback

    from milp_ray.search.searcher import LayoutSearcher, TrialEvents
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
    searcher = LayoutSearcher(conductor, n_slots, seats)
    folder.mkdir(parents=True, exist_ok=True)
    attempt = sum(path.is_dir() for path in folder.iterdir()) + 1
    with _tune_environment(n_slots):
        tuner = tune.Tuner(
            prepared,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=_scheduler(conductor, section, n_slots),
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
                callbacks=[TrialEvents(searcher), JsonLoggerCallback()],
            ),
        )
        try:
            with short_collections():
                tuner.fit()
        finally:
            searcher.finish()


def count_slots(section: SearchSection) -> int:
    """Trials that can run at once, on the cluster as it is now.

    Raises:
        MilpError: the cluster cannot hold the processes of a single trial.
    """
    import ray

    resources = ray.cluster_resources()
    counts = [resources.get("CPU", 1.0) / section.cpus_per_trial]
    if section.held_gpus:
        counts.append(resources.get("GPU", 0.0) / section.held_gpus)
    n_slots = max(1, int(min(counts))) * section.n_sharing
    if section.max_concurrent_trials is not None:
        return min(n_slots, section.max_concurrent_trials)
    if (section.n_processes > 1 or section.n_sharing > 1) and min(counts) < 1:
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
    return n_slots


def limited(section: SearchSection, n_slots: int) -> SearchSection:
    """The section with the limit that Tune cannot keep for trials that hold no resources themselves."""
    if section.n_processes == 1 and section.n_sharing == 1:
        return section
    return section.model_copy(update={"max_concurrent_trials": n_slots})


def _scheduler(conductor: Conductor, section: SearchSection, n_slots: int) -> KeepWorkers:
    """Keeps idle workers, and ends trials early where that is asked for."""
    from milp_ray.search.scheduler import RungScheduler
    from milp_ray.search.searcher import KeepWorkers

    if not section.early_stopping.enabled:
        return KeepWorkers(n_slots)
    return RungScheduler(
        n_slots,
        section.early_stopping,
        section.objectives,
        conductor.rungs,
        on_rung=conductor.reached_rung,
    )


def _trial_name(trial: Any) -> str:
    return f"trial-{trial.config['trial']:04d}-{trial.config['key']}"[:80]


@contextmanager
def short_collections() -> Iterator[None]:
    """Leave what there is already, modules most of all, out of garbage collection.

    A pass through everything holds up Tune's controller, for 0.1 s and more once its libraries are imported.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _tune_environment(n_slots: int) -> Iterator[None]:
    """Settings that Tune takes from the environment only.

    One logger, which is added by hand. An interruption reaches us, since Tune's own handling of it ends in
    advice to use ``Tuner.restore``, which is not how a study is resumed. Nothing is printed between the lines
    of our progress bar: the journal names every failed trial with its reason.

    Processes of trials start side by side; Tune would ask a searcher for the next trial only when the process
    of the last one is up. Tune's state is written at the beginning and at the end: nothing is resumed from
    it, and writing it holds up Tune's controller the longer the more trials there are.
    """
    wanted = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_MAX_PENDING_TRIALS_PG": str(n_slots),
        "TUNE_GLOBAL_CHECKPOINT_S": "inf",
        # Paths of a configuration are relative to the working directory, in a worker as here.
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }
    with environment(wanted):
        yield
