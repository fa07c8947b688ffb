"""``update``: how adapters are continued with new history."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from milp_ray.config.section import NonNegativeInt, Section


class GuardSection(Section):
    """What an update may cost of what the adapter knew before."""

    # The loss over the validation examples of the version that is continued, which no update of it trains on,
    # may grow by at most this share; otherwise that version stays. Negative: it has to fall. None: no bound.
    tolerance: Annotated[float, Field(gt=-1.0)] | None = 0.05


class UpdateSection(Section):
    """How an adapter is continued with what is new since it was made."""

    data: Literal["new", "replay"] = "replay"  # what is new alone, or with a sample of what was before
    # replay: the share of turns, and of examples, that are a sample of earlier ones; 0.5: as many as are new.
    replay_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    memory_epochs: NonNegativeInt | None = None  # None: as training.memory_epochs
    instruction_epochs: NonNegativeInt | None = None  # None: as training.instruction_epochs
    learning_rate: PositiveFloat | None = None  # None: as training.learning_rate
    guard: GuardSection = GuardSection()
