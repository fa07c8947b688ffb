"""A base, three users, and a store with their adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from milp_ray.config.base import BaseSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.recipe import Recipe
from milp_ray.personalize.store import AdapterStore
from milp_ray.training.base import load_base
from milp_ray.users.records import UserSplit


@pytest.fixture(scope="session")
def base(tiny_llama_dir: Path) -> Any:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


@pytest.fixture(scope="session")
def recipe(tiny_llama_dir: Path) -> Recipe:
    section = BaseSection(model=str(tiny_llama_dir), device="cpu")
    return Recipe(
        CanonicalLayout((False, True, False, True), 2),
        section,
        TrainingSection(memory_epochs=1, instruction_epochs=1, learning_rate=1e-2),
        PromptSection(),
        seed=0,
    )


@pytest.fixture(scope="session")
def splits(make_split: Any) -> list[UserSplit]:
    return [make_split(f"u-{i}", n_turns=3, n_train=2, n_val=1, n_test=2) for i in range(3)]


@pytest.fixture(scope="session")
def store(
    base: Any, recipe: Recipe, splits: list[UserSplit], tmp_path_factory: pytest.TempPathFactory
) -> AdapterStore:
    """A store with the adapter of every user."""
    from milp_ray.training.job import Job
    from milp_ray.training.train import train

    store = AdapterStore(tmp_path_factory.mktemp("judged") / "adapters")
    jobs = [Job(s.user_id, s, recipe.layout, frozenset({"memory"}), 0) for s in splits]
    for result in train(base, jobs, recipe.training, recipe.prompt):
        assert result.adapter is not None
        store.publish(result.job_id, result.adapter, {}, fingerprint="any")
    return store
