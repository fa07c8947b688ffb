"""Text prompt (TpLP in the MiLP paper, Zhang et al. 2024): the user's history stands before the query.

The most recent turns are taken, whole turns only and in time order, as many as fit the base's context beside
the query and the tokens of the answer. The paper prompts a large model with the dialogue history; here the
same frozen base answers that carries the adapters, so that the comparison is between where the memory is
kept and not between models. There is no retrieval: a turn is chosen by its age alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milp_ray.methods.protocol import Answerer, fits, most_that_fits, text_bytes
from milp_ray.training.text import history_context, query_prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milp_ray.config.prompt import PromptSection
    from milp_ray.methods.protocol import ContextRule, FitRequest, Personalizer
    from milp_ray.training.base import Base
    from milp_ray.users.records import Turn, UserSplit


def fit(requests: Sequence[FitRequest]) -> list[Personalizer | None]:
    """Nothing to train; the history is cut for each query by itself."""
    return [
        Answerer(request, context=_context_rule(request), context_bytes=text_bytes(request.split.history))
        for request in requests
    ]


def _context_rule(request: FitRequest) -> ContextRule:
    base, prompt, history = request.base, request.prompt, request.split.history

    def context(query: str, reserve: int) -> str:
        return history_context(recent_turns(history, query, base, prompt, reserve=reserve), prompt)

    return context


def recent_turns(
    history: Sequence[Turn], query: str, base: Base, prompt: PromptSection, *, reserve: int
) -> tuple[Turn, ...]:
    """The most recent turns that fit before ``query`` with ``reserve`` tokens left for the answer.

    In time order, possibly none: a turn is taken whole or not at all, and none is left out between two that
    are taken.
    """

    def render(newest_first: Sequence[Turn]) -> str:
        return query_prompt(query, prompt, history_context(list(reversed(newest_first)), prompt))

    newest_first = tuple(reversed(history))
    count = most_that_fits(newest_first, render, lambda text: fits(base, text, reserve))
    return tuple(history[len(history) - count :])


def history_fits(
    split: UserSplit, queries: Sequence[str], base: Base, prompt: PromptSection, *, reserve: int
) -> bool:
    """Whether the whole history fits the context before each of the queries."""
    document = history_context(split.history, prompt)
    return all(fits(base, query_prompt(query, prompt, document), reserve) for query in queries)
