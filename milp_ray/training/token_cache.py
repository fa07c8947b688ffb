"""Users' texts as tokens, kept for the jobs that follow each other over the same user."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.training.data import Sequence, instruction_set, memory_set
from milp_ray.users.records import UserSplit

if TYPE_CHECKING:
    from milp_ray.training.base import Base

_MOST_USERS = 64  # a search's probe users come again in every trial, a user's ablations one after the other


@dataclass(frozen=True)
class UserTokens:
    """One user's sequences, of every kind; the split is held so that no other one can take its identity."""

    split: UserSplit
    memory: tuple[Sequence, ...]
    instruction: tuple[Sequence, ...]
    validation: tuple[Sequence, ...]


class TokenCache:
    """The users that were tokenised last: jobs of one user follow each other, under many layouts."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[object, ...], UserTokens] = OrderedDict()

    def of(self, split: UserSplit, base: Base, section: TrainingSection, prompt: PromptSection) -> UserTokens:
        """A user's sequences."""
        limit, turns = _max_length(section, base), section.memory_block_turns
        key = (id(split), prompt, limit, turns)
        found = self._kept.get(key)
        if found is None:
            found = UserTokens(
                split=split,
                memory=tuple(memory_set(split, base, prompt, max_length=limit, block_turns=turns)),
                instruction=tuple(instruction_set(split.train, base, prompt, max_length=limit)),
                validation=tuple(
                    instruction_set(split.validation, base, prompt, max_length=base.context_length)
                ),
            )
            self._kept[key] = found
            if len(self._kept) > _MOST_USERS:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        return found


def _max_length(section: TrainingSection, base: Base) -> int:
    if section.max_length is not None and section.max_length > base.context_length:
        raise MilpError(
            f"training.max_length {section.max_length} is above the base's context of {base.context_length} "
            f"tokens; use at most {base.context_length}, or null for all of it"
        )
    return section.max_length or base.context_length
