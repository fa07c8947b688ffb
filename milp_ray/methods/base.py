"""Base alone: the frozen model answers the query without knowing anything about the user.

The lower end of every comparison. What it gets right it gets right by chance or because no fact is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milp_ray.methods.protocol import Answerer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milp_ray.methods.protocol import FitRequest, Personalizer


def fit(requests: Sequence[FitRequest]) -> list[Personalizer | None]:
    """Nothing to fit."""
    return [Answerer(request) for request in requests]
