"""Names and directions of what a search optimises, declared once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Objective:
    """One quantity that a trial reports and a search optimises."""

    name: str
    direction: Literal["min", "max"]
    label: str

    @property
    def sign(self) -> float:
        """Factor that turns the value into one to be minimised."""
        return 1.0 if self.direction == "min" else -1.0


VALIDATION_LOSS = Objective("validation_loss", "min", "Validation loss (nats a token)")
ROUGE_L = Objective("rouge_l", "max", "ROUGE-L (F-measure × 100)")
ADAPTER_PARAMETERS = Objective("adapter_parameters", "min", "Adapter parameters")

KNOWN_OBJECTIVES: dict[str, Objective] = {o.name: o for o in (VALIDATION_LOSS, ROUGE_L, ADAPTER_PARAMETERS)}
