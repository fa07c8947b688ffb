"""The users of the benchmarks, who are the same in each."""

from __future__ import annotations

from milp_ray.config.prompt import PromptSection
from milp_ray.config.users import SplitSection
from milp_ray.users.persona_world import generate_users
from milp_ray.users.records import UserSplit
from milp_ray.users.splits import split_user

PROMPT = PromptSection()


def splits(n_users: int, *, long: bool = False) -> list[UserSplit]:
    """Users of PersonaWorld with 50 examples each; ``long`` ones have more history than a context holds."""
    n_short, n_long = (0, n_users) if long else (n_users, 0)
    users = generate_users(n_short=n_short, n_long=n_long, n_examples=50, seed=1)
    return [split_user(user, SplitSection()) for user in users]
