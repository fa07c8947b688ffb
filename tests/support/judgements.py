"""Judgements and people's choices, as rows of their files, and what is asked of their means."""

from __future__ import annotations

from typing import Any

from milp_ray.evaluation.human import HumanChoice
from milp_ray.evaluation.judgements import COLUMNS
from milp_ray.evaluation.table_file import as_table

DRAWS = {"n_bootstrap": 200, "confidence": 0.95, "seed": 0}
PAIR = ("milp", "text_prompt")


def judgement(user: str, example: int, choice: int, **changes: Any) -> dict[str, Any]:
    row = {"user_id": user, "example": example, "method": "milp", "against": "text_prompt"}
    return {**row, "judge": "embedded", "score": float(choice), "choice": choice, **changes}


def table(rows: list[dict[str, Any]]) -> Any:
    return as_table(rows, COLUMNS)


def human(user: str, example: int, choice: Any, *methods: str) -> HumanChoice:
    return HumanChoice(user, example, *(methods or PAIR), choice=choice)
