"""What every reader of a published dataset has to keep to, and a way to read small samples of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from milp_ray.config.users import SplitSection, UsersSection
from milp_ray.users.readers import LoadedUsers, read_users
from milp_ray.users.splits import check_no_leak, normalised, split_user

SECRET = "my secret illness"  # stands in broken records, and in no message


def load(format_name: Any, *paths: Path) -> LoadedUsers:
    """Users of some files, after :func:`keeps_rules`."""
    loaded = read_users(UsersSection(format=format_name, paths=paths), seed=0)
    keeps_rules(loaded)
    return loaded


def keeps_rules(loaded: LoadedUsers) -> None:
    """Assert time order, no reply in a history, no leak under two splits, and no text in a reason."""
    assert loaded.users
    for user in loaded.users:
        times = [turn.time for turn in user.history if turn.time is not None]
        assert times == sorted(times)
        responses = {normalised(example.response) for example in user.examples}
        assert not [turn for turn in user.history if normalised(turn.text) in responses]
        for section in (SplitSection(), SplitSection(train=0.0, validation=0.0)):
            check_no_leak(split_user(user, section))
    assert not [problem for problem in loaded.problems if SECRET in str(problem)]


def history(loaded: LoadedUsers, user_id: str) -> list[str]:
    """Texts of one user's turns."""
    [user] = [user for user in loaded.users if user.user_id == user_id]
    return [turn.text for turn in user.history]


def pairs(loaded: LoadedUsers, user_id: str) -> list[tuple[str, str]]:
    """Query and response of one user's examples."""
    [user] = [user for user in loaded.users if user.user_id == user_id]
    return [(example.query, example.response) for example in user.examples]


def reasons(loaded: LoadedUsers) -> dict[int, str]:
    """Place and reason of every problem."""
    return {problem.line: problem.reason for problem in loaded.problems}
