"""OPPU (One PEFT Per User, Tan et al. 2024, arXiv 2402.04401): an adapter each, beside one for the task.

First an adapter is trained on everybody's past examples, which teaches the task and the form of answers; it
is merged into the base. Over that, each user's own adapter is trained on their history and examples. Answers
come from both: one adapter whose maps add up the two. The paper trains the task's adapter on users who are
not evaluated; here they are the users themselves, so that it sees what MiLP sees. It holds examples of all of
them, and the adapters on top hold their own user's alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milp_ray.methods.milp import BOTH, train_adapters
from milp_ray.methods.protocol import Answerer
from milp_ray.methods.shared import Shared
from milp_ray.methods.shared_adapter import pooled_adapter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milp_ray.methods.protocol import FitRequest, Personalizer


def share(requests: Sequence[FitRequest]) -> Shared:
    """Train the task's adapter."""
    return Shared(pooled_adapter(requests, frozenset({"instruction"})))


def fit(requests: Sequence[FitRequest]) -> list[Personalizer | None]:
    """Train the users' adapters over the merged base."""
    from milp_ray.training.merging import combined, merged

    if not requests:
        return []
    task = requests[0].shared_adapter
    with merged(requests[0].base, task):
        own = train_adapters(requests, BOTH)
    return [
        Answerer(request, adapter=combined(task, adapter), kept=adapter)
        for request, adapter in zip(requests, own, strict=True)
    ]
