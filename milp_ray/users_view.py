"""``milp-ray users``: embedded users to look at, and what was found in one's own files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from milp_ray.config import Config
    from milp_ray.users.records import User
    from milp_ray.users.statistics import DatasetStatistics, Spread

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
    from milp_ray.errors import MilpError
    from milp_ray.pipeline.probes import probe_users
    from milp_ray.users.readers import read_users
    from milp_ray.users.splits import check_no_leak, split_user

    loaded = read_users(config.users, config.seed)
    console = Console(highlight=False, emoji=False)
    kinds: Counter[str] = Counter()
    sizes = Counter[str]()
    splits = [split_user(user, config.users.split) for user in loaded.users]
    for user, split in zip(loaded.users, splits, strict=True):
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
    try:
        probe_users(splits, config.search.n_probe_users, config.seed)
    except MilpError as error:
        console.print(f"[yellow]a search cannot begin:[/] {escape(str(error))}", soft_wrap=True)
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


def print_statistics(config: Config, *, in_tokens: bool, as_json: bool) -> None:
    """Print what a paper's first table tells of a dataset; as one line of JSON, or as a table.

    Args:
        config: whose users and split are meant.
        in_tokens: count lengths in the base's tokens as well, which loads its tokenizer.
        as_json: for programs.

    Raises:
        MilpError: the files cannot be read or hold no user, or the tokenizer cannot be had.
    """
    from milp_ray.users.readers import read_users
    from milp_ray.users.splits import split_user
    from milp_ray.users.statistics import count_words, dataset_statistics

    units = {"words": count_words}
    if in_tokens:
        from milp_ray.training.base import load_tokenizer
        from milp_ray.training.workload import TokenizerTokens

        units["tokens"] = TokenizerTokens(load_tokenizer(config.base)).count_tokens
    loaded = read_users(config.users, config.seed)
    found = dataset_statistics((split_user(user, config.users.split) for user in loaded.users), units)
    if as_json:
        facts = {"format": config.users.format, "n_problems": len(loaded.problems), **asdict(found)}
        print(json.dumps(facts, ensure_ascii=True, allow_nan=False))
        return
    console = Console(highlight=False, emoji=False)
    console.print(_statistics_table(config.users.format, found))
    kinds = ", ".join(f"{escape(kind)} {n:,}" for kind, n in found.kinds.items()) or "none"
    console.print(f"kinds of examples: {kinds}")
    if loaded.problems:
        console.print(f"{len(loaded.problems):,} records are kept out: milp-ray users check says why")


def _statistics_table(format_name: str, found: DatasetStatistics) -> Table:
    table = Table(title=f"Dataset: {format_name}", title_justify="left", box=None)
    table.add_column("", style="bold", no_wrap=True)
    for name in ("total", "mean", "median", "smallest", "largest"):
        table.add_column(name, justify="right", no_wrap=True)
    totals = {
        "users": found.n_users,
        "  with a profile": found.n_profiles,
        "  without a test example": found.n_untested,
        "training examples": found.n_train,
        "validation examples": found.n_validation,
        "test examples": found.n_test,
    }
    for name, total in totals.items():
        table.add_row(name, f"{total:,}")
    spreads: dict[str, Spread] = {
        "examples a user": found.examples_a_user,
        "history turns a user": found.turns_a_user,
    }
    for unit, lengths in found.lengths.items():
        spreads |= {
            f"{unit} of history a user": lengths.history,
            f"{unit} a turn": lengths.turn,
            f"{unit} a query": lengths.query,
            f"{unit} a response": lengths.response,
        }
    for name, spread in spreads.items():
        ends = (f"{spread.median:,g}", f"{spread.smallest:,}", f"{spread.largest:,}")
        table.add_row(name, "", f"{spread.mean:,.2f}", *ends)
    return table
