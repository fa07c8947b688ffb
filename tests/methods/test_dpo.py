"""Preference alignment: the loss, what is preferred to what, and whose texts go where."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from milp_ray.config.base import BaseSection
from milp_ray.config.methods import DpoSection, MethodsSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.methods import fit, milp, share
from milp_ray.methods.dpo import Others, preference_pairs
from milp_ray.methods.protocol import FitRequest, training_side
from milp_ray.methods.shared import Shared
from milp_ray.training import preference
from milp_ray.training.adapters import Adapter, attached, load_adapter, save_adapter
from milp_ray.training.base import Base, load_base
from milp_ray.training.data import make_batch
from milp_ray.training.preference import (
    Pair,
    PreferenceJob,
    PreferenceLoss,
    PreferenceRecipe,
    train_preferences,
)
from milp_ray.training.response_loss import losses_under
from milp_ray.training.small_module import Schedule
from milp_ray.users.records import Example, UserSplit

SECTION = DpoSection(epochs=4, batch_size=2, learning_rate=1e-2)
RECIPE = PreferenceRecipe(0.1, 6, 2, Schedule(1e-2), "methods.dpo.learning_rate")


@pytest.fixture(scope="module", params=["tiny_llama_dir", "tiny_gpt2_dir", "tiny_roberta_dir"])
def any_base(request: pytest.FixtureRequest) -> Base:
    return load_base(BaseSection(model=str(request.getfixturevalue(request.param)), device="cpu"))


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> Base:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


def preference_margins(base: Base, adapter: Adapter, pairs: Sequence[Pair]) -> Tensor:
    """Δ(chosen) − Δ(rejected) of each pair in nats, (n_pairs,): 0 where the adapter changes nothing."""
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    under, without = losses_under(base, [adapter, None], [sequences, sequences])
    change = torch.tensor([was - now for (now, _), (was, _) in zip(under, without, strict=True)])
    return change[: len(pairs)] - change[len(pairs) :]


def requests_on(base: Base, splits: Sequence[UserSplit]) -> list[FitRequest]:
    return [
        FitRequest(
            base=base,
            split=training_side(split),
            layout=CanonicalLayout((False, True) + (False,) * (base.n_layers - 2), 2),
            training=TrainingSection(memory_epochs=1, instruction_epochs=1, learning_rate=1e-2),
            prompt=PromptSection(),
            max_new_tokens=6,
            batch_size=4,
            seed=3,
            methods=MethodsSection(dpo=SECTION),
        )
        for split in splits
    ]


def users(make_split: Callable[..., UserSplit], n: int = 2) -> list[UserSplit]:
    return [make_split(f"u-{i}", n_train=3, seed=i) for i in range(n)]


def pairs_of(requests: Sequence[FitRequest]) -> tuple[Pair, ...]:
    shared = share("dpo", requests)
    assert shared is not None
    return preference_pairs(requests[0], Others.of(shared.facts["pool"]))


def fresh_adapter(request: FitRequest) -> Adapter:
    """As if nothing had been trained: B is 0 and the adapter changes nothing."""
    [adapter] = milp.train_adapters([request], milp.BOTH)
    assert adapter is not None
    tensors = {k: t.zero_() if ".lora_B." in k else t for k, t in adapter.tensors.items()}
    return Adapter(adapter.config, tensors, adapter.layout)


def larger(adapter: Adapter) -> Adapter:
    """One that changes much."""
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(t.shape, generator=draw) for name, t in adapter.tensors.items()}
    return Adapter(adapter.config, tensors, adapter.layout)


def test_the_loss_is_that_of_the_paper(any_base: Base, make_split: Callable[..., UserSplit]) -> None:
    requests = requests_on(any_base, users(make_split))
    pairs = pairs_of(requests)
    adapter = larger(fresh_adapter(requests[0]))

    def log_probability(model: Any, text: Any) -> float:
        """The definition: the log-probability of each answer token, one after the other."""
        ids = torch.tensor([text.ids])
        positions = torch.arange(ids.shape[1])[None] + any_base.first_position
        with torch.no_grad():
            scores = model(input_ids=ids, position_ids=positions).logits[0].log_softmax(-1)
        return sum(float(scores[i - 1, text.ids[i]]) for i in range(text.target_from, len(text.ids)))

    def both(model: Any) -> list[tuple[float, float]]:
        return [(log_probability(model, p.chosen), log_probability(model, p.rejected)) for p in pairs]

    without = both(any_base.model)
    with attached(any_base, adapter) as model:
        policy = both(model)
        reference = torch.tensor(without).T
        found = PreferenceLoss(model, any_base, pairs, reference, beta=0.3)(range(len(pairs)))
    margins = [(c - rc) - (r - rr) for (c, r), (rc, rr) in zip(policy, without, strict=True)]
    expected = sum(math.log1p(math.exp(-0.3 * margin)) for margin in margins) / len(pairs)
    assert found.item() == pytest.approx(expected, abs=1e-3)
    assert preference_margins(any_base, adapter, pairs).tolist() == pytest.approx(margins, abs=1e-2)
    assert max(abs(margin) for margin in margins) > 0.1


def test_an_adapter_that_changes_nothing_is_the_reference(
    base: Base, make_split: Callable[..., UserSplit]
) -> None:
    requests = requests_on(base, users(make_split))
    pairs = pairs_of(requests)
    adapter = fresh_adapter(requests[0])
    assert preference_margins(base, adapter, pairs).tolist() == pytest.approx([0.0] * len(pairs), abs=1e-4)
    with attached(base, adapter) as model:
        loss = PreferenceLoss(model, base, pairs, torch.zeros(2, len(pairs)), beta=0.1)
        assert len(list(loss.parameters())) == 6  # A and B of three maps: the base is not trained


def test_training_prefers_the_chosen_answers_and_leaves_the_base_alone(
    any_base: Base, make_split: Callable[..., UserSplit]
) -> None:
    before = {name: weight.clone() for name, weight in any_base.model.state_dict().items()}
    requests = requests_on(any_base, users(make_split))
    pairs, start = pairs_of(requests), fresh_adapter(requests[0])
    job = PreferenceJob(start, pairs, seed=1)
    [trained] = train_preferences(any_base, [job], RECIPE)
    assert float(preference_margins(any_base, trained, pairs).min()) > 0.02
    [again] = train_preferences(any_base, [job], RECIPE)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in trained.tensors.items())
    after = any_base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_jobs_do_not_depend_on_each_other(base: Base, make_split: Callable[..., UserSplit]) -> None:
    requests = requests_on(base, users(make_split, 3))
    pool = share("dpo", requests)
    together: list[Any] = fit("dpo", [replace(one, shared=pool) for one in requests])
    [alone] = fit("dpo", [replace(requests[1], shared=pool)])
    for name, tensor in alone.adapter.tensors.items():
        assert torch.allclose(together[1].adapter.tensors[name], tensor, atol=1e-4)


def test_it_begins_with_the_stored_adapter_and_is_saved_as_peft_does(
    base: Base, make_split: Callable[..., UserSplit], tmp_path: Path
) -> None:
    requests = requests_on(base, users(make_split))
    [stored, _] = milp.train_adapters(requests, milp.BOTH)
    shared = share("dpo", requests)
    [found] = fit("dpo", [replace(requests[0], adapter=stored, shared=shared)])
    assert found.adapter.tensors.keys() == stored.tensors.keys()
    assert any(not torch.equal(t, stored.tensors[name]) for name, t in found.adapter.tensors.items())
    save_adapter(found.adapter, tmp_path / "adapter")
    assert load_adapter(tmp_path / "adapter").tensors.keys() == stored.tensors.keys()
    # Nobody else's answers: nothing to prefer the user's to.
    [kept] = fit("dpo", [replace(requests[0], adapter=stored, shared=share("dpo", requests[:1]))])
    assert kept.adapter is stored


def test_rejected_is_what_another_user_answered_to_the_most_similar_query() -> None:
    others = Others.of(
        [
            ["me", "What is the colour of my dog?", "Brown."],
            ["a", "What is the colour of my dog?", "Red."],
            ["b", "What is the colour of my piano?", "Blue."],
            ["c", "What is the colour of my dog?", " Green. "],
            ["d", "Who plays chess?", "Nobody."],
        ]
    )
    asked = Example("What is the colour of my dog?", "Green.")
    assert others.responses("me", asked, 1) == ["Red."]
    assert others.responses("me", asked, 3) == ["Red.", "Blue."]
    assert others.responses("a", Example("Who plays chess?", "Nobody."), 1) == []


def test_what_the_user_turned_down_goes_before_others_answers(
    base: Base, make_split: Callable[..., UserSplit]
) -> None:
    one, other = users(make_split)
    turned_down = replace(one.train[0], rejected="Never that.")
    requests = requests_on(base, [replace(one, train=(turned_down, *one.train[1:])), other])
    others = Others.of(share("dpo", requests).facts["pool"])
    rejected = [
        base.tokenizer.decode(pair.rejected.ids[pair.rejected.target_from : -1]).strip()
        for pair in preference_pairs(requests[0], others)
    ]
    assert rejected[0] == "Never that."
    assert set(rejected[1:]) <= {example.response for example in other.train}


def test_the_pool_is_a_sample_of_the_size_that_is_set(
    base: Base, make_split: Callable[..., UserSplit]
) -> None:
    small = MethodsSection(dpo=SECTION.model_copy(update={"pool_size": 4}))
    requests = [replace(one, methods=small) for one in requests_on(base, users(make_split, 4))]
    shared = share("dpo", requests)
    assert shared is not None
    assert len(shared.facts["pool"]) == 4
    assert shared == share("dpo", requests)


def test_other_users_texts_are_rejected_answers_only_and_held_out_ones_nothing(
    base: Base, make_split: Callable[..., UserSplit], monkeypatch: pytest.MonkeyPatch
) -> None:
    def marked(split: UserSplit, mark: str) -> UserSplit:
        held = tuple(Example(f"HELD {e.query}", f"HELD {e.response}") for e in split.validation)
        train = tuple(replace(e, response=f"{mark} {e.response}") for e in split.train)
        history = tuple(replace(turn, text=f"{mark} {turn.text}") for turn in split.history)
        return replace(split, train=train, history=history, validation=held, test=held)

    one, other = users(make_split)
    requests = requests_on(base, [marked(one, "MINE"), marked(other, "THEIRS")])
    shared = share("dpo", requests)
    assert shared is not None
    assert "HELD" not in repr(shared.facts)
    read: list[Any] = []

    def batch(chosen: Sequence[Any], base: Base) -> Any:
        read.extend(chosen)
        return make_batch(chosen, base)

    monkeypatch.setattr(preference, "make_batch", batch)
    [found] = fit("dpo", [replace(requests[0], shared=shared)])
    assert not any("THEIRS" in prompt for prompt in found.questions(["Who?"]).prompts)
    assert read
    pairs = preference_pairs(requests[0], Others.of(shared.facts["pool"]))
    rejected = {pair.rejected.ids for pair in pairs}
    for text in read:
        prompt = base.tokenizer.decode(text.ids[: text.target_from])
        answer = base.tokenizer.decode(text.ids[text.target_from :])
        assert "MINE" not in prompt
        assert "THEIRS" not in prompt
        assert "HELD" not in prompt + answer
        assert ("THEIRS" in answer) == (text.ids in rejected)
        assert ("MINE" in answer) == (text.ids not in rejected)


def test_without_users_nothing_is_shared() -> None:
    assert share("dpo", []) == Shared()
    assert fit("dpo", []) == []
