"""Methods made ready for users: by name, with what is trained on all of them together, and their costs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from statistics import fmean
from types import ModuleType
from typing import TYPE_CHECKING

from milp_ray.config.methods import SHARED_METHODS
from milp_ray.errors import MilpError
from milp_ray.methods.catalogue import INFO

if TYPE_CHECKING:
    from milp_ray.methods.protocol import FitRequest, Personalizer
    from milp_ray.methods.shared import Shared
    from milp_ray.users.records import Example


@dataclass(slots=True)
class Costs:
    """What a method takes; means over users and queries, seconds of one process.

    ``shared_seconds`` and ``shared_bytes`` are of what is trained on all users together, and paid once.
    ``training_seconds`` and ``stored_bytes`` are a user's, ``prompt_tokens`` and ``answer_seconds`` a
    query's; an answer's time is its share of that of the batches.
    """

    training_seconds: float = 0.0
    shared_seconds: float = 0.0
    stored_bytes: float = 0.0
    shared_bytes: int = 0
    prompt_tokens: float = 0.0
    answer_seconds: float = 0.0
    n_answers: int = 0

    def answered(self, n_answers: int, seconds: float, n_tokens: int) -> None:
        """Count answers, and take them into the means."""
        total = self.n_answers + n_answers
        if total:
            self.prompt_tokens += (n_tokens - n_answers * self.prompt_tokens) / total
            self.answer_seconds += (seconds - n_answers * self.answer_seconds) / total
        self.n_answers = total


@dataclass(slots=True)
class Fitted:
    """A method that is ready to answer users; ``personalizers`` lacks those whom it does not apply to."""

    name: str
    personalizers: Mapping[str, Personalizer]
    costs: Costs = field(default_factory=Costs)

    def respond(self, asked: Sequence[tuple[str, str]]) -> list[str]:
        """Answer (user id, query) pairs of any users in shared batches, greedily, in the order given.

        Raises:
            MilpError: the method does not apply to one of the users.
        """
        from milp_ray.training.generation import generate
        from milp_ray.training.soft import n_soft_of

        ids = self._known(user_id for user_id, _ in asked)
        if not ids:
            return []
        queries: dict[str, list[str]] = {user_id: [] for user_id in ids}
        for user_id, query in asked:
            queries[user_id].append(query)
        started = time.perf_counter()
        questions = [self.personalizers[user_id].questions(queries[user_id]) for user_id in ids]
        one = self.personalizers[ids[0]].request
        answers = generate(one.base, questions, max_new_tokens=one.max_new_tokens, batch_size=one.batch_size)
        seconds = time.perf_counter() - started
        n_tokens = sum(
            sum(one.base.count_tokens(list(own.prompts))) + len(own.prompts) * n_soft_of(own.soft)
            for own in questions
        )
        self.costs.answered(len(asked), seconds, n_tokens)
        left = {user_id: iter(own) for user_id, own in zip(ids, answers, strict=True)}
        return [next(left[user_id]) for user_id, _ in asked]

    def losses(self, examples: Mapping[str, Sequence[Example]]) -> dict[str, list[tuple[float, int]]]:
        """(summed negative log-likelihood in nats, tokens) of each user's wanted responses.

        Raises:
            MilpError: the method does not apply to one of the users.
        """
        from milp_ray.methods.protocol import losses_all

        ids = self._known(examples)
        found = losses_all([self.personalizers[i] for i in ids], [examples[i] for i in ids])
        return dict(zip(ids, found, strict=True))

    def _known(self, user_ids: Iterable[str]) -> list[str]:
        ids = list(dict.fromkeys(user_ids))
        missing = sum(user_id not in self.personalizers for user_id in ids)
        if missing:
            raise MilpError(
                f"method {self.name!r} was not fitted to {missing} of the {len(ids)} users who are asked "
                "for, or does not apply to them; see Fitted.personalizers"
            )
        return ids


def fit_users(name: str, requests: Sequence[FitRequest], shared: Shared | None = None) -> Fitted:
    """Make a method ready to answer users, one request each, and measure what that takes.

    Args:
        name: see :data:`~milp_ray.methods.catalogue.INFO`, or a module's full name.
        requests: the users; their ids differ.
        shared: what :func:`share` returned earlier; ``None``: it is made from these users.

    Raises:
        MilpError: there is no such method, or a user's training diverges.
    """
    costs = Costs()
    started = time.perf_counter()
    if shared is None:
        shared = share(name, requests)
        costs.shared_seconds = time.perf_counter() - started
    if shared is not None:
        costs.shared_bytes = shared.n_bytes
    started = time.perf_counter()
    found = fit(name, [replace(request, shared=shared) for request in requests])
    costs.training_seconds = (time.perf_counter() - started) / max(1, len(requests))
    ready = {
        request.split.user_id: one for request, one in zip(requests, found, strict=True) if one is not None
    }
    if ready:
        costs.stored_bytes = fmean(one.stored_bytes for one in ready.values())
    return Fitted(name, ready, costs)


def fit(name: str, requests: Sequence[FitRequest]) -> list[Personalizer | None]:
    """Make one method ready to answer each user; ``None`` where it does not apply to that user.

    Each request holds in ``shared`` what :func:`share` returned, for the methods that have such a part.

    Raises:
        MilpError: there is no such method, or a user's training diverges.
    """
    options = INFO[name].options if name in INFO else {}
    personalizers: list[Personalizer | None] = partial(_module(name).fit, **options)(requests)
    return personalizers


def share(name: str, requests: Sequence[FitRequest]) -> Shared | None:
    """What a method trains on all users together; ``None`` for one that has no such part.

    Raises:
        MilpError: there is no such method, or training diverges.
    """
    make = getattr(_module(name), "share", None)
    shared: Shared | None = make(requests) if make is not None else None
    return shared


def is_shared(name: str) -> bool:
    """Whether a method trains something on all users together.

    Raises:
        MilpError: there is no such method.
    """
    return name in SHARED_METHODS if name in INFO else hasattr(_module(name), "share")


def _module(name: str) -> ModuleType:
    if name in INFO:
        return import_module(f"milp_ray.methods.{INFO[name].module or name}")
    if "." not in name:
        raise MilpError(
            f"method {name!r}: use one of {', '.join(INFO)}, or a module's full name, such as my_package.mine"
        )
    try:
        found = import_module(name)
    except ModuleNotFoundError as error:
        raise MilpError(
            f"method {name!r}: no module {error.name!r} is installed or on PYTHONPATH; mend one of the two"
        ) from error
    if not callable(getattr(found, "fit", None)):
        raise MilpError(f"method {name!r}: the module has no function fit(requests); see milp_ray.methods")
    return found
