"""Targets that are the base's own distributions: where they come from, and where they cannot be kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.jobs import BOTH, MakeSplit
from support.packs import PROMPT, RECIPE

from milp_ray.config.base import BaseSection
from milp_ray.config.training import DeepSpeedSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.training.base import Base, load_base
from milp_ray.training.data import Sequence
from milp_ray.training.encode import with_reference
from milp_ray.training.job import Job, Stage
from milp_ray.training.reference import reference_of
from milp_ray.training.train import train

TEXTS = (Sequence((4, 5, 6, 7), 2, "memory"), Sequence(tuple(range(10, 21)), 1, "memory"))


@pytest.fixture(scope="module", params=["tiny_llama_dir", "tiny_gpt2_dir", "tiny_roberta_dir"])
def base(request: pytest.FixtureRequest) -> Base:
    return load_base(BaseSection(model=str(request.getfixturevalue(request.param)), device="cpu"))


@pytest.fixture
def llama(tiny_llama_dir: Path) -> Base:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


def test_a_reference_makes_the_logits_that_the_base_gives(base: Base) -> None:
    for text, kept in zip(TEXTS, with_reference(base, TEXTS), strict=True):
        assert kept.ids == text.ids
        assert kept.reference is not None
        with torch.no_grad():
            expected = base.model(torch.tensor([text.ids])).logits[0, text.target_from - 1 : -1]
            torch.testing.assert_close(base.model.lm_head(kept.reference), expected, atol=1e-5, rtol=1e-5)


def test_without_any_reference_there_is_none() -> None:
    assert reference_of([(3, None), (2, None)], torch.device("cpu")) is None


def test_a_base_that_does_more_than_its_head_is_refused(llama: Base) -> None:
    def capped(module: torch.nn.Module, inputs: object, output: object) -> None:
        output.logits.tanh_()  # type: ignore[attr-defined]

    llama.model.register_forward_hook(capped)
    with pytest.raises(
        MilpError, match=r"llama\) does more with its last hidden .*own_texts_target to token"
    ):
        with_reference(llama, TEXTS)


def test_zero_3_which_scatters_the_head_is_refused(llama: Base, make_split: MakeSplit) -> None:
    layout = CanonicalLayout((True,) * llama.n_layers, 4)
    stages = (Stage("own", tuple(with_reference(llama, TEXTS)), 1),)
    job = Job("job", make_split("job"), layout, BOTH, 3, stages=stages)
    scattered = RECIPE.model_copy(update={"deepspeed": DeepSpeedSection(zero_stage=3)})
    with pytest.raises(MilpError, match="own_texts_target to token, or zero_stage to 2"):
        train(llama, [job], scattered, PROMPT)
