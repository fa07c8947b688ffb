"""Users on their way into a batch: who is to be trained, and what becomes of the others.

Whatever is looked at here is held only until a worker takes it. Of everybody else a hash is kept, by which a
user id that comes twice is known.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from milp_ray.errors import MilpError
from milp_ray.personalize.layouts.tally import layout_counts
from milp_ray.personalize.recipe import Made, Maker, Recipe
from milp_ray.personalize.store import AdapterStore, Manifest
from milp_ray.personalize.tally import Tally
from milp_ray.personalize.worker import safe_reason
from milp_ray.users.problems import CONSENT_WITHDRAWN, Problem
from milp_ray.users.records import UserSplit
from milp_ray.users.seen import SeenIds

# Users whose adapters are looked up in the store at the same time: it may be far away, and hashing their
# files lets other threads run.
_LOOK_UPS = 8


@dataclass(frozen=True, slots=True)
class Item:
    """One user on the way to a worker."""

    split: UserSplit
    made: Made
    parts: frozenset[str]

    @property
    def fingerprint(self) -> str:
        """Hash of all that the adapter is made from."""
        return self.made.fingerprint

    @property
    def size(self) -> int:
        """Characters to train on: longer users are begun first."""
        return n_characters(self.split)


class Intake:
    """Takes users one by one and lets through those that are to be trained.

    Args:
        store: where finished users' adapters are.
        recipe: what adapters are made from.
        tally: is told about the users that are not let through.
        max_characters: most that a user may have to train on; ``None``: any number.
    """

    def __init__(
        self, store: AdapterStore, recipe: Recipe, tally: Tally, *, max_characters: int | None = None
    ) -> None:
        self._store = store
        self._recipe = recipe
        self._tally = tally
        self._max_characters = max_characters
        self._seen = SeenIds()
        self._withdrawn = SeenIds()
        self.revoked: list[str] = []  # whose consent was withdrawn in a record after one that was let through

    def items(self, users: Iterable[UserSplit | Problem]) -> Iterator[Item]:
        """The users that have no sound adapter of this recipe and of their data, in the order given."""
        maker = Maker(self._recipe)
        items = (item for user in users if (item := self._admitted(user, maker)) is not None)
        with ThreadPoolExecutor(_LOOK_UPS, thread_name_prefix="store") as threads:
            waiting: deque[tuple[Item, Future[Manifest | None]]] = deque()
            while True:
                for item in itertools.islice(items, _LOOK_UPS - len(waiting)):
                    found = threads.submit(self._store.find, item.split.user_id, item.fingerprint)
                    waiting.append((item, found))
                if not waiting:
                    return
                item, found = waiting.popleft()
                manifest = found.result()
                if manifest is not None:
                    self._tally.skipped(layout_counts(item.made.decision, manifest))
                else:
                    yield item

    def _admitted(self, user: UserSplit | Problem, maker: Maker) -> Item | None:
        if isinstance(user, Problem):
            self._refuse(user)
            return None
        user_id = user.user_id
        if user_id in self._withdrawn:
            self._tally.withdrawn()
            return None
        if not self._seen.add(user_id):
            self._tally.failed(user_id, "DuplicateUser", "the user id occurs more than once")
            return None
        try:
            parts = self._recipe.parts(user)
            if not parts:
                raise MilpError(_nothing_to_train(user))
            most, size = self._max_characters, n_characters(user)
            if most is not None and size > most:
                raise MilpError(
                    f"the user has {size:,} characters to train on, and personalize.max_characters is "
                    f"{most:,}; shorten the history, or raise that"
                )
            return Item(user, maker.of(user), parts)
        except MilpError as error:
            self._tally.failed(user_id, "NoData" if not parts else "TooLong", str(error))
        except Exception as error:
            # A text that is none, from a caller that made the splits itself: this user's failure alone.
            self._tally.failed(user_id, type(error).__name__, safe_reason(error))
        return None

    def _refuse(self, problem: Problem) -> None:
        if problem.reason != CONSENT_WITHDRAWN or problem.user_id is None:
            place = f"{problem.path}:{problem.line}"
            self._tally.failed(problem.user_id, "RecordRefused", problem.reason, place=place)
            return
        self._tally.withdrawn()
        if self._withdrawn.add(problem.user_id) and problem.user_id in self._seen:
            self.revoked.append(problem.user_id)


def n_characters(split: UserSplit) -> int:
    """Characters that training sees."""
    turns = sum(len(turn.text) for turn in split.history)
    return turns + sum(len(example.query) + len(example.response) for example in split.train)


def _nothing_to_train(split: UserSplit) -> str:
    if not split.history and not split.train:
        return "the user has neither a history nor training examples: there is nothing to train on"
    return (
        f"the user has {len(split.history)} turns and {len(split.train)} training examples, but the epochs "
        "of the parts that they are for are 0; raise training.memory_epochs or training.instruction_epochs"
    )
