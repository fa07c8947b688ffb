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

# Measures of answers taken together, see milp_ray.evaluation.together: of closed questions …
TASK_MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("yes_no", "Yes/no accuracy", "%", "max", scale=100.0, decimals=0),
        Measure("accuracy", "Accuracy", "%", "max", scale=100.0),
        Measure("macro_f1", "Macro-F1", "0–1", "max", decimals=3),
        Measure("mae", "MAE", "points", "min", decimals=3),
        Measure("rmse", "RMSE", "points", "min", decimals=3),
        Measure("unparsed", "Not understood", "%", "min", scale=100.0),
    )
}
# … and of any answers.
FURTHER_MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("bleu", "BLEU", "× 100", "max"),
        Measure("sentence_bleu", "BLEU of an answer", "× 100", "max"),
        Measure("perplexity", "Perplexity", "", "min", decimals=2),
        Measure("distinct_1", "Distinct-1", "0–1", "max", decimals=3),
        Measure("distinct_2", "Distinct-2", "0–1", "max", decimals=3),
        Measure("persona_f1_share", "Persona-F1", "0–1", "max", decimals=4),
    )
}
