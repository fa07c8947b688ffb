"""The measures of an answer as tables and figures show them, declared once: names, labels, directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Measure:
    """One column of a scores file that is compared between methods.

    ``scale`` turns the stored value into the shown one, ``decimals`` is how many of its digits mean
    something at the sizes met here.
    """

    name: str
    label: str
    unit: str
    direction: Literal["min", "max"]
    scale: float = 1.0
    decimals: int = 1

    @property
    def header(self) -> str:
        """Label and unit, with an arrow towards better."""
        unit = f" ({self.unit})" if self.unit else ""
        return f"{self.label}{unit} {'↓' if self.direction == 'min' else '↑'}"

    def show(self, value: float | None, *, signed: bool = False) -> str:
        """A stored value as it is printed; a dash where there is none."""
        if value is None:
            return "–"
        rounded = round(value * self.scale, self.decimals) + 0.0  # the sum turns −0 into 0
        return f"{rounded:{'+' if signed else ''}.{self.decimals}f}".replace("-", "−")


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("fact_accuracy", "Fact accuracy", "%", "max", scale=100.0, decimals=0),
        Measure("rouge_l", "ROUGE-L", "F × 100", "max"),
        Measure("rouge_1", "ROUGE-1", "F × 100", "max"),
        Measure("persona_f1", "Persona-F1", "× 100", "max", decimals=2),
        Measure("loss", "Loss", "nats a token", "min", decimals=2),
    )
}
