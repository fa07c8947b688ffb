"""Typed configuration: one frozen section a stage, and YAML that mirrors it key for key.

The whole is :class:`Config`; each section is in the module that is named after its key, or after what the
keys of several have in common (``space`` and ``choice`` are in :mod:`milp_ray.config.search`). Functions take
the section they need, never the whole. Reading YAML, applying ``key=value`` overrides and wording the errors
is in :mod:`milp_ray.config_loader`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from milp_ray.config.base import BaseSection
from milp_ray.config.cluster import RaySection
from milp_ray.config.evaluation import CompareSection, EvaluationSection
from milp_ray.config.methods import MethodsSection
from milp_ray.config.personalize import PersonalizeSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.search import ChoiceSection, SearchSection, SpaceSection
from milp_ray.config.section import NonNegativeInt, Section
from milp_ray.config.tracking import TrackingSection
from milp_ray.config.training import TrainingSection
from milp_ray.config.update import UpdateSection
from milp_ray.config.users import Source, UsersSection


class Config(Section):
    """Everything one run needs."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: NonNegativeInt = 0
    output_dir: Source = Path("runs")  # a folder, s3://BUCKET/… or gs://BUCKET/…
    base: BaseSection = BaseSection()
    users: UsersSection = UsersSection()
    prompt: PromptSection = PromptSection()
    space: SpaceSection = SpaceSection()
    training: TrainingSection = TrainingSection()
    search: SearchSection = SearchSection()
    choice: ChoiceSection = ChoiceSection()
    personalize: PersonalizeSection = PersonalizeSection()
    update: UpdateSection = UpdateSection()
    methods: MethodsSection = MethodsSection()
    evaluation: EvaluationSection = EvaluationSection()
    compare: CompareSection = CompareSection()
    tracking: TrackingSection = TrackingSection()
    ray: RaySection = RaySection()

    @model_validator(mode="after")
    def _weights_in_main_memory_need_zero_3(self) -> Config:
        stage = self.training.deepspeed.zero_stage
        if self.base.keep_on == "cpu" and stage != 3:
            raise ValueError(
                f"base.keep_on is 'cpu' with training.deepspeed.zero_stage {stage}, which needs the whole "
                "base on the device; set zero_stage to 3, or keep_on to device"
            )
        return self

    @model_validator(mode="after")
    def _several_gpus_have_no_name(self) -> Config:
        search, device = self.search, self.base.device
        if search.gpus_per_trial and search.n_processes > 1 and device not in {"auto", "cuda"}:
            raise ValueError(
                f"search.gpus_per_trial is {search.gpus_per_trial:g} and base.device {device!r}: the "
                "processes of a trial each take a GPU of their own; set base.device to 'auto' or 'cuda'"
            )
        return self

    @model_validator(mode="after")
    def _trials_share_a_pack(self) -> Config:
        if self.search.n_sharing == 1:
            return self
        deepspeed = self.training.deepspeed
        hindrances = {
            f"training.deepspeed.zero_stage {deepspeed.zero_stage}": deepspeed.zero_stage > 0,
            "training.deepspeed.activation_checkpointing": deepspeed.activation_checkpointing,
            "base.dtype float16": self.base.dtype == "float16",
        }
        found = [name for name, is_there in hindrances.items() if is_there]
        if found:
            raise ValueError(
                f"search.trials_per_gpu or trials_per_process is {self.search.n_sharing}, but {found[0]} "
                "trains one job at a time, not packs, which is what trials share; leave one of the two out"
            )
        return self
