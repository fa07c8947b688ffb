"""Kept states below the lowest LoRA: of each job by itself, and freed with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from milp_ray.training.base import Base
from milp_ray.training.data import Sequence
from milp_ray.training.flat import flat_attention
from milp_ray.training.flat_batch import Part, Texts
from milp_ray.training.flat_prefix import FlatPrefix
from milp_ray.training.fused import fused_operations


def texts_of(*lengths: int) -> Texts:
    return Texts([Sequence(tuple(4 + (7 * i) % 200 for i in range(n)), 1, "memory") for n in lengths])


def states_of(texts: Texts) -> Tensor:
    assert texts.states is not None
    return texts.states


@pytest.mark.parametrize("tokens_a_pass", [16, 4096])
def test_a_text_that_is_dropped_frees_its_own_states_and_leaves_the_others(
    scaled_base: Base, tokens_a_pass: int
) -> None:
    several = [texts_of(9, 5, 12), texts_of(3), texts_of(30, 2)]
    with fused_operations(scaled_base), flat_attention(scaled_base) as view:
        prefix = FlatPrefix(scaled_base, view, tokens_a_pass)
        prefix.move(2, [])
        prefix.keep(several)
        for texts in several:
            anew = texts_of(*texts.lengths)
            part = Part(anew, tuple(range(len(anew))), None)
            torch.testing.assert_close(states_of(texts), prefix.states_of([part]))
        prefix.drop(several[0])
    kept = [states_of(texts).untyped_storage() for texts in several[1:]]
    assert len({storage.data_ptr() for storage in kept}) == 2
    assert sum(storage.nbytes() for storage in kept) == prefix._kept
    assert several[0].states is None
