"""What tells one recipe, base and user from another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from milp_ray.config.base import BaseSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.recipe import Recipe, base_identity, fingerprint
from milp_ray.personalize.store import hash_id
from milp_ray.users.records import Example, Turn, UserSplit

LAYOUT = CanonicalLayout((False, True, False, True), rank=4)

Make = Callable[..., UserSplit]


@pytest.fixture
def recipe(tiny_llama_dir: Path) -> Recipe:
    base = BaseSection(model=str(tiny_llama_dir), device="cpu")
    return Recipe(
        LAYOUT, base, TrainingSection(memory_epochs=1, instruction_epochs=1), PromptSection(), seed=5
    )


def test_a_fingerprint_changes_with_all_that_training_sees(recipe: Recipe, make_split: Make) -> None:
    split = make_split("u-1")
    turn, pair = Turn("My dog is green."), Example("What?", "That.")
    recipes = [
        recipe,
        replace(recipe, layout=CanonicalLayout(LAYOUT.mask, 8)),
        replace(recipe, seed=6),
        replace(recipe, training=TrainingSection(memory_epochs=2, instruction_epochs=1)),
        replace(recipe, prompt=PromptSection(history="History: ")),
        replace(recipe, base=BaseSection(model="someone/some-model")),
        replace(recipe, base=BaseSection(model="someone/some-model", revision="abc")),
        replace(recipe, base=BaseSection(model=recipe.base.model, context_length=64)),
    ]
    splits = [
        split,
        replace(split, history=(*split.history, turn)),
        replace(split, history=split.history[::-1]),
        replace(split, train=(*split.train, pair)),
        replace(split, validation=(*split.validation, pair)),
        replace(split, train=split.train[:-1], validation=(split.train[-1], *split.validation)),
    ]
    prints = [fingerprint(r.digest(), split) for r in recipes] + [
        fingerprint(recipe.digest(), s) for s in splits[1:]
    ]
    assert len(set(prints)) == len(prints)


def test_a_fingerprint_is_blind_to_what_training_does_not_see(recipe: Recipe, make_split: Make) -> None:
    split = make_split("u-1")
    unseen = replace(split, test=(), profile="someone else")
    assert fingerprint(recipe.digest(), unseen) == fingerprint(recipe.digest(), split)
    elsewhere = replace(recipe, base=recipe.base.model_copy(update={"device": "auto"}))
    assert elsewhere.digest() == recipe.digest()


def test_a_base_is_known_by_its_files_wherever_they_lie(tmp_path: Path, tiny_llama_dir: Path) -> None:
    import shutil

    def identity(folder: Path) -> dict[str, Any]:
        return base_identity(BaseSection(model=str(folder)))

    copied = tmp_path / "copied"
    shutil.copytree(tiny_llama_dir, copied)
    assert identity(copied) == identity(tiny_llama_dir)
    path = copied / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert identity(copied) != identity(tiny_llama_dir)


def test_large_weight_files_are_told_apart_by_samples(tmp_path: Path) -> None:
    for name, fill in (("a", b"\0"), ("b", b"\0"), ("c", b"\1")):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "model.safetensors").open("wb") as file:
            file.write(b"\0" * (9 << 20) + fill * (9 << 20))
    a, b, c = (base_identity(BaseSection(model=str(tmp_path / name))) for name in "abc")
    assert a == b
    assert a != c


def test_users_have_seeds_of_their_own(recipe: Recipe) -> None:
    seeds = {recipe.seed_of(f"u-{i}") for i in range(1000)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert recipe.seed_of("u-1") != replace(recipe, seed=6).seed_of("u-1")
    assert len(hash_id("u-1")) == 64
