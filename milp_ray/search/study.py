"""One search, from the probe users to the journal: started, or resumed by the same call.

Tune is started anew on every call and only ever sees the trials that are left: the journal, not
``Tuner.restore``, is what a study resumes from (a restore that fails starts over without a word).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.config.search import OPERATIONAL
from milp_ray.errors import MilpError
from milp_ray.memory.architecture import adapter_parameters
from milp_ray.memory.space import SearchSpace
from milp_ray.objectives import ADAPTER_PARAMETERS
from milp_ray.search.conductor import Conductor, StudyProgress
from milp_ray.search.journal import BY_USER, Journal, StudyState, read_study
from milp_ray.search.measure import TrialTask, check_probe_users, trial_parts
from milp_ray.search.results import StudyResult, study_result, write_trials
from milp_ray.search.rungs import rung_epochs
from milp_ray.search.tuner import check_room, count_slots, own_limit, run_tune
from milp_ray.search.warm_start import (
    EARLIER_FILE,
    EarlierStudy,
    fingerprint,
    keep,
    kept_earlier,
    load_earlier,
    portfolio,
)
from milp_ray.users.traits import TRAITS, user_traits

if TYPE_CHECKING:
    from ray.tune import Trainable

    from milp_ray.config import Config
    from milp_ray.config.base import BaseSection
    from milp_ray.config.evaluation import EvaluationSection
    from milp_ray.config.prompt import PromptSection
    from milp_ray.config.search import SearchSection, SpaceSection
    from milp_ray.config.training import TrainingSection
    from milp_ray.memory.architecture import FfnShapes
    from milp_ray.users.records import UserSplit

JOURNAL_FILE = "journal.jsonl"
TRIALS_FILE = "trials.parquet"
TUNE_FOLDER = "tune"

# What does not count when a study is taken up again: where and how long it runs. (What earlier searches hold
# counts, not where they are.)
_OPERATIONAL = {*OPERATIONAL, "n_trials", "warm_start"}
# Fields of a journal's header whose names say too little.
_SHOWN_AS = {"earlier": "the earlier searches of search.warm_start"}


@dataclass(frozen=True)
class StudySettings:
    """The sections that a study needs, and its seed."""

    base: BaseSection
    space: SpaceSection
    training: TrainingSection
    prompt: PromptSection
    search: SearchSection
    evaluation: EvaluationSection
    seed: int
    threads_per_worker: int = 1

    @classmethod
    def of(cls, config: Config) -> StudySettings:
        """Those of a whole configuration."""
        sections = {f.name: getattr(config, f.name) for f in fields(cls) if f.name != "threads_per_worker"}
        return cls(**sections, threads_per_worker=config.ray.threads_per_worker)


def run_study(
    folder: Path,
    settings: StudySettings,
    splits: Sequence[UserSplit],
    shapes: FfnShapes,
    on_progress: Callable[[StudyProgress], None] | None = None,
    trainable: type[Trainable] | None = None,
) -> StudyResult:
    """Run the study in ``folder`` to its end, or what is left of it; Ray must be up.

    Args:
        folder: holds the journal, the table of trials and Tune's files.
        settings: what to search and how to measure.
        splits: the probe users; their test examples are not used.
        shapes: feed-forward shapes of the base.
        on_progress: called when a trial ends and when a batch is asked for or taken in.
        trainable: measures a layout in place of :class:`milp_ray.search.trial.MeasureLayout`, whose contract
            it keeps, so that the search itself can be measured without training.

    Raises:
        MilpError: the folder holds another study, the journal is damaged or being written by another process,
            a probe user cannot be measured, or no trial of the finished study was completed.
        KeyboardInterrupt: the search was interrupted; its message says how far it is.
    """
    check_probe_users(splits)
    space = SearchSpace.for_base(settings.space, shapes)
    task = trial_task(settings, splits)
    earlier = _earlier(folder, settings, space)
    with Journal(folder / JOURNAL_FILE) as journal:
        _begin(journal, _header(settings, space, shapes, task, earlier), earlier)
        _describe_users(journal, splits)
        if not _is_done(journal.state, settings.search, space):
            try:
                _search(folder, journal, space, settings, task, earlier, on_progress, trainable)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(_interrupted(journal.state, settings.search)) from None
        result = study_result(journal.state)
    write_trials(result, folder / TRIALS_FILE)
    if result.n_completed == 0:
        reasons = sorted({trial.reason or "" for trial in result.trials})
        raise MilpError(
            f"all {len(result.trials)} trials of the search failed: {'; '.join(reasons)[:400]}. Mend the "
            f"cause, remove {folder} and search again"
        )
    return result


def _earlier(folder: Path, settings: StudySettings, space: SearchSpace) -> list[EarlierStudy]:
    """The earlier searches that the study starts from: as it began with, where it has begun."""
    search, journal = settings.search, folder / JOURNAL_FILE
    if search.warm_start and journal.exists() and journal.stat().st_size > 0:
        kept = kept_earlier(folder / EARLIER_FILE, search.warm_start, space, search.objectives)
        if kept is not None:
            return kept
    return load_earlier(search.warm_start, space, search.objectives)


def _search(
    folder: Path,
    journal: Journal,
    space: SearchSpace,
    settings: StudySettings,
    task: TrialTask,
    earlier: Sequence[EarlierStudy],
    on_progress: Callable[[StudyProgress], None] | None,
    trainable: type[Trainable] | None,
) -> None:
    from milp_ray.search.suggest import ActorProposer, Suggester

    with ExitStack() as stack:
        known = tuple(study.observations for study in earlier)
        proposer = ActorProposer(Suggester(space, settings.search, settings.seed, known))
        stack.callback(proposer.close)
        if settings.search.n_trials > max(settings.search.n_initial, len(journal.state.trials)):
            proposer.start()  # first of all, so that its imports pass while the initial trials run
        check_room(settings.search)
        n_slots = count_slots(settings.search)
        n_processes = math.ceil(n_slots / settings.search.n_sharing)
        conductor = Conductor(
            journal,
            space,
            own_limit(settings.search),
            settings.seed,
            proposer,
            on_progress,
            n_slots,
            portfolio(earlier, space, settings.search.n_initial),
            n_processes=n_processes,
            # Processes that trials share are made once, at the beginning.
            count_slots=partial(count_slots, settings.search) if settings.search.n_sharing == 1 else None,
        )
        conductor.begin_session()
        run_tune(folder / TUNE_FOLDER, conductor, settings.search, task, n_slots, trainable, stack)
    if not conductor.is_over:
        progress = _progress(journal.state, settings.search)
        raise MilpError(f"Tune ended before the search: {progress}; the same command goes on from there")


def trial_task(settings: StudySettings, splits: Sequence[UserSplit]) -> TrialTask:
    """What every trial of a study measures its layout on; the users' test parts are left out."""
    from milp_ray.training.job import planned_epochs

    training = _trial_training(settings)
    n_epochs = planned_epochs(training, trial_parts(settings.search.trial_stages))
    return TrialTask(
        base=settings.base,
        training=training,
        prompt=settings.prompt,
        stages=settings.search.trial_stages,
        max_new_tokens=settings.evaluation.max_new_tokens,
        batch_size=settings.evaluation.batch_size,
        seed=settings.seed,
        splits=tuple(replace(split, test=()) for split in splits),
        threads=settings.threads_per_worker,
        rungs=rung_epochs(settings.search.early_stopping, n_epochs),
        gpu_share=min(1.0, settings.search.held_gpus) or 1.0,
    )


def _trial_training(settings: StudySettings) -> TrainingSection:
    """The recipe of a trial: that of the users, with as many epochs as ``search.trial_epochs`` says."""
    epochs = settings.search.trial_epochs
    if epochs is None:
        return settings.training
    return settings.training.model_copy(update={"memory_epochs": epochs, "instruction_epochs": epochs})


def _header(
    settings: StudySettings,
    space: SearchSpace,
    shapes: FfnShapes,
    task: TrialTask,
    earlier: Sequence[EarlierStudy],
) -> dict[str, Any]:
    """What the journal begins with; ``digest`` covers all that decides a trial's values and the proposals."""
    decisive = {
        "base": settings.base.model_dump(mode="json"),
        "training": settings.training.model_dump(mode="json"),
        "prompt": settings.prompt.model_dump(mode="json"),
        "search": settings.search.model_dump(mode="json", exclude=_OPERATIONAL),
        "max_new_tokens": task.max_new_tokens,
        "splits": repr(task.splits),
    }
    largest = space.layout({parameter.name: parameter.values[-1] for parameter in space.parameters()})
    shown = {
        "space": {
            "n_layers": space.n_layers,
            "ranks": list(space.ranks),
            "factors": list(space.factors),
            "fixed_layers": None if space.fixed_layers is None else list(space.fixed_layers),
            "fixed_number": space.fixed_number,
            "fixed_rank": space.fixed_rank,
        },
        "objectives": list(settings.search.objectives),
        "worst": {ADAPTER_PARAMETERS.name: adapter_parameters(largest.canonical(), shapes)},
        "n_initial": settings.search.n_initial,
        "n_probe_users": len(task.splits),
        "seed": settings.seed,
        "earlier": fingerprint(earlier),
    }
    text = json.dumps({**decisive, **shown}, sort_keys=True)
    return {"digest": hashlib.sha256(text.encode()).hexdigest(), **shown}


def _begin(journal: Journal, header: dict[str, Any], earlier: Sequence[EarlierStudy]) -> None:
    """Begin the journal, or make sure that it is this study's; and keep what it uses of earlier ones.

    Raises:
        MilpError: it is another study's; what differs is named where it is known.
    """
    found = journal.state.header
    if found is not None and found.get("digest") != header["digest"]:
        names = [name for name in header if name != "digest" and name in found]
        differing = [_SHOWN_AS.get(name, name) for name in names if found[name] != header[name]]
        what = f"{', '.join(differing)} differ" if differing else "its configuration or its users differ"
        raise MilpError(
            f"{journal.path} is the journal of another search ({what}): use another run name, "
            "or remove the study folder to search afresh"
        )
    if earlier:
        keep(journal.path.with_name(EARLIER_FILE), earlier)
    if found is None:
        journal.append("study_started", **header)


def users_have_changed(
    folder: Path, settings: StudySettings, splits: Sequence[UserSplit], shapes: FfnShapes
) -> bool:
    """Whether the study in ``folder`` was begun with other data of its probe users than these.

    The settings are those of the study, as far as its journal tells. Arguments as of :func:`run_study`.

    Raises:
        MilpError: the journal is damaged.
    """
    found = read_study(folder / JOURNAL_FILE).header
    if found is None:
        return False
    space = SearchSpace.for_base(settings.space, shapes)
    task = trial_task(settings, splits)
    header = _header(settings, space, shapes, task, _earlier(folder, settings, space))
    # What the journal tells in words is told by whoever begins with other settings.
    return [name for name in header if name in found and found[name] != header[name]] == ["digest"]


def _describe_users(journal: Journal, splits: Sequence[UserSplit]) -> None:
    """Record by what similar users are known, once; also in a study that an earlier version began."""
    if journal.state.probe_traits:
        return
    rows = [user_traits(split) for split in splits]
    columns = zip(TRAITS, zip(*rows, strict=True), strict=True)
    journal.append("users_described", values={f"{name}{BY_USER}": list(own) for name, own in columns})


def _is_done(state: StudyState, section: SearchSection, space: SearchSpace) -> bool:
    """Whether nothing is left to run (the number of trials may have been raised since the study finished)."""
    enough = len(state.trials) >= section.n_trials or len(state.keys) >= space.n_canonical
    return state.finished is not None and enough


def _progress(state: StudyState, section: SearchSection) -> str:
    n_ended = sum(trial.has_ended for trial in state.trials)
    return f"{n_ended} of {section.n_trials} trials have ended"


def _interrupted(state: StudyState, section: SearchSection) -> str:
    return (
        f"the search was interrupted: {_progress(state, section)} and are kept; "
        "the same command goes on from there"
    )
