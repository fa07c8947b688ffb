"""Nothing of one user reaches the prompt, memory or adapter of another, but through declared parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import ONE_EPOCH

from milp_ray.config.base import BaseSection
from milp_ray.config.methods import ALL_METHODS, SHARED_METHODS, MethodsSection, UelpSection
from milp_ray.config.prompt import PromptSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.methods import fit_users, share
from milp_ray.methods.protocol import FitRequest, training_side
from milp_ray.training.base import load_base
from milp_ray.users.records import UserSplit

LAYOUT = CanonicalLayout((False, True, False, True), 2)
OWN = sorted(set(ALL_METHODS) - SHARED_METHODS)
METHODS = MethodsSection()
INTEGRATIONS = {
    way: METHODS.model_copy(update={"uelp": UelpSection(integration=way)})
    for way in ("soft_prompt", "cross_attention")
}


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> Any:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


def marked(split: UserSplit, mark: str) -> UserSplit:
    """A user all of whose texts hold a word of their own."""
    return replace(
        split,
        profile=f"{mark} has a profile.",
        history=tuple(replace(turn, text=f"{mark} {turn.text}") for turn in split.history),
        train=tuple(
            replace(e, query=f"{mark} {e.query}", response=f"{mark} {e.response}") for e in split.train
        ),
    )


@pytest.fixture
def users(make_split: Any) -> list[UserSplit]:
    return [marked(make_split(name, seed=i), f"MARK{name}") for i, name in enumerate("AB")]


def requests(base: Any, splits: Sequence[UserSplit], methods: MethodsSection = METHODS) -> list[FitRequest]:
    return [
        FitRequest(
            base=base,
            split=training_side(split),
            layout=LAYOUT,
            training=ONE_EPOCH,
            prompt=PromptSection(),
            max_new_tokens=4,
            batch_size=4,
            seed=3,
            methods=methods,
        )
        for split in splits
    ]


@pytest.mark.parametrize(
    ("name", "methods"),
    [*((name, METHODS) for name in ALL_METHODS), ("uelp", INTEGRATIONS["cross_attention"])],
)
def test_no_text_of_another_user_stands_in_a_prompt(
    name: str, methods: MethodsSection, base: Any, users: list[UserSplit]
) -> None:
    fitted = fit_users(name, requests(base, users, methods))
    assert len(fitted.personalizers) == 2
    for user, other in (users, reversed(users)):
        one = fitted.personalizers[user.user_id]
        wanted = one.wanted(user.test)
        texts = [*one.questions([e.query for e in user.test]).prompts, *(wanted.contexts or ())]
        assert not [text for text in texts if f"MARK{other.user_id}" in text]


@pytest.mark.parametrize("name", OWN)
def test_a_users_own_adapter_does_not_depend_on_who_else_is_there(
    name: str, base: Any, users: list[UserSplit]
) -> None:
    assert share(name, requests(base, users)) is None
    together = fit_users(name, requests(base, users)).personalizers["A"]
    alone = fit_users(name, requests(base, users[:1])).personalizers["A"]
    for ours, theirs in _weights(together, alone):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_of_oppu_only_the_declared_part_knows_of_others(base: Any, users: list[UserSplit]) -> None:
    shared = share("oppu", requests(base, users))
    together = fit_users("oppu", requests(base, users), shared).personalizers["A"]
    alone = fit_users("oppu", requests(base, users[:1]), shared).personalizers["A"]
    assert shared is not None
    for ours, theirs in _weights(together, alone):
        assert torch.allclose(ours, theirs, atol=1e-6)
    changed = [users[0], marked(users[1], "OTHER")]
    other = share("oppu", requests(base, changed))
    assert other is not None
    assert any(not torch.equal(a, b) for a, b in _weights(shared, other)), "the shared part saw everybody"


@pytest.mark.parametrize("methods", INTEGRATIONS.values(), ids=INTEGRATIONS)
def test_of_uelp_only_the_declared_part_knows_of_others(
    methods: MethodsSection, base: Any, users: list[UserSplit]
) -> None:
    shared = share("uelp", requests(base, users, methods))
    assert shared is not None
    vectors = []
    for others in (users[1:], [marked(users[1], "OTHER")], []):
        fitted = fit_users("uelp", requests(base, [users[0], *others], methods), shared)
        asked = fitted.personalizers["A"].questions(["Who?"])
        vectors.append(asked.soft if asked.latents is None else asked.latents.values)
    for own in vectors[1:]:
        assert torch.allclose(own, vectors[0], atol=1e-6)
    other = share("uelp", requests(base, [users[0], marked(users[1], "OTHER")], methods))
    assert other is not None
    assert any(not torch.equal(t, other.tensors[name]) for name, t in shared.tensors.items())


def _weights(first: Any, second: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ours = first.adapter.tensors if first.adapter is not None else {}
    theirs = second.adapter.tensors if second.adapter is not None else {}
    assert ours.keys() == theirs.keys()
    return [(ours[name], theirs[name]) for name in ours]
