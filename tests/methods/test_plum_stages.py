"""What a conversation of PLUM is trained on with: pairs of earlier ones, and texts of the base's own."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import GenerationConfig

from milp_ray.config.base import BaseSection
from milp_ray.config.methods import MethodsSection, PlumSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import LoraAlphaSection, TrainingSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.methods.plum import own_texts, stages_of, train_adapters
from milp_ray.methods.plum.lessons import lessons_of
from milp_ray.methods.plum.own_texts import written_by_itself
from milp_ray.methods.plum.rule import RuleTeacher
from milp_ray.methods.protocol import FitRequest
from milp_ray.training.base import Base, load_base
from milp_ray.training.data import Sequence
from milp_ray.training.job import Stage
from milp_ray.training.response_loss import losses_under
from milp_ray.users.records import Turn, UserSplit

SAID = ("I keep a dog at home.", "I live in Oslo.", "I take lithium every day.")


@pytest.fixture(scope="module")
def tiny(tiny_llama_dir: Path) -> Base:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


@pytest.fixture(scope="module")
def embedded() -> Base:
    return load_base(BaseSection(device="cpu"))


def request_of(base: Base, **plum: Any) -> FitRequest:
    section = PlumSection(**{"conversation": {"turns": 1}, "questions_per_statement": 2, "epochs": 4, **plum})
    layout = CanonicalLayout((False,) * (base.n_layers - 1) + (True,), 8)
    training = TrainingSection(
        learning_rate=1e-2, batch_size=4, lora_alpha=LoraAlphaSection(rule="constant", value=8)
    )
    split = UserSplit("alpha", None, tuple(map(Turn, SAID)), (), (), ())
    methods = MethodsSection(plum=section)
    return FitRequest(base, split, layout, training, PromptSection(), 8, 4, 3, methods=methods)


def stages(request: FitRequest, texts: SequenceOf[Sequence] = ()) -> tuple[Stage, ...]:
    return stages_of(request, lessons_of(request, RuleTeacher(2)), texts)


def sequences(base: Base, texts: tuple[Sequence, ...] = (), **plum: Any) -> list[tuple[Sequence, ...]]:
    return [stage.sequences for stage in stages(request_of(base, **plum), texts)]


def test_earlier_data_is_discarded_unless_asked_for(tiny: Base) -> None:
    alone = sequences(tiny)
    assert len(alone) == len(SAID)
    for number, own in enumerate(alone):
        others = {one.ids for other in alone[:number] for one in other}
        assert not others & {one.ids for one in own}, "this test's conversations have no pair in common"


def test_pairs_of_earlier_conversations_come_with_each(tiny: Base) -> None:
    alone, beside = sequences(tiny), sequences(tiny, earlier_pairs=5)
    assert beside[0] == alone[0]
    for number in (1, 2):
        own, more = beside[number][: len(alone[number])], beside[number][len(alone[number]) :]
        assert own == alone[number]
        assert len(more) == min(5, sum(map(len, alone[:number]))) == len(set(more))
        assert set(more) <= {one for other in alone[:number] for one in other}
    assert sequences(tiny, earlier_pairs=5) == beside
    everything = sequences(tiny, earlier_pairs=10_000)
    assert set(everything[2]) == {one for own in alone for one in own}


def test_texts_of_the_bases_own_come_with_each(tiny: Base) -> None:
    alone, texts = sequences(tiny), tuple(written_by_itself(tiny, seed=1, n_texts=6))
    beside = sequences(tiny, texts, own_texts=2)
    for own, both in zip(alone, beside, strict=True):
        assert both[: len(own)] == own
        assert len(set(both[len(own) :]) & set(texts)) == 2
    assert len({both[-2:] for both in beside}) > 1, "each conversation draws its own"


def test_the_bases_own_texts_are_a_function_of_the_seed_alone(tiny: Base) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = written_by_itself(tiny, seed=1, n_texts=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert written_by_itself(tiny, seed=1, n_texts=3) == first
    assert written_by_itself(tiny, seed=2, n_texts=3) != first
    for text in first:
        assert text.ids[: len(tiny.start_ids)] == tiny.start_ids
        assert len(text.ids) == min(own_texts.LENGTH, tiny.context_length)
        assert text.target_from == 1


def test_a_bases_own_generation_configuration_is_not_asked(
    tiny: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = written_by_itself(tiny, seed=1, n_texts=3)
    sharpened = GenerationConfig(
        temperature=0.1, top_p=0.5, repetition_penalty=2.0, eos_token_id=before[0].ids[-2]
    )
    monkeypatch.setattr(tiny.model, "generation_config", sharpened)
    assert written_by_itself(tiny, seed=1, n_texts=3) == before
    assert tiny.model.generation_config is sharpened


def test_the_first_texts_do_not_depend_on_how_many_are_asked_for(
    tiny: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_texts, "_AT_ONCE", 4)
    ten = written_by_itself(tiny, seed=1, n_texts=10)
    assert [written_by_itself(tiny, seed=1, n_texts=n) for n in (0, 3, 4, 7)] == [
        ten[:n] for n in (0, 3, 4, 7)
    ]
    assert len(set(ten)) == 10


def test_a_users_stages_do_not_depend_on_a_longer_history_beside(tiny: Base) -> None:
    asked = request_of(tiny, own_texts=2)
    texts = written_by_itself(tiny, seed=1, n_texts=20)
    alone = stages(asked, texts[: 2 * len(SAID)])
    assert stages(asked, texts) == alone


def test_no_more_texts_are_written_than_a_user_draws(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def written(base: Base, seed: int, n_texts: int) -> list[Sequence]:
        asked.append(n_texts)
        return written_by_itself(base, seed, n_texts)

    monkeypatch.setattr(own_texts, "written_by_itself", written)
    request = request_of(tiny, own_texts=2)
    other = replace(request, split=replace(request.split, history=request.split.history[:1]))
    train_adapters([other, request])
    monkeypatch.setattr(own_texts, "MOST_TEXTS", 4)
    train_adapters([other, request])
    train_adapters([request_of(tiny)])
    assert asked == [2 * len(SAID), 4]


def test_what_the_base_writes_by_itself_is_likely_to_it(
    embedded: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_texts, "_AT_ONCE", 4)
    texts = written_by_itself(embedded, seed=1, n_texts=4)
    shuffled = [Sequence((text.ids[0], *reversed(text.ids[1:])), 1, "memory") for text in texts]
    [own, other] = losses_under(embedded, [None, None], [texts, shuffled])
    assert sum(nll for nll, _ in own) < 0.3 * sum(nll for nll, _ in other)


def test_with_texts_of_its_own_the_base_unlearns_less(
    embedded: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_texts, "_AT_ONCE", 36)
    held = written_by_itself(embedded, seed=9, n_texts=6)
    adapters = [
        adapter for n in (0, 12) for adapter in train_adapters([request_of(embedded, own_texts=n, epochs=10)])
    ]
    losses = losses_under(embedded, [None, *adapters], [held] * 3)
    base, without, beside = (sum(nll for nll, _ in own) for own in losses)
    assert base < beside < without
    assert beside - base < 0.5 * (without - base)


def test_held_to_its_distributions_it_unlearns_least(embedded: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_texts, "_AT_ONCE", 12)
    held = written_by_itself(embedded, seed=9, n_texts=12)
    settings: list[dict[str, Any]] = [
        {},
        {"own_texts_target": "distribution"},
        {"own_texts_target": "distribution", "own_texts_weight": 4.0},
    ]
    adapters = [
        adapter
        for setting in settings
        for adapter in train_adapters([request_of(embedded, own_texts=4, epochs=10, **setting)])
    ]
    losses = losses_under(embedded, [None, *adapters], [held] * 4)
    base, token, distribution, heavier = (sum(nll for nll, _ in own) for own in losses)
    assert base < heavier < distribution < token


@pytest.mark.parametrize("other", [{"own_texts_target": "distribution"}, {"own_texts_weight": 2.0}])
def test_what_is_set_of_texts_that_are_not_there_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="own_texts is 0, so that own_texts_target"):
        PlumSection(**other)
    PlumSection(own_texts=1, **other)
