"""``evaluation`` and ``compare``: what is measured on the held-out queries, and of which methods."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from milp_ray.config.methods import ALL_METHODS, METHODS, Method, OwnMethod
from milp_ray.config.section import NonNegativeInt, Section


class EvaluationSection(Section):
    """What is measured on the held-out queries."""

    methods: Annotated[tuple[OwnMethod, ...], Field(min_length=1)] = METHODS
    max_new_tokens: PositiveInt = 48
    batch_size: PositiveInt = 16  # rows generated at once
    n_bootstrap: PositiveInt = 2000
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    # What the queries ask for: free answers, one of `labels`, or a number on `scale` (lowest, highest).
    task: Literal["answers", "classification", "rating"] = "answers"
    labels: tuple[str, ...] = ()
    scale: tuple[float, float] = (1.0, 5.0)

    @model_validator(mode="after")
    def _task_has_its_answers(self) -> EvaluationSection:
        distinct = {" ".join(label.lower().split()) for label in self.labels} - {""}
        if self.task == "classification" and not 2 <= len(distinct) == len(self.labels):
            raise ValueError(
                f"evaluation.labels names {len(distinct)} different labels in {len(self.labels)} entries; a "
                "classification needs two or more, each named once (case does not tell them apart)"
            )
        if self.labels and self.task != "classification":
            raise ValueError(
                f"evaluation.labels is given, but evaluation.task is {self.task!r}; set it to classification"
            )
        if not self.scale[0] < self.scale[1]:
            raise ValueError(f"evaluation.scale is {list(self.scale)}; give [lowest, highest]")
        return self


class LayoutSection(Section):
    """A layout given by hand."""

    layers: tuple[NonNegativeInt, ...]  # that carry a LoRA
    rank: PositiveInt


class CompareSection(Section):
    """`milp-ray compare`: every method on the same users, quality against cost."""

    methods: Annotated[tuple[Method, ...], Field(min_length=1)] = ALL_METHODS
    n_seeds: PositiveInt = 3  # of training: config.seed, and those after it
    layout: LayoutSection | None = None  # of all adapters; None: the one that the run has chosen
