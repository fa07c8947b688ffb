"""What passes between Tune and the conductor, Tune's oddities included. No Ray is started."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.tune.search import Searcher

from milp_ray.config import Config
from milp_ray.config.base import BaseSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.search import SearchSection
from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.memory.space import SearchSpace
from milp_ray.search.conductor import Conductor
from milp_ray.search.garbage import ShortCollections
from milp_ray.search.journal import Journal, read_events, read_study
from milp_ray.search.measure import TrialTask
from milp_ray.search.searcher import ErrorReasons, FailureStops, KeepWorkers, LayoutSearcher, error_reason
from milp_ray.search.study import StudySettings, trial_task
from milp_ray.search.suggest import InlineProposer
from milp_ray.search.trial import FAILED, MeasureLayout, TrialFailed
from milp_ray.users.records import Turn, UserSplit

VALUES = {"validation_loss": 1.0, "rouge_l": 2.0, "adapter_parameters": 3, "seconds": 0.5}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


@pytest.fixture
def searcher(path: Path) -> LayoutSearcher:
    journal = Journal(path)
    journal.append("study_started", digest="d", objectives=["validation_loss", "rouge_l"], n_initial=3)
    search = SearchSection(n_trials=3, n_initial=3)
    proposer = InlineProposer(lambda q: [])
    return LayoutSearcher(Conductor(journal, SearchSpace(4, (2, 4)), search, 0, proposer, n_slots=3))


def test_a_trial_s_config_is_its_layout_and_nothing_else(searcher: LayoutSearcher) -> None:
    config = searcher.suggest("a")
    assert set(config) == {"trial", "key", "layout"}
    assert config["trial"] == 0


def test_after_the_last_trial_the_search_is_finished(searcher: LayoutSearcher) -> None:
    assert all(isinstance(searcher.suggest(name), dict) for name in "abc")
    assert searcher.suggest("d") is None, "they may come back"
    for name in "abc":
        searcher.on_trial_complete(name, dict(VALUES))
    assert searcher.suggest("d") == Searcher.FINISHED


def test_a_trial_given_to_a_process_that_is_gone_waits_again_as_often_as_trials_are_retried(
    searcher: LayoutSearcher, path: Path
) -> None:
    reasons = ErrorReasons(searcher, max_failures=2)
    for n_lost in range(1, 4):
        config = searcher.suggest(f"try-{n_lost}")
        assert config["trial"] == 0
        lost = SimpleNamespace(
            trial_id=f"try-{n_lost}",
            get_pickled_error=RayActorError,
            run_metadata=SimpleNamespace(num_failures=1),
        )
        searcher.on_trial_complete(lost.trial_id, None, error=True)
        reasons.on_trial_error(0, [], lost)
        assert (read_study(path).trials[0].status == "failed") == (n_lost == 3)


def test_a_result_is_recorded_flattened_or_not_and_without_tune_s_bookkeeping(
    searcher: LayoutSearcher, path: Path
) -> None:
    searcher.suggest("a")
    searcher.suggest("b")
    bookkeeping = {"training_iteration": 1, "pid": 7, "config/key": "x"}
    searcher.on_trial_complete("a", {**VALUES, **bookkeeping, "per_user/rouge_l": [1.0, 3.0]})
    searcher.on_trial_complete("b", {**VALUES, **bookkeeping, "per_user": {"rouge_l": [1.0, 3.0]}})
    for trial in read_study(path).trials[:2]:
        assert trial.metrics == {**VALUES, "per_user": {"rouge_l": [1.0, 3.0]}}


def test_what_the_conductor_cannot_do_ends_the_search(
    searcher: LayoutSearcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopper = FailureStops(searcher)
    searcher.suggest("a")
    assert not stopper.stop_all()
    assert not stopper("a", {})

    def full(*_: object, **__: object) -> None:
        raise MilpError("the disk is full")

    monkeypatch.setattr(searcher._conductor, "complete", full)
    with pytest.raises(MilpError, match="the disk is full"):
        searcher.on_trial_complete("a", dict(VALUES))
    assert stopper.stop_all()
    assert str(searcher.failure) == "the disk is full"


def test_unknown_ids_and_second_ends_are_ignored(searcher: LayoutSearcher, path: Path) -> None:
    searcher.suggest("a")
    searcher.on_trial_complete("a", dict(VALUES))
    before = path.read_bytes()
    searcher.on_trial_complete("a", {**VALUES, "validation_loss": 9.0})
    searcher.on_trial_complete("a", None, error=True)
    searcher.on_trial_complete("unknown", dict(VALUES))
    searcher.explain_error("unknown", "reason")
    assert path.read_bytes() == before


def test_the_longest_wait_of_the_controller_is_recorded(searcher: LayoutSearcher, path: Path) -> None:
    searcher.suggest("a")
    searcher.on_trial_complete("a", dict(VALUES))
    searcher.finish()
    last = read_events(path)[-1]
    assert last["event"] == "session_ended"
    assert 0 < last["max_block_seconds"] == pytest.approx(searcher.max_block_seconds, abs=1e-4)


def test_a_reported_failure_is_recorded_as_one(searcher: LayoutSearcher, path: Path) -> None:
    searcher.suggest("a")
    searcher.on_trial_complete("a", {FAILED: "training diverged"})
    assert read_study(path).trials[0].reason == "training diverged"


def test_an_error_gets_its_reason_from_the_callback(searcher: LayoutSearcher, path: Path) -> None:
    searcher.suggest("a")
    searcher.suggest("b")
    searcher.on_trial_complete("a", None, error=True)
    searcher.on_trial_complete("b", None, error=True)
    trial = SimpleNamespace(
        trial_id="a", get_pickled_error=lambda: TrialFailed("ValueError at milp_ray/x.py:3")
    )
    ErrorReasons(searcher).on_trial_error(1, [], trial)
    searcher.suggest("c")
    reasons = [t.reason for t in read_study(path).trials[:2]]
    assert reasons == ["ValueError at milp_ray/x.py:3", "the trial ended with an error"]


def test_foreign_errors_are_told_by_their_class_alone() -> None:
    assert error_reason(ValueError("my dog is called Rex")) == "ValueError"
    wrapped = RayTaskError("step", "a traceback with my dog Rex", KeyError("Rex"))
    assert error_reason(wrapped) == "KeyError"
    assert error_reason(RayTaskError("step", "", TrialFailed("OSError at x.py:1"))) == "OSError at x.py:1"
    assert error_reason(None) == "the trial ended with an error"


def test_tune_may_copy_and_pickle_the_searcher(searcher: LayoutSearcher) -> None:
    assert copy.deepcopy(searcher) is searcher
    pickle.loads(pickle.dumps(searcher))


def test_the_searcher_limits_concurrency_itself(searcher: LayoutSearcher) -> None:
    assert searcher.set_max_concurrency(1) is True


def test_what_is_there_is_not_looked_through_while_a_search_runs() -> None:
    thresholds = gc.get_threshold()
    trial: Any = SimpleNamespace()
    with ShortCollections() as collections:
        before = gc.get_freeze_count()
        left = [[i] for i in range(2000)]
        passes = gc.get_stats()[2]["collections"]
        for _ in range(49):
            collections.on_trial_complete(0, [], trial)
        made = [[i] for i in range(100_000)]  # of which Python makes several passes otherwise
        assert gc.get_stats()[2]["collections"] == passes
        assert gc.get_freeze_count() <= before
        collections.on_trial_error(0, [], trial)
        assert gc.get_stats()[2]["collections"] == passes + 1
        assert gc.get_freeze_count() > len(left) + len(made)
    assert (gc.get_freeze_count(), gc.get_threshold()) == (0, thresholds)


def test_workers_are_kept_where_tune_has_the_cache_and_nothing_breaks_where_it_has_not() -> None:
    raised: list[tuple[Any, int]] = []
    cache = SimpleNamespace(increase_max=lambda key, by: raised.append((key, by)))
    wrapper = SimpleNamespace(_tune_controller=SimpleNamespace(_actor_cache=cache))
    trial: Any = SimpleNamespace(placement_group_factory="resources")
    scheduler = KeepWorkers(4)
    scheduler.on_trial_add(wrapper, trial)
    scheduler.on_trial_add(wrapper, trial)
    assert raised == [("resources", 4)]
    KeepWorkers(4).on_trial_add(SimpleNamespace(), trial)


# ----------------------------------------------------------------------------------------------- the trial


def trainable(split: UserSplit, **changes: Any) -> MeasureLayout:
    """A trainable without Tune around it."""
    settings: dict[str, Any] = {
        "base": BaseSection(model="/no/such/folder"),
        "training": TrainingSection(),
        "prompt": PromptSection(),
        "stages": "memory",
        "max_new_tokens": 4,
        "batch_size": 4,
        "seed": 0,
        "splits": (split,),
    }
    trial = MeasureLayout.__new__(MeasureLayout)
    trial._task = TrialTask(**{**settings, **changes})
    trial.config = {"layout": {"n_layers": 4, "layers": [1], "rank": 2}}
    return trial


SECRET = "my dog is called Rex"
SPLIT = UserSplit("u", SECRET, (Turn(SECRET),), (), (), ())


def test_an_error_that_a_retry_would_meet_again_is_a_result() -> None:
    result = trainable(SPLIT).step()
    assert "base.model" in result[FAILED]
    assert result["done"] is True


@pytest.mark.parametrize(("gpus", "share"), [(0.0, 1.0), (0.25, 0.25), (2.0, 1.0)])
def test_a_trial_loads_its_base_with_its_part_of_a_gpu(
    gpus: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []

    def load(_: BaseSection, *, share: float) -> Any:
        told.append(share)
        raise MilpError("that is all")

    monkeypatch.setattr("milp_ray.training.base.load_base", load)
    config = Config.model_validate({"name": "part", "search": {"gpus_per_trial": gpus}})
    task = trial_task(StudySettings.of(config), [SPLIT])
    trainable(SPLIT, gpu_share=task.gpu_share).step()
    assert told == [share]


def test_any_other_error_is_raised_without_texts() -> None:
    broken: Any = None
    with pytest.raises(TrialFailed) as caught:
        trainable(SPLIT, base=broken).step()
    assert "AttributeError at milp_ray/" in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_an_actor_may_be_given_the_next_trial() -> None:
    assert trainable(SPLIT).reset_config({"trial": 1}) is True
