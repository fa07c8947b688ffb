"""``training``: how one user's adapter is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from milp_ray.config.section import Fraction, NonNegativeInt, Section


class LoraAlphaSection(Section):
    """``lora_alpha`` as a function of the rank r; the update is scaled by lora_alpha / r.

    constant: lora_alpha = value; proportional: lora_alpha = value × r;
    sqrt: lora_alpha = value × √r (rank-stabilised, Kalajdzievski 2023: the scale falls with 1/√r).
    """

    rule: Literal["constant", "proportional", "sqrt"] = "proportional"
    value: PositiveFloat = 2.0


class DeepSpeedSection(Section):
    """What the DeepSpeed engine is given."""

    # What the processes of a job share out: 0 nothing, 1 and 2 the optimizer's state, 3 the base as well.
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_parameters: Literal["none", "cpu"] = "none"  # ZeRO-3 only
    activation_checkpointing: bool = False

    @model_validator(mode="after")
    def _offload_needs_its_stage(self) -> DeepSpeedSection:
        if self.offload_parameters != "none" and self.zero_stage != 3:
            raise ValueError(
                f"offload_parameters is {self.offload_parameters!r} with zero_stage {self.zero_stage}: only "
                "ZeRO-3 divides parameters; set zero_stage to 3 or offload_parameters to none"
            )
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError(
                f"offload_optimizer is {self.offload_optimizer!r} with zero_stage 0, which keeps the "
                "optimizer whole; set zero_stage to 1, 2 or 3, or offload_optimizer to none"
            )
        return self


class TrainingSection(Section):
    """How one user's adapter is trained; the defaults are the paper's recipe."""

    stages: Literal["sequential", "joint"] = "sequential"  # memory then instruction, or both mixed
    memory_epochs: NonNegativeInt = 10
    instruction_epochs: NonNegativeInt = 10  # joint: the larger of the two counts
    memory_block_turns: PositiveInt | None = None  # turns a memory sequence; None: as many as fit max_length
    order: Literal["chronological", "shuffled"] = "shuffled"
    batch_size: PositiveInt = 8
    gradient_accumulation: PositiveInt = 1
    learning_rate: PositiveFloat = 5e-4
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-4
    warmup_ratio: Fraction = 0.1
    max_grad_norm: PositiveFloat = 1.0
    max_length: PositiveInt | None = None  # tokens a sequence; None: the base's context length
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    lora_alpha: LoraAlphaSection = LoraAlphaSection()
    # Epochs without a better validation loss after which training ends, best weights kept; None: never early.
    early_stopping_patience: PositiveInt | None = None
    # Jobs trained at once over one base (:mod:`milp_ray.training.pack`); None: as many as memory allows.
    pack_size: PositiveInt | None = None
    deepspeed: DeepSpeedSection = DeepSpeedSection()
