"""One trial's measurement, really trained on a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from milp_ray.config import BaseSection, PromptSection, TrainingSection
from milp_ray.errors import MilpError
from milp_ray.memory.architecture import adapter_parameters
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.search.measure import TrialTask, check_probe_users, measure
from milp_ray.search.results import METRICS
from milp_ray.training.base import Base, load_base
from milp_ray.users.records import UserSplit

SOME = CanonicalLayout((False, True, False, True), 4)
EMPTY = CanonicalLayout((False,) * 4, 0)


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> Base:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


@pytest.fixture(scope="module")
def splits(make_split: Callable[..., UserSplit]) -> tuple[UserSplit, ...]:
    return tuple(make_split(f"u-{i}", 4, 2, 2, 1, seed=i) for i in range(2))


def task(splits: tuple[UserSplit, ...], base: Base, **changes: object) -> TrialTask:
    settings: dict = {
        "base": BaseSection(model=base.model_id),
        "training": TrainingSection(memory_epochs=3, instruction_epochs=3, learning_rate=1e-2),
        "prompt": PromptSection(),
        "stages": "memory",
        "max_new_tokens": 8,
        "batch_size": 8,
        "seed": 0,
        "splits": splits,
    }
    return TrialTask(**{**settings, **changes})


def test_a_trial_reports_numbers_only_and_the_same_ones_every_time(
    base: Base, splits: tuple[UserSplit, ...]
) -> None:
    first = measure(base, SOME, task(splits, base))
    assert set(first) == {*METRICS, "per_user"}
    text = json.dumps(first)
    assert not any(turn.text in text for split in splits for turn in split.history)
    again = measure(base, SOME, task(splits, base))
    clock = {"seconds", "peak_rss_mib"}
    assert {k: v for k, v in first.items() if k not in clock} == {
        k: v for k, v in again.items() if k not in clock
    }
    assert first["steps"] > 0
    assert first["adapter_parameters"] == adapter_parameters(SOME, base.shapes)


def test_means_and_standard_errors_are_over_the_probe_users(
    base: Base, splits: tuple[UserSplit, ...]
) -> None:
    both = measure(base, SOME, task(splits, base))
    alone = measure(base, SOME, task(splits[:1], base))
    first, second = both["per_user"]["validation_loss"]
    assert alone["validation_loss"] == first  # a user's training does not depend on who else is measured
    assert both["validation_loss"] == pytest.approx((first + second) / 2)
    assert both["validation_loss_sem"] == pytest.approx(abs(first - second) / 2)
    assert alone["validation_loss_sem"] is None


def test_the_empty_layout_is_the_base_as_it_is(base: Base, splits: tuple[UserSplit, ...]) -> None:
    values = measure(base, EMPTY, task(splits, base))
    assert (values["steps"], values["tokens"], values["adapter_parameters"]) == (0, 0, 0)
    assert values["validation_loss"] != measure(base, SOME, task(splits, base))["validation_loss"]


def test_both_stages_train_more_than_memory_alone(base: Base, splits: tuple[UserSplit, ...]) -> None:
    memory = measure(base, SOME, task(splits, base))
    both = measure(base, SOME, task(splits, base, stages="both"))
    assert both["steps"] > memory["steps"]
    assert both["validation_loss"] < memory["validation_loss"]


def test_probe_users_need_validation_examples(make_split: Callable[..., UserSplit]) -> None:
    with pytest.raises(MilpError, match="no probe users"):
        check_probe_users([])
    with pytest.raises(MilpError, match="1 of 2 probe users"):
        check_probe_users([make_split("a"), make_split("b", n_val=0)])
