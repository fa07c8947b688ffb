"""What a precision costs: bytes, errors of the weights, and validation loss of stored adapters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from milp_ray.config.personalize import AdapterPrecision
from milp_ray.errors import MilpError
from milp_ray.personalize.store.faults import AdapterExpiredError, AdapterMissingError

if TYPE_CHECKING:
    from milp_ray.config.prompt import PromptSection
    from milp_ray.personalize.store.adapter_store import AdapterStore
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.base import Base
    from milp_ray.users.records import UserSplit

PRECISIONS: tuple[AdapterPrecision, ...] = get_args(AdapterPrecision)


@dataclass(frozen=True, slots=True)
class PrecisionLoss:
    """One precision over some users; losses are means over users of nats a response token."""

    precision: str
    n_users: int
    bytes_a_user: int
    max_error: float  # of any weight
    mean_error: float
    relative_error: float  # mean over users of the norm of the difference over the norm of the weights
    validation_loss: float
    loss_difference: float  # mean over users, to the adapters as they are stored now
    largest_loss_difference: float  # of any user, in size


def measure_precisions(
    store: AdapterStore, base: Base, splits: Iterable[UserSplit], prompt: PromptSection, n_users: int
) -> list[PrecisionLoss]:
    """Compare every precision with the adapters as they are stored, on users' validation examples.

    Args:
        store: the store; nothing in it is changed.
        base: what the adapters were made for.
        splits: users who may be served; the first ``n_users`` that have an adapter which has not expired, and
            validation examples, are measured.
        prompt: the fixed phrases.
        n_users: how many.

    Raises:
        MilpError: no user has both.
    """
    from milp_ray.personalize.store.precision import from_stored, to_stored
    from milp_ray.training.adapters import adapter_files

    chosen, adapters = _sample(store, splits, n_users)
    before = _losses(base, chosen, adapters, prompt)
    rows = []
    for precision in PRECISIONS:
        stored = [to_stored(adapter, precision) for adapter in adapters]
        losses = _losses(base, chosen, [from_stored(one, precision) for one, _ in stored], prompt)
        differences = [after - was for after, was in zip(losses, before, strict=True)]
        facts = [facts for _, facts in stored]
        rows.append(
            PrecisionLoss(
                precision=precision,
                n_users=len(chosen),
                bytes_a_user=round(_mean([sum(map(len, adapter_files(one).values())) for one, _ in stored])),
                max_error=max(fact.get("max_error", 0.0) for fact in facts),
                mean_error=_mean([fact.get("mean_error", 0.0) for fact in facts]),
                relative_error=_mean([fact.get("relative_error", 0.0) for fact in facts]),
                validation_loss=_mean(losses),
                loss_difference=_mean(differences),
                largest_loss_difference=max(differences, key=abs),
            )
        )
    return rows


def _sample(
    store: AdapterStore, splits: Iterable[UserSplit], n_users: int
) -> tuple[list[UserSplit], list[Adapter]]:
    chosen: list[UserSplit] = []
    adapters: list[Adapter] = []
    for split in splits:
        if len(chosen) == n_users:
            break
        if not split.validation:
            continue
        try:
            adapters.append(store.load(split.user_id))
        except (AdapterMissingError, AdapterExpiredError):
            continue
        chosen.append(split)
    if not chosen:
        raise MilpError(
            f"no user of the run has both an adapter in {store.uri} that may be served and validation "
            "examples: there is nothing to measure; run `milp-ray personalize`, or raise "
            "users.split.validation"
        )
    return chosen, adapters


def _losses(
    base: Base, splits: Sequence[UserSplit], adapters: Sequence[Adapter], prompt: PromptSection
) -> list[float]:
    """Mean loss of a response token of each user."""
    from milp_ray.training.response_loss import Wanted, response_losses

    wanted = [Wanted(s.validation, adapter=a) for s, a in zip(splits, adapters, strict=True)]
    return [
        sum(total for total, _ in own) / sum(n for _, n in own)
        for own in response_losses(base, wanted, prompt)
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
