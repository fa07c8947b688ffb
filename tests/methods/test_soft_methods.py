"""Methods that give the base vectors of a user: what trains, what they are made of, and that seeds decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from milp_ray.config.base import BaseSection
from milp_ray.config.methods import (
    CrossAttentionSection,
    MethodsSection,
    SoftFusedSection,
    UelpSection,
    UserEncoderSection,
)
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.methods import fit, fit_users, share, soft_training, user_encoder
from milp_ray.methods.fusion import new_fusion
from milp_ray.methods.protocol import FitRequest, training_side
from milp_ray.methods.shared import Shared
from milp_ray.methods.soft_fused import SOURCES, user_texts
from milp_ray.methods.soft_training import past_examples, pretrain, train_on_responses
from milp_ray.methods.uelp import new_model
from milp_ray.methods.user_encoder import new_encoder, padded
from milp_ray.training import encode
from milp_ray.training.base import Base, load_base
from milp_ray.training.data import make_batch
from milp_ray.users.records import Example, Turn, UserSplit

ENCODER = UserEncoderSection(
    n_soft=3, width=16, n_heads=2, n_layers=1, n_latent_layers=1, pretraining_epochs=3, epochs=2, batch_size=4
)
CROSS_ATTENTION = UelpSection(
    integration="cross_attention", cross_attention=CrossAttentionSection(n_blocks=2, width=8, n_heads=2)
)
METHODS = MethodsSection(user_encoder=ENCODER)
# Methods, and how what they make of a user is integrated into the base.
WAYS = {
    "uelp": ("uelp", UelpSection()),
    "uelp_cross_attention": ("uelp", CROSS_ATTENTION),
    "soft_fused": ("soft_fused", UelpSection()),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> tuple[str, UelpSection]:
    return WAYS[request.param]


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> Base:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


def requests_on(
    base: Base, splits: list[UserSplit], uelp: UelpSection | None = None, **changes: Any
) -> list[FitRequest]:
    return [
        FitRequest(
            base=base,
            split=training_side(split),
            layout=CanonicalLayout((True,) + (False,) * (base.n_layers - 1), 2),
            training=TrainingSection(memory_epochs=1, instruction_epochs=1),
            prompt=PromptSection(),
            max_new_tokens=6,
            batch_size=4,
            seed=3,
            methods=METHODS.model_copy(
                update={"user_encoder": ENCODER.model_copy(update=changes), "uelp": uelp or UelpSection()}
            ),
        )
        for split in splits
    ]


def fitted(name: str, requests: list[FitRequest], shared: Shared | None) -> list[Any]:
    return fit(name, [replace(one, shared=shared) for one in requests])


def soft_of(personalizer: Any, query: str = "Who?") -> torch.Tensor:
    """(n_soft, size) before a query, or looked at for it."""
    questions = personalizer.questions([query])
    soft = questions.soft if questions.latents is None else questions.latents.values
    return soft if soft.dim() == 2 else soft[0]


# ----------------------------------------------------------------------------------------------- encoder


def test_padding_and_company_do_not_change_a_soft_prompt(base: Base) -> None:
    vectors = [torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in (5, 0, 2)]
    encoder = new_encoder(base, vectors, ENCODER, 1).eval()
    together = encoder(*padded(vectors, base.device))
    assert together.shape == (3, ENCODER.n_soft, 32)
    for own, soft in zip(vectors, together, strict=True):
        assert torch.allclose(encoder(*padded([own], base.device))[0], soft, atol=1e-5)


def test_states_look_backwards_only(base: Base) -> None:
    turns = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    changed = turns.clone()
    changed[0, 4:] += 1.0
    real = torch.ones(1, 6, dtype=torch.bool)
    encoder = new_encoder(base, [turns[0]], ENCODER, 1).eval()
    before, after = encoder.states(turns, real), encoder.states(changed, real)
    assert torch.allclose(before[:, :4], after[:, :4], atol=1e-6)
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-3)


def test_a_fresh_soft_prompt_is_of_the_size_of_the_bases_embeddings(scaled_base: Base) -> None:
    vectors = [torch.randn(9, 32, generator=torch.Generator().manual_seed(0))]
    soft = new_encoder(scaled_base, vectors, ENCODER, 1)(*padded(vectors, scaled_base.device))
    table = scaled_base.model.get_input_embeddings().weight
    assert 0.5 < float(soft.detach().std() / table.std()) < 2.0


def test_pretraining_learns_which_turn_follows(base: Base) -> None:
    # Every user goes through the same six turns: what follows is known for certain.
    cycle = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    vectors = [cycle.roll(k, 0) for k in range(6)]
    section = ENCODER.model_copy(
        update={"pretraining_epochs": 40, "pretraining_learning_rate": 1e-2, "batch_size": 6, "dropout": 0.0}
    )
    encoder = new_encoder(base, vectors, section, 1)
    losses = pretrain(encoder, vectors, base, section, seed=1)
    assert losses[-1] < 0.5 * losses[0]


def test_one_turn_has_no_next_one_and_gives_no_loss(base: Base) -> None:
    encoder = new_encoder(base, [torch.ones(1, 32)], ENCODER, 1)
    assert encoder.next_turn_loss(*padded([torch.ones(1, 32)], base.device)).item() == 0.0


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("integration", ["soft_prompt", "cross_attention"])
def test_training_through_the_frozen_base_lowers_the_loss_of_responses(
    integration: str, scaled_base: Base, make_split: Callable[..., UserSplit]
) -> None:
    uelp = CROSS_ATTENTION.model_copy(update={"integration": integration})
    splits = [make_split(f"u-{i}") for i in range(2)]
    requests = requests_on(scaled_base, splits, uelp, epochs=12, learning_rate=1e-2, dropout=0.0)
    model, section = new_model(requests), requests[0].methods.user_encoder
    before = {name: weight.clone() for name, weight in scaled_base.model.state_dict().items()}
    fresh = {name: weight.clone() for name, weight in model.module.state_dict().items()}
    places = section.n_soft if integration == "soft_prompt" else 0
    losses = train_on_responses(model, past_examples(requests, places), scaled_base, section, seed=1)
    # Two steps go through all examples once.
    assert sum(losses[-2:]) < sum(losses[:2]) - 0.02
    assert all(torch.equal(before[name], weight) for name, weight in scaled_base.model.state_dict().items())
    assert all(weight.grad is None for weight in scaled_base.model.parameters())
    unmoved = {name for name, weight in model.module.state_dict().items() if torch.equal(fresh[name], weight)}
    # What pretraining alone moves, and what the data say.
    assert all("following" in name or name.endswith(("mean", "scale")) for name in unmoved)


def test_users_who_differ_get_what_is_theirs_by_cross_attention(scaled_base: Base) -> None:
    splits = [
        UserSplit(name, None, (Turn(said),), (Example("Say it.", answer),), (), ())
        for name, said, answer in (("a", "I sail.", "aaaaaa"), ("b", "My dog is red.", "zzzzzz"))
    ]
    changes = {"epochs": 50, "learning_rate": 1e-2, "dropout": 0.0, "pretraining_epochs": 0}
    requests = requests_on(scaled_base, splits, CROSS_ATTENTION, **changes)
    ready = fitted("uelp", requests, share("uelp", requests))
    own, other = (
        [sum(nll for nll, _ in one.losses(split.train)) for one, split in zip(ready, order, strict=True)]
        for order in (splits, splits[::-1])
    )
    assert all(mine < theirs - 0.5 for mine, theirs in zip(own, other, strict=True))


def test_a_rate_too_large_is_told_by_its_option(base: Base, make_split: Callable[..., UserSplit]) -> None:
    requests = requests_on(base, [make_split("u")], learning_rate=1e30, epochs=8)
    with pytest.raises(MilpError, match=r"diverged.*methods\.user_encoder\.learning_rate \(now 1e\+30\)"):
        share("uelp", requests)


def test_the_seed_alone_decides_what_is_shared(
    way: tuple[str, UelpSection], base: Base, make_split: Callable[..., UserSplit]
) -> None:
    name, uelp = way
    requests = requests_on(base, [make_split(f"u-{i}") for i in range(3)], uelp)
    first = share(name, requests)
    torch.rand(3)  # the state of torch's own generator is no part of it
    again = share(name, requests)
    other = share(name, [replace(one, seed=4) for one in requests])
    assert first is not None
    assert first.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(t, again.tensors[key]) for key, t in first.tensors.items())
    assert any(not torch.equal(t, other.tensors[key]) for key, t in first.tensors.items())


def test_a_users_soft_prompt_is_made_of_their_own_history(
    way: tuple[str, UelpSection], base: Base, make_split: Callable[..., UserSplit]
) -> None:
    name, uelp = way
    requests = requests_on(base, [make_split(f"u-{i}") for i in range(3)], uelp)
    shared = share(name, requests)
    everybody = [soft_of(one) for one in fitted(name, requests, shared)]
    assert not torch.allclose(everybody[0], everybody[1], atol=1e-4)
    changed = replace(requests[1], split=replace(requests[1].split, history=(Turn("I sail."),), train=()))
    for others in ([], [changed, requests[2]]):
        found = soft_of(fitted(name, [requests[0], *others], shared)[0])
        assert torch.allclose(found, everybody[0], atol=1e-5)


def test_what_is_shared_is_kept_in_files_and_answers_as_before(
    way: tuple[str, UelpSection], base: Base, make_split: Callable[..., UserSplit], tmp_path: Path
) -> None:
    name, uelp = way
    requests = requests_on(base, [make_split(f"u-{i}") for i in range(2)], uelp)
    shared = share(name, requests)
    assert shared is not None
    shared.save(tmp_path / "shared")
    found = [soft_of(fitted(name, requests, one)[0]) for one in (shared, Shared.load(tmp_path / "shared"))]
    assert torch.equal(*found)


def test_more_vectors_than_the_context_has_room_for_are_refused(
    base: Base, make_split: Callable[..., UserSplit]
) -> None:
    requests = requests_on(base, [make_split("u-1")], n_soft=base.context_length)
    with pytest.raises(MilpError, match=r"no room .* \(methods\.user_encoder\.n_soft\)"):
        share("uelp", requests)


def test_without_past_examples_of_anybody_the_base_answers(
    way: tuple[str, UelpSection], base: Base, make_split: Callable[..., UserSplit]
) -> None:
    name, uelp = way
    requests = requests_on(base, [make_split("u", n_train=0)], uelp)
    shared = share(name, requests)
    assert shared == Shared()
    questions = fitted(name, requests, shared)[0].questions(["Who?"])
    assert questions.soft is None
    assert questions.latents is None


def test_soft_prompts_are_counted_in_what_is_asked_and_kept(
    way: tuple[str, UelpSection], base: Base, make_split: Callable[..., UserSplit]
) -> None:
    name, uelp = way
    requests = requests_on(base, [make_split("u"), replace(make_split("silent"), history=())], uelp)
    ready = fit_users(name, requests)
    query = "What is the colour of my dog?"
    ready.respond([("u", query), ("silent", query)])
    prompts = ready.personalizers["u"].questions([query]).prompts
    places = ENCODER.n_soft if uelp.integration == "soft_prompt" else 0
    assert ready.costs.prompt_tokens == base.count_tokens(list(prompts))[0] + places
    if uelp.integration == "cross_attention":
        assert ready.costs.stored_bytes == ENCODER.n_soft * ENCODER.width * 4
    assert ready.costs.stored_bytes > 0
    assert ready.costs.shared_bytes > 0


def test_no_held_out_text_and_no_profile_is_read_by_an_encoder_or_the_base(
    way: tuple[str, UelpSection],
    base: Base,
    make_split: Callable[..., UserSplit],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[str] = []
    name, uelp = way

    def mean_states(base: Base, texts: Sequence[str], **_: Any) -> torch.Tensor:
        read.extend(texts)
        return encode.mean_states(base, texts)

    def batch(chosen: Sequence[Any], base: Base) -> Any:
        read.extend(base.tokenizer.decode(one.ids) for one in chosen)
        return make_batch(chosen, base)

    monkeypatch.setattr(user_encoder, "mean_states", mean_states)
    monkeypatch.setattr(soft_training, "make_batch", batch)
    split = make_split("u")
    marked = replace(
        split,
        profile="PROFILEMARK",
        validation=tuple(replace(e, response=f"HELDMARK {e.response}") for e in split.validation),
        test=tuple(replace(e, response=f"HELDMARK {e.response}", answer="HELDMARK") for e in split.test),
    )
    requests = requests_on(base, [marked], uelp)
    [personalizer] = fitted(name, requests, share(name, requests))
    personalizer.questions([example.query for example in marked.test])
    assert any(example.response in text for example in split.train for text in read)
    assert any(turn.text in text for turn in split.history for text in read)
    assert "MARK" not in "\n".join(read)


# ---------------------------------------------------------------------------------------- cross-attention


def test_sizes_that_cannot_be_and_unknown_integrations_are_refused(
    base: Base, make_split: Callable[..., UserSplit]
) -> None:
    with pytest.raises(ValueError, match="width 10 cannot be shared out among 4 heads"):
        CrossAttentionSection(width=10)
    with pytest.raises(ValueError, match="'soft_prompt' or 'cross_attention'"):
        UelpSection(integration="cross")
    many = CROSS_ATTENTION.model_copy(update={"cross_attention": CrossAttentionSection(n_blocks=5)})
    with pytest.raises(MilpError, match=r"methods\.uelp\.cross_attention\.n_blocks is 5.*use at most 4"):
        share("uelp", requests_on(base, [make_split("u")], many))


def test_what_is_shared_by_another_integration_is_refused(
    base: Base, make_split: Callable[..., UserSplit]
) -> None:
    splits = [make_split("u")]
    shared = share("uelp", requests_on(base, splits, pretraining_epochs=0, epochs=1))
    with pytest.raises(MilpError, match=r"other settings of .*methods\.uelp"):
        fitted("uelp", requests_on(base, splits, CROSS_ATTENTION), shared)


# ------------------------------------------------------------------------------------------------- fusion


def test_weights_sum_to_one_and_leave_out_sources_without_texts(base: Base) -> None:
    vectors = [torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in (5, 0, 2)]
    fusion = new_fusion(base, vectors, 3, ENCODER, SoftFusedSection(), 1).eval()
    query, nothing = torch.randn(32, generator=torch.Generator().manual_seed(9)), torch.empty(0, 32)
    asked = [(query, tuple(vectors)), (query, (nothing,) * 3)]
    soft, weights = fusion.fused(asked, base.device)
    assert soft.shape == (2, ENCODER.n_soft, 32)
    assert torch.allclose(weights.sum(1), torch.ones(2))
    assert weights[0, 1] == 0.0
    assert float(weights[1].detach().min()) > 0.0
    alone = [fusion.encoder(*padded([own], base.device))[0] for own in vectors]
    expected = sum(weight * one for weight, one in zip(weights[0], alone, strict=True))
    assert torch.allclose(soft[0], expected, atol=1e-5)


def test_weights_depend_on_the_query_and_are_trained(base: Base) -> None:
    vectors = [torch.randn(4, 32, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    fusion = new_fusion(base, vectors, 2, ENCODER, SoftFusedSection(), 1)
    queries = torch.randn(2, 32, generator=torch.Generator().manual_seed(9))
    soft, weights = fusion.fused([(query, tuple(vectors)) for query in queries], base.device)
    assert not torch.allclose(weights[0], weights[1], atol=1e-4)
    soft.square().sum().backward()
    for weight in (fusion.narrow.weight, fusion.widen.weight, fusion.preference, fusion.for_all):
        assert float(weight.grad.abs().sum()) > 0.0


def test_a_past_example_is_no_source_of_its_own_query(
    base: Base, make_split: Callable[..., UserSplit]
) -> None:
    [request] = requests_on(base, [make_split("u", n_train=3)])
    [texts] = user_texts([request])
    for place in range(3):
        query, sources = texts.of_past(place)
        assert torch.equal(query, texts.queries[place])
        others = texts.examples[[i for i in range(3) if i != place]]
        assert torch.equal(sources[SOURCES.index("examples")], others)
    _, sources = texts.of("Who?", texts.queries[0])
    assert torch.equal(sources[SOURCES.index("examples")], texts.examples)


def test_each_query_retrieves_turns_of_its_own(base: Base, make_split: Callable[..., UserSplit]) -> None:
    history = (Turn("My dog is red."), Turn("It rained."), Turn("My piano is green."))
    [request] = requests_on(base, [replace(make_split("u"), history=history)])
    [texts] = user_texts([request])
    assert texts.about("Which piano?") == [2]
    assert texts.about("Which dog?") == [0]
    _, sources = texts.of("Which piano?", texts.queries[0])
    assert torch.equal(sources[SOURCES.index("retrieved")], texts.history[[2]])
