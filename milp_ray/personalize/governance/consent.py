"""Who may be trained and served: one gate, asked by whatever reads users and whatever answers.

Consent is what the latest of these said: the users' file (``"consent": true | false``), or ``milp-ray
consent``. A withdrawal by the command stands until the command takes it back, as a file may be stale; one
by the file is taken back by the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from milp_ray.errors import MilpError
from milp_ray.personalize.governance.items import user_without_items, without_items
from milp_ray.personalize.governance.record import Record
from milp_ray.personalize.store.names import shown
from milp_ray.users.problems import CONSENT_WITHDRAWN, Problem

if TYPE_CHECKING:
    from milp_ray.personalize.store import AdapterStore
    from milp_ray.users.records import User, UserSplit

Refusal = Literal["forgotten", "consent withdrawn", "no consent"]
_FROM_FILE = "the users' file"


class NoSuchUserError(MilpError):
    """The run knows no such user: never did, or has forgotten."""


class NoConsentError(MilpError):
    """The user has not consented, or does so no longer."""


class Gate:
    """Asks a run's record; ``policy`` is ``users.consent``."""

    def __init__(self, record: Record, policy: Literal["assumed", "required"]) -> None:
        self.record = record
        self.policy = policy
        self.refused: Counter[Refusal] = Counter()

    def refusal(self, user: User) -> Refusal | None:
        """Why the user must not be trained; ``None`` where nothing speaks against it."""
        if self.record.is_forgotten(user.user_id):
            return "forgotten"
        said = self.record.state.consent.get(self.record.user_key(user.user_id))
        if said is not None and said.source == "command":
            return None if said.state == "given" else "consent withdrawn"
        if user.consent is False:
            return "consent withdrawn"
        if user.consent is None and self.policy == "required":
            return "no consent"
        return None

    def admit(self, users: Iterable[User]) -> Iterator[User]:
        """The users that may be trained; the others are counted in :attr:`refused`, by reason."""
        for user in users:
            reason = self.refusal(user)
            if reason is None:
                yield user
            else:
                self.refused[reason] += 1

    def is_about_forgotten(self, problem: Problem) -> bool:
        """Whether a record that cannot be used is a forgotten user's; it is counted in :attr:`refused`."""
        if problem.user_id is None or not self.record.is_forgotten(problem.user_id):
            return False
        self.refused["forgotten"] += 1
        return True

    def trimmed(self, split: UserSplit) -> UserSplit:
        """The split without the items that are forgotten."""
        return without_items(split, self.record)

    def remaining(self, user: User) -> User:
        """The user without the items that are forgotten, for a hash of what is left; splits are trimmed."""
        return user_without_items(user, self.record)

    def is_trimmed(self, user_id: str) -> bool:
        """Whether items of the user are forgotten."""
        return bool(self.record.state.items.get(self.record.user_key(user_id)))

    def check_known(self, user_id: str, where: object) -> None:
        """Refuse a user who was forgotten, in the words for one who never was.

        Raises:
            NoSuchUserError: the user was forgotten.
        """
        if self.record.is_forgotten(user_id):
            raise no_such_user(user_id, where)

    def check_serving(self, user_id: str, where: object) -> None:
        """Refuse to serve a user who was forgotten or has not consented.

        Raises:
            NoSuchUserError, NoConsentError: so it is.
        """
        self.check_known(user_id, where)
        said = self.record.state.consent.get(self.record.user_key(user_id))
        if said is None or said.state == "given":
            return
        if said.state == "withdrawn":
            raise NoConsentError(
                f"user {shown(user_id)} has withdrawn consent (since {said.time[:10]}, said by "
                f"{'`milp-ray consent`' if said.source == 'command' else _FROM_FILE}) and is not served; "
                f"`milp-ray consent {where} ID --give` records new consent, `milp-ray forget` removes what "
                "there is"
            )
        if self.policy == "required":
            raise NoConsentError(
                f"user {shown(user_id)} has not consented, which users.consent: required asks for, and is "
                f'not served; put "consent": true into the users\' file and personalise again, or '
                f"`milp-ray consent {where} ID --give`"
            )

    def note_file(self, users: Iterable[User], problems: Iterable[Problem], store: AdapterStore) -> int:
        """Record what the users' file says of people who have an adapter, so that it is not served.

        Returns:
            How many that have an adapter may not be served.
        """
        n_unserved = 0
        for problem in problems:
            if problem.reason == CONSENT_WITHDRAWN and problem.user_id is not None:
                n_unserved += self._note(problem.user_id, "withdrawn", store)
        for user in users:
            said = self.record.state.consent.get(self.record.user_key(user.user_id))
            if said is not None and said.source == "command":
                n_unserved += said.state == "withdrawn" and bool(store.versions(user.user_id))
            elif user.consent is None and self.policy == "required":
                n_unserved += self._note(user.user_id, "absent", store)
            elif self.record.state.consent:
                self._note_again(user)
        return n_unserved

    def _note(self, user_id: str, state: Literal["withdrawn", "absent"], store: AdapterStore) -> bool:
        if self.record.is_forgotten(user_id):
            return False
        said = self.record.state.consent.get(self.record.user_key(user_id))
        if said is not None and said.source == "command" and (said.state == "withdrawn" or state == "absent"):
            return said.state == "withdrawn"
        if not store.versions(user_id):
            return False
        if said is None or said.state != state or said.source == "command":
            self.record.ensure_key()
            user = self.record.user_key(user_id)
            self.record.append("consent", user, _FROM_FILE, state=state, source="file")
        return True

    def _note_again(self, user: User) -> None:
        """Take back what the file said before and says no longer."""
        key = self.record.user_key(user.user_id)
        said = self.record.state.consent.get(key)
        if said is not None and said.source == "file" and said.state != "given":
            self.record.append("consent", key, _FROM_FILE, state="given", source="file")


def record_consent(record: Record, user_id: str, state: Literal["given", "withdrawn"], by: str) -> bool:
    """Write down what a person said; whether anything changed. The caller holds the run.

    Raises:
        NoSuchUserError: the user was forgotten.
    """
    if record.is_forgotten(user_id):
        raise NoSuchUserError(
            f"there is no user {shown(user_id)} in this run, and none of that id is taken in again: a user "
            "of that id was forgotten. Someone who comes back is given another id, or another run"
        )
    record.ensure_key()
    user = record.user_key(user_id)
    said = record.state.consent.get(user)
    if said is not None and (said.state, said.source) == (state, "command"):
        return False
    record.append("consent", user, by, state=state, source="command")
    return True


def no_such_user(user_id: str, where: object) -> NoSuchUserError:
    """The error of asking for someone that a run does not know."""
    return NoSuchUserError(
        f"there is no user {shown(user_id)} in {where}: it holds no adapter of such a user. `milp-ray store "
        "ls` lists those it has; `milp-ray personalize` makes them for the users of its configuration"
    )
