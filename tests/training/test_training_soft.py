"""A soft prompt is read as tokens of those embeddings would be, in any company, on every architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from milp_ray.config.prompt import PromptSection
from milp_ray.errors import MilpError
from milp_ray.training.base import Base
from milp_ray.training.data import instruction_set, make_batch
from milp_ray.training.generation import Questions, generate
from milp_ray.training.response_loss import Wanted, response_losses
from milp_ray.training.soft import embeddings, sequence_with_places, soft_nll
from milp_ray.users.records import Example

PROMPT = PromptSection()
EXAMPLES = (Example("Where do I live?", "In Rome."), Example("Who?", "Your sister, who plays the piano."))
PREFIX = "I live in Rome.\n"


@pytest.fixture(scope="module")
def base(scaled_base: Base) -> Base:
    return scaled_base


def embedded(base: Base, text: str) -> Tensor:
    """(n_tokens, hidden): a text as the soft prompt of its own tokens."""
    ids = torch.tensor(base.tokenize([text])[0])
    return base.model.get_input_embeddings()(ids).detach()


def noise(base: Base, n_soft: int, seed: int) -> Tensor:
    hidden = base.model.config.hidden_size
    return torch.randn(n_soft, hidden, generator=torch.Generator().manual_seed(seed))


def single(asked: Questions) -> list[Questions]:
    """Each prompt on its own."""
    each = (
        asked.soft if asked.soft is not None and asked.soft.dim() == 3 else [asked.soft] * len(asked.prompts)
    )
    return [Questions([prompt], soft=soft) for prompt, soft in zip(asked.prompts, each, strict=True)]


def test_a_soft_prompt_of_tokens_embeddings_is_answered_as_those_tokens_are(base: Base) -> None:
    prompts = ["Question: Where?\nAnswer:", "Hi"]
    hard = [Questions([PREFIX + prompt for prompt in prompts])]
    soft = [Questions(prompts, soft=embedded(base, PREFIX))]
    how = {"max_new_tokens": 12, "batch_size": 8}
    assert (
        generate(base, soft, **how)
        == generate(base, hard, **how)
        != generate(base, [Questions(prompts)], **how)
    )


def test_rows_with_and_without_soft_prompts_are_answered_as_if_alone(base: Base) -> None:
    prompts = ["Question: What is the colour of my dog?\nAnswer:", "Hi", "Question: Who?\nAnswer:"]
    asked = [
        Questions(prompts, soft=noise(base, 5, 0)),
        Questions(prompts),
        Questions(prompts[:2], soft=torch.stack([noise(base, 9, 1), noise(base, 9, 2)])),
    ]
    alone = [
        [generate(base, [own], max_new_tokens=10, batch_size=1)[0][0] for own in single(one)] for one in asked
    ]
    for batch_size in (3, 8):
        assert generate(base, asked, max_new_tokens=10, batch_size=batch_size) == alone
    assert len({alone[0][0], alone[1][0], alone[2][0]}) > 1


def test_a_soft_prompt_counts_in_the_context(base: Base) -> None:
    long = "abcdefghij" * 60
    n_soft = 20
    kept = base.context_length - 16 - n_soft - len(base.start_ids)
    soft = noise(base, n_soft, 0)
    whole, cut = (
        generate(base, [Questions([text], soft=soft)], max_new_tokens=16, batch_size=1)
        for text in (long, long[-kept:])
    )
    assert whole == cut
    with pytest.raises(MilpError, match="leaves no room"):
        generate(base, [Questions(["Hi"], soft=noise(base, 250, 0))], max_new_tokens=16, batch_size=1)


def test_a_soft_prompt_of_another_size_is_refused(base: Base) -> None:
    for soft in (torch.zeros(3, 7), torch.zeros(4, 3, base.model.config.hidden_size), torch.zeros(5)):
        with pytest.raises(MilpError, match="a soft prompt of shape"):
            generate(base, [Questions(["Hi", "Who"], soft=soft)], max_new_tokens=4, batch_size=2)


@pytest.mark.parametrize("flat", [True, False])
def test_losses_behind_a_soft_prompt_are_those_behind_its_tokens(
    base: Base, flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from milp_ray.training import response_loss

    if not flat:
        monkeypatch.setattr(response_loss, "can_lie_flat", lambda base: False)
    hard = Wanted(EXAMPLES, contexts=[PREFIX] * 2)
    soft = Wanted(EXAMPLES, soft=embedded(base, PREFIX))
    each = replace(soft, soft=torch.stack([embedded(base, PREFIX)] * 2))
    bare = Wanted(EXAMPLES)
    found = response_losses(base, [bare, soft, hard, each], PROMPT, batch_size=3)
    by_tokens = found[2]
    for behind_soft in (found[1], found[3]):
        for (one, n), (other, m) in zip(behind_soft, by_tokens, strict=True):
            assert n == m
            assert one == pytest.approx(other, abs=1e-3)
    alone = response_losses(base, [bare], PROMPT)[0]
    assert [n for _, n in found[0]] == [n for _, n in alone]
    assert [one for one, _ in found[0]] == pytest.approx([one for one, _ in alone], abs=1e-3)
    assert found[0][0][0] != pytest.approx(found[1][0][0], abs=1e-3)


def test_gradients_reach_the_soft_prompt_and_no_other_row(base: Base) -> None:
    ids = torch.zeros((2, 6), dtype=torch.long)
    soft = noise(base, 3, 0).requires_grad_()
    entering = embeddings(base, ids, [0, 6], [None, soft])
    first = len(base.start_ids)
    entering[1, first : first + 3].sum().backward()
    assert torch.equal(soft.grad, torch.ones_like(soft))
    assert torch.equal(entering[0], base.model.get_input_embeddings()(ids[0]))


def test_the_gradient_at_a_soft_prompt_is_the_slope_of_the_loss(base: Base) -> None:
    texts = instruction_set(EXAMPLES, base, PROMPT, max_length=100)
    batch = make_batch([sequence_with_places(one, 3, base) for one in texts], base)
    soft = noise(base, 3, 0).requires_grad_()

    def loss(own: Tensor) -> Tensor:
        return soft_nll(base, base.model, batch, [own, None]).double().sum()

    loss(soft).backward()
    size = float(soft.grad.norm())
    step = 1e-2 * soft.grad / size
    with torch.no_grad():
        slope = float(loss(soft + step) - loss(soft - step)) / 2e-2
    assert size > 1e-2
    assert slope == pytest.approx(size, rel=0.05)


def test_a_soft_prompt_that_leaves_no_room_for_an_answer_is_refused(base: Base) -> None:
    most = base.context_length - len(base.start_ids) - 2
    [[(_, n_targets)]] = response_losses(base, [Wanted(EXAMPLES[:1], soft=noise(base, most, 0))], PROMPT)
    assert n_targets == 1
    with pytest.raises(MilpError, match=rf"no room for a prompt and a response .* at most {most} "):
        response_losses(base, [Wanted(EXAMPLES[:1], soft=noise(base, most + 1, 0))], PROMPT)
