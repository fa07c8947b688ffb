"""How a user's history is cut into conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from milp_ray.config.methods import ConversationSection
    from milp_ray.users.records import Turn


@dataclass(frozen=True, slots=True)
class Conversation:
    """Consecutive turns of one user; ``number`` counts from 0, the oldest."""

    number: int
    turns: tuple[Turn, ...]


def conversations(history: Sequence[Turn], section: ConversationSection) -> list[Conversation]:
    """Cut a history in time order where ``section.cut_by`` says; every turn is in one conversation.

    By day and by gap a turn without a time belongs with the one before it, and so does one after it.
    """
    found: list[list[Turn]] = []
    for turn in history:
        if not found or _begins(turn, found[-1], section):
            found.append([])
        found[-1].append(turn)
    return [Conversation(number, tuple(turns)) for number, turns in enumerate(found)]


def _begins(turn: Turn, current: Sequence[Turn], section: ConversationSection) -> bool:
    """Whether a turn opens a new conversation after those of the current one."""
    if section.cut_by == "turns":
        return len(current) >= section.turns
    before, now = current[-1].time, turn.time
    if before is None or now is None:
        return False
    if section.cut_by == "day":
        return now.date() != before.date()
    return now - before > timedelta(hours=section.gap_hours)
