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

HIDDEN = 4


def base_with_head(vocabulary: int) -> Any:
    """What the loss looks at of a base."""
    head = nn.Linear(HIDDEN, vocabulary, bias=False).requires_grad_(False)
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
