"""The loss of a line of tokens: that of whole logits, values and gradients, in chunks of enough rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from milp_ray.training import flat_loss
from milp_ray.training.flat_loss import FlatLoss
from milp_ray.training.reference import reference_of

HIDDEN = 4


def base_with_head(vocabulary: int, *, is_linear: bool = True) -> Any:
    """What the loss looks at of a base."""
    head: nn.Module = nn.Linear(HIDDEN, vocabulary, bias=False).requires_grad_(False)
    if not is_linear:
        head = nn.Sequential(nn.Tanh(), head)
    model = SimpleNamespace(lm_head=head, get_output_embeddings=lambda: head)
    return SimpleNamespace(model=model, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("vocabulary", "rows"),
    [
        (2_560, 102),  # a chunk of logits that stays in a core's cache
        (50_257, 64),  # five rows would be such a chunk, and the head read anew for each
    ],
)
def test_a_chunk_has_rows_enough_for_its_head_and_changes_no_loss(
    vocabulary: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def watched(states: Tensor, *rest: Any) -> Tensor:
        sizes.append(len(states))
        return functional.linear(states, *rest)

    torch.manual_seed(0)
    base, n_targets = base_with_head(vocabulary), rows + 10
    states = torch.randn(n_targets, HIDDEN, requires_grad=True)
    labels = torch.randint(0, vocabulary, (n_targets,))
    monkeypatch.setattr(flat_loss, "functional", SimpleNamespace(linear=watched))
    found = FlatLoss(base)(states, labels)
    assert sizes == [rows, 10]
    expected = functional.cross_entropy(base.model.lm_head(states), labels, reduction="none")
    torch.testing.assert_close(found, expected)
    weights = torch.rand(n_targets)
    [own], [wanted] = (torch.autograd.grad((nll * weights).sum(), [states]) for nll in (found, expected))
    torch.testing.assert_close(own, wanted)


@pytest.mark.parametrize("is_linear", [True, False])
def test_of_a_target_with_a_reference_the_loss_is_the_divergence_from_it(is_linear: bool) -> None:
    torch.manual_seed(0)
    base, n = base_with_head(2_560, is_linear=is_linear), 250
    head = base.model.lm_head
    states, kept = torch.randn(n, HIDDEN, requires_grad=True), torch.randn(n, HIDDEN)
    labels, weights = torch.randint(0, 2_560, (n,)), torch.rand(n)
    wanted = [(120, None), (100, kept[120:220]), (20, None), (10, kept[240:])]
    reference = reference_of(wanted, torch.device("cpu"))
    found = FlatLoss(base)(states, labels, reference)
    q, p = head(states).log_softmax(1), head(kept).log_softmax(1)
    expected = functional.cross_entropy(head(states), labels, reduction="none").clone()
    for part in (slice(120, 220), slice(240, 250)):
        expected[part] = (p.exp() * (p - q)).sum(1)[part]
    torch.testing.assert_close(found, expected)
    [own], [by_hand] = (torch.autograd.grad((loss * weights).sum(), [states]) for loss in (found, expected))
    torch.testing.assert_close(own, by_hand)


def test_what_is_as_the_reference_costs_nothing_and_pulls_nowhere() -> None:
    torch.manual_seed(0)
    base, states = base_with_head(300), torch.randn(6, HIDDEN, requires_grad=True)
    reference = reference_of([(6, states.detach().clone())], torch.device("cpu"))
    found = FlatLoss(base)(states, torch.zeros(6, dtype=torch.long), reference)
    [pull] = torch.autograd.grad(found.sum(), [states])
    assert found.abs().max() < 1e-6
    assert pull.abs().max() < 1e-6
