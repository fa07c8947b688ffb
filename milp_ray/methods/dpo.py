"""Preference alignment: MiLP's adapter, then direct preference optimisation on the user's own preferences.

DPO (Rafailov et al. 2023, arXiv 2305.18290) for one user: their own past response to a query is the chosen
answer. The rejected one is what they turned down, where the data says so (``rejected`` of an example), and
otherwise another user's response to the same or the most similar query (BM25), as what makes a preference
personal is that somebody else would have answered otherwise. The reference is the base with the adapter
switched off (:mod:`milp_ray.training.preference`).

It begins with the user's MiLP adapter (the stored one, where there is one): DPO moves probability between two
answers and teaches no facts, so that an adapter from scratch would prefer the user's answers without knowing
what they said. In the paper the fine-tuned model that it begins with is the reference, too; here the adapter
holds the fine-tuning, so that switching it off gives the base, and what MiLP has moved already counts in Δ.

Shared are past queries and responses of all users, with whose they are. Other users' texts are used as
rejected answers alone: no user's prompt or chosen answer has any, but the adapter was trained to avoid them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from milp_ray.methods.milp import stored_or_trained
from milp_ray.methods.protocol import Answerer
from milp_ray.methods.ranking import by_bm25
from milp_ray.methods.shared import Shared

if TYPE_CHECKING:
    from milp_ray.methods.protocol import FitRequest, Personalizer
    from milp_ray.methods.ranking import Ranking
    from milp_ray.training.preference import Pair, PreferenceRecipe
    from milp_ray.users.records import Example

_POOL = "pool"


def share(requests: Sequence[FitRequest]) -> Shared:
    """Past queries and responses of all users, a sample of them where there are many."""
    if not requests:
        return Shared()
    pool = [
        [request.split.user_id, example.query, example.response]
        for request in requests
        for example in request.split.train
    ]
    most, rng = requests[0].methods.dpo.pool_size, random.Random(f"{requests[0].seed}/pool")
    kept = sorted(rng.sample(range(len(pool)), min(most, len(pool))))
    return Shared(facts={_POOL: [pool[i] for i in kept]})


def fit(requests: Sequence[FitRequest]) -> list[Personalizer | None]:
    """Take or train the MiLP adapters, and train them on the preferences; without any they stay."""
    from milp_ray.training.preference import PreferenceJob, train_preferences

    if not requests:
        return []
    one = requests[0]
    others = Others.of(one.shared.facts.get(_POOL, []) if one.shared is not None else [])
    adapters = stored_or_trained(requests)
    jobs = {
        i: PreferenceJob(adapter, preference_pairs(request, others), request.seed)
        for i, (request, adapter) in enumerate(zip(requests, adapters, strict=True))
        if adapter is not None
    }
    found = dict(zip(jobs, train_preferences(one.base, list(jobs.values()), _recipe(one)), strict=True))
    return [Answerer(request, adapter=found.get(i)) for i, request in enumerate(requests)]


@dataclass(frozen=True)
class Others:
    """Past responses of all users, by how much their queries are like another."""

    entries: Sequence[Sequence[str]]  # user id, query, response
    rank: Ranking

    @classmethod
    def of(cls, entries: Sequence[Any]) -> Others:
        """Index the queries."""
        return cls(entries, by_bm25([query for _, query, _ in entries]))

    def responses(self, user_id: str, example: Example, count: int) -> list[str]:
        """At most ``count`` different responses of others than ``user_id``, the most similar queries' first.

        None of them is the wanted one.
        """
        found: dict[str, None] = {}
        for place in self.rank(example.query):
            owner, _, response = self.entries[place]
            if owner != user_id and response.strip() != example.response.strip():
                found[response] = None
            if len(found) == count:
                break
        return list(found)


def preference_pairs(request: FitRequest, others: Others) -> tuple[Pair, ...]:
    """The user's past responses, each against what they turned down, or others' responses."""
    from milp_ray.training.data import instruction_set
    from milp_ray.training.preference import Pair

    base, count = request.base, request.methods.dpo.rejected_per_example
    chosen, rejected = [], []
    for example in request.split.train:
        given = [example.rejected] if example.rejected is not None else []
        for response in given or others.responses(request.split.user_id, example, count):
            chosen.append(example)
            rejected.append(replace(example, response=response))
    both = [
        instruction_set(some, base, request.prompt, max_length=base.context_length)
        for some in (chosen, rejected)
    ]
    return tuple(Pair(one, other) for one, other in zip(*both, strict=True))


def _recipe(request: FitRequest) -> PreferenceRecipe:
    from milp_ray.training.preference import PreferenceRecipe
    from milp_ray.training.small_module import Schedule

    section, training = request.methods.dpo, request.training
    rate, option = section.learning_rate, "methods.dpo.learning_rate"
    schedule = Schedule(
        rate if rate is not None else 0.1 * training.learning_rate,
        training.weight_decay,
        training.warmup_ratio,
        training.max_grad_norm,
    )
    return PreferenceRecipe(section.beta, section.epochs, section.batch_size, schedule, option)
