"""The attributes and rules of PersonaWorld, read from ``world.yaml`` beside this module."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True, slots=True)
class Rule:
    """What follows from a value: ``choices[i]`` belongs to ``values[i]`` of the attribute."""

    name: str
    cores: tuple[str, ...]
    choices: tuple[str, ...]
    fact_first: tuple[str, ...]
    choice_first: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Attribute:
    """One kind of fact, how users speak of it, how it is asked for, and what follows from it."""

    name: str
    values: tuple[str, ...]
    article: bool  # whether {a} puts "a" or "an" before the value
    profile: tuple[str, ...]
    statements: tuple[str, ...]
    others: tuple[str, ...]  # the same of somebody else
    updates: tuple[str, ...]  # that the value changed
    cores: tuple[str, ...]  # indirect questions for the value
    answers: tuple[str, ...]
    rules: tuple[Rule, Rule]

    def with_article(self, value: str) -> str:
        """The value as it stands after a verb: "an ibis" where values take an article, else as it is."""
        if not self.article:
            return value
        return f"{'an' if value[0] in 'aeiou' else 'a'} {value}"


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


def _load() -> tuple[Attribute, ...]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # several times as fast, where libyaml is there
    entries = yaml.load(Path(__file__).with_name("world.yaml").read_text(encoding="utf-8"), Loader=loader)
    return tuple(
        Attribute(**_tuples({**entry, "rules": [Rule(**_tuples(rule)) for rule in entry["rules"]]}))
        for entry in entries
    )


ATTRIBUTES = _load()
BY_NAME: dict[str, Attribute] = {attribute.name: attribute for attribute in ATTRIBUTES}
