"""Losses equal those of transformers on whole sequences, for every architecture and with layers replayed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from milp_ray.config.base import BaseSection
from milp_ray.config.prompt import PromptSection
from milp_ray.training.base import Base, load_base
from milp_ray.training.data import Sequence, make_batch
from milp_ray.training.frozen import frozen_prefix
from milp_ray.training.loss import TargetLoss, mean_token_loss, target_nll
from milp_ray.training.response_loss import Wanted, response_losses
from milp_ray.users.records import Example

EXAMPLES = (
    Example("Which pet do I have?", "You have a brown dog."),
    Example("Who?", "Me."),
    Example("What is the colour of my bicycle, and since when?", "It is green, since May."),
)
SEQUENCES = [
    Sequence((5, 6, 7, 8, 9), 2, "instruction"),
    Sequence((10, 11), 1, "memory"),
    Sequence(tuple(range(20, 40)), 4, "memory"),
]


@pytest.fixture(scope="module", params=["tiny_llama_dir", "tiny_gpt2_dir", "tiny_roberta_dir"])
def base(request: pytest.FixtureRequest) -> Base:
    return load_base(BaseSection(model=str(request.getfixturevalue(request.param)), device="cpu"))


def whole(base: Base, sequence: Sequence) -> list[float]:
    """Transformers' own logits of one sequence alone, nothing left out."""
    ids = torch.tensor([sequence.ids])
    with torch.no_grad():
        log_probabilities = base.model(input_ids=ids).logits[0].log_softmax(-1)
    return [-float(log_probabilities[i - 1, ids[0, i]]) for i in range(sequence.target_from, ids.shape[1])]


def test_losses_of_padded_batches_equal_those_of_each_sequence_alone(base: Base) -> None:
    batch = make_batch(SEQUENCES, base)
    with torch.no_grad():
        losses = target_nll(base.model, batch, base.first_position)
    expected = [loss for sequence in SEQUENCES for loss in whole(base, sequence)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_real_token_that_is_the_models_padding_token_is_no_padding(base: Base) -> None:
    pad = base.model.config.pad_token_id or 1
    sequence = Sequence((5, pad, 6, 7, 8), 1, "memory")
    batch = make_batch([sequence, SEQUENCES[2]], base)
    with torch.no_grad():
        padded = target_nll(base.model, batch, base.first_position)[:4]
        alone = target_nll(base.model, make_batch([sequence], base), base.first_position)
    assert padded.tolist() == pytest.approx(alone.tolist(), abs=1e-5)


def test_a_model_that_cannot_choose_positions_gives_the_same_losses(base: Base) -> None:
    class AllLogits(torch.nn.Module):
        def forward(self, logits_to_keep: torch.Tensor, **inputs: torch.Tensor) -> object:
            return base.model(**inputs)

    batch = make_batch(SEQUENCES, base)
    with torch.no_grad():
        chosen = target_nll(base.model, batch, base.first_position)
        everything = target_nll(AllLogits(), batch, base.first_position)
    assert everything.tolist() == pytest.approx(chosen.tolist(), abs=1e-6)


@pytest.mark.parametrize("first_layer", [1, 2])
def test_replayed_layers_give_the_same_losses_and_come_back(base: Base, first_layer: int) -> None:
    batch = make_batch([SEQUENCES[i] for i in (2, 0, 1)], base)
    layers = list(base.model.get_submodule(base.spec.layers_path))
    with torch.no_grad():
        expected = target_nll(base.model, batch, base.first_position)
        with frozen_prefix(base, first_layer, SEQUENCES, batch_size=2) as prefix:
            assert prefix is not None
            replayed = TargetLoss(base.model, base.first_position, prefix)([batch])
            calls = [0]
            hook = layers[0].register_forward_hook(lambda *_: calls.__setitem__(0, 1))
            TargetLoss(base.model, base.first_position, prefix)([batch])
            hook.remove()
            assert calls == [0], "the first layer must not run"
    assert replayed.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert list(base.model.get_submodule(base.spec.layers_path)) == layers


def test_with_lora_on_the_first_layer_nothing_is_replayed(base: Base) -> None:
    with frozen_prefix(base, 0, SEQUENCES, batch_size=2) as prefix:
        assert prefix is None


def test_the_mean_is_over_tokens_and_not_over_examples() -> None:
    assert mean_token_loss([(2.0, 1), (4.0, 3)]) == 1.5
    assert mean_token_loss([]) is None


def test_contexts_change_the_loss_but_not_what_is_measured(base: Base) -> None:
    prompt = PromptSection()
    contexts = ["User profile:\nDog.\n", "", "x" * 900]
    plain, told = response_losses(base, [Wanted(EXAMPLES), Wanted(EXAMPLES, contexts)], prompt)
    assert [n for _, n in plain] == [n for _, n in told]
    assert plain[0][0] != told[0][0]
    assert plain[1] == pytest.approx(told[1], abs=1e-4)


def test_losses_come_in_the_order_of_the_examples(base: Base, tiny_llama_dir: Path) -> None:
    [together] = response_losses(base, [Wanted(EXAMPLES)], PromptSection(), batch_size=2)
    alone = [response_losses(base, [Wanted([e])], PromptSection())[0][0] for e in EXAMPLES]
    assert together == [pytest.approx(each, abs=1e-4) for each in alone]
