"""Oracle profile: the user's profile stands before the query, as a ceiling.

For embedded users the profile states every current fact, which nobody has of a real user: what this method
reaches is what perfect memory is worth with this base. For real users it is whatever profile they have. A
user without a profile is skipped, and so is not part of this method's means. A profile that does not fit the
context is cut after the last whole sentence that does.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from milp_ray.methods.protocol import Answerer, fits, most_that_fits
from milp_ray.training.text import profile_context, query_prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milp_ray.methods.protocol import ContextRule, FitRequest, Personalizer

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def fit(requests: Sequence[FitRequest]) -> list[Personalizer | None]:
    """``None`` where a user has no profile."""
    return [
        Answerer(request, context=profile_rule(request, profile), context_bytes=len(profile.encode()))
        if profile
        else None
        for request in requests
        for profile in [(request.split.profile or "").strip()]
    ]


def profile_rule(request: FitRequest, profile: str) -> ContextRule:
    """A profile before every query, cut after the last whole sentence that fits."""
    base, prompt, sentences = request.base, request.prompt, _SENTENCE_END.split(profile)

    def context(query: str, reserve: int) -> str:
        if fits(base, query_prompt(query, prompt, profile_context(profile, prompt)), reserve):
            return profile_context(profile, prompt)

        def render(kept: Sequence[str]) -> str:
            return query_prompt(query, prompt, profile_context(" ".join(kept), prompt))

        count = most_that_fits(sentences, render, lambda text: fits(base, text, reserve))
        return profile_context(" ".join(sentences[:count]), prompt)

    return context
