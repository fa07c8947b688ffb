"""``milp-ray users``: embedded users to look at, and what was found in one's own files."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from milp_ray.config import Config
    from milp_ray.users.records import User

_SHOWN_TURNS = 12
_SHOWN_PROBLEMS = 20


def print_sample(n: int, *, long: bool, seed: int) -> None:
    """Print embedded users as a person reads them. Only invented text is ever shown."""
    from milp_ray.users.persona_world import generate_users

    n_examples = 20
    users = generate_users(0 if long else n, n if long else 0, n_examples, seed)
    console = Console(highlight=False, emoji=False)
    for user in users:
        _print_user(console, user)


def _print_user(console: Console, user: User) -> None:
    console.rule(f"[bold]{escape(user.user_id)}", align="left")
    console.print(f"[bold]profile[/] (only the oracle sees it): {escape(user.profile or '–')}")
    console.print(f"\n[bold]history[/], {len(user.history)} turns:")
    for turn in user.history[:_SHOWN_TURNS]:
        console.print(f"  · {escape(turn.text)}")
    if len(user.history) > _SHOWN_TURNS:
        console.print(f"  … and {len(user.history) - _SHOWN_TURNS} more")
    console.print(f"\n[bold]queries[/], {len(user.examples)}, in time order:")
    for example in user.examples:
        tags = ", ".join(
            value
            for name, value in example.tags.items()
            if name != "attribute" and value not in ("none", "0")
        )
        console.print(f"  [dim]{escape(example.kind)}{escape(f' ({tags})') if tags else ''}[/]")
        console.print(f"    {escape(example.query)}")
        console.print(f"    → {escape(example.response)}")
    console.print()


def print_check(config: Config) -> None:
    """Print counts of a configuration's users and splits, and every record that is kept out (no texts).

    Raises:
        MilpError: the files cannot be read, or hold no user.
    """
    from milp_ray.users.readers import read_users
    from milp_ray.users.splits import check_no_leak, split_user

    loaded = read_users(config.users, config.seed)
    console = Console(highlight=False, emoji=False)
    kinds: Counter[str] = Counter()
    sizes = Counter[str]()
    for user in loaded.users:
        split = split_user(user, config.users.split)
        check_no_leak(split)
        kinds.update(example.kind for example in user.examples)
        sizes.update(
            turns=len(split.history),
            train=len(split.train),
            validation=len(split.validation),
            test=len(split.test),
            untested=not split.test,
            profiles=user.profile is not None,
        )
    console.print(f"{len(loaded.users)} users, {sizes['turns']} turns, {sizes['profiles']} profiles")
    console.print(
        f"examples: {sizes['train']} train, {sizes['validation']} validation, {sizes['test']} test; "
        f"{sizes['untested']} users without a test example"
    )
    console.print(
        "kinds: " + (", ".join(f"{escape(kind)} {n}" for kind, n in sorted(kinds.items())) or "none")
    )
    console.print("nothing of any validation or test example is in a history or in training")
    if loaded.unknown_fields:
        fields = ", ".join(f"{escape(name)} ({n}×)" for name, n in sorted(loaded.unknown_fields.items()))
        console.print(f"[yellow]fields that are not read:[/] {fields}")
    if loaded.problems:
        console.print(f"[yellow]{len(loaded.problems)} records are kept out:[/]")
        for problem in loaded.problems[:_SHOWN_PROBLEMS]:
            console.print(f"  {escape(str(problem))}", soft_wrap=True)
        if len(loaded.problems) > _SHOWN_PROBLEMS:
            console.print(f"  … and {len(loaded.problems) - _SHOWN_PROBLEMS} more")
    console.print(f"data hash: {loaded.dataset_hash}")
