"""What some methods answer to users' held-out queries; runs in the pool's workers, and writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from milp_ray.errors import MilpError
from milp_ray.evaluation.scores import persona_words
from milp_ray.methods import fit
from milp_ray.methods.protocol import FitRequest, respond_all, training_side
from milp_ray.personalize.store import AdapterMissingError, AdapterStore

if TYPE_CHECKING:
    from milp_ray.config.evaluation import EvaluationSection
    from milp_ray.config.methods import MethodsSection
    from milp_ray.personalize.recipe import Recipe
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.base import Base
    from milp_ray.users.records import UserSplit


@dataclass(frozen=True, slots=True)
class Answers:
    """One user's answers under some methods, an entry a test example; and what judges may ask about."""

    by_method: dict[str, list[str]]  # without the methods that do not apply to the user
    persona: frozenset[str]


def answer_users(
    store: AdapterStore,
    recipe: Recipe,
    section: EvaluationSection,
    settings: MethodsSection,
    methods: Sequence[str],
    base: Base,
    splits: Sequence[UserSplit],
    report: Callable[[int, Any], None],
) -> None:
    """Answer every user's test queries under the methods; reports :class:`Answers` a user.

    The full method answers with the user's current adapter of the store, the one that serves the user; a user
    without one fails. Other methods that need an adapter train it here.
    """
    needs_stored = "milp" in methods and not recipe.layout.is_empty  # the empty layout is the base alone
    requests: dict[int, FitRequest] = {}
    for place, split in enumerate(splits):
        try:
            adapter = current_adapter(store, split.user_id) if needs_stored else None
        except MilpError as error:
            report(place, error)
        else:
            requests[place] = FitRequest(
                base=base,
                split=training_side(split),
                layout=recipe.layout,
                training=recipe.training,
                prompt=recipe.prompt,
                max_new_tokens=section.max_new_tokens,
                batch_size=section.batch_size,
                seed=recipe.seed_of(split.user_id),
                adapter=adapter,
                methods=settings,
            )
    found: dict[int, dict[str, list[str]]] = {place: {} for place in requests}
    for name in methods:
        fitted = zip(requests, fit(name, list(requests.values())), strict=True)
        ready = [(place, one) for place, one in fitted if one is not None]
        queries = [[example.query for example in splits[place].test] for place, _ in ready]
        responses = respond_all([one for _, one in ready], queries)
        for (place, _), own in zip(ready, responses, strict=True):
            found[place][name] = own
    for place, by_method in found.items():
        report(place, Answers(by_method, persona_words(splits[place])))


def current_adapter(store: AdapterStore, user_id: str) -> Adapter:
    """The adapter that serves a user.

    Raises:
        MilpError: there is none; the reason is the same for all such users.
    """
    try:
        return store.load(user_id)
    except AdapterMissingError:
        raise MilpError("no adapter in the store; `milp-ray personalize` makes the missing ones") from None
