"""What an update does for one user: nothing, continue the adapter, or make one from the beginning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any

from milp_ray.personalize.layouts.race import CHOICE
from milp_ray.personalize.provenance import News, Provenance

if TYPE_CHECKING:
    from milp_ray.config.training import TrainingSection
    from milp_ray.config.update import UpdateSection
    from milp_ray.personalize.store import Manifest
    from milp_ray.users.records import UserSplit


@dataclass(frozen=True, slots=True)
class Anew:
    """Train on everything, from fresh weights, for ``reason``."""

    reason: str


@dataclass(frozen=True, slots=True)
class Continue:
    """Train the weights of ``version`` on what is new; ``layout_choice`` is what it says of its layout."""

    version: int
    news: News
    layout_choice: Mapping[str, Any] = field(default_factory=dict)


def plan_of(split: UserSplit, manifest: Manifest, recipe_digest: str) -> Anew | Continue:
    """What is to be done about a user whose data or recipe is not that of the stored version."""
    made_from = Provenance.from_meta(manifest.meta)
    if made_from is None:
        return Anew("the stored version does not say what it was made from")
    if made_from.recipe != recipe_digest:
        return Anew("the stored version was made by another recipe (layout, base, training, prompts or seed)")
    news = made_from.news(split)
    if news.n_gone:
        return Anew("earlier turns or examples were edited, removed, or are held out now")
    return Continue(manifest.version, news, {k: v for k, v in manifest.meta.items() if k == CHOICE})


def update_training(training: TrainingSection, section: UpdateSection) -> TrainingSection:
    """The recipe of an update: that of all adapters, with what ``update`` says otherwise."""
    own = {name: getattr(section, name) for name in ("memory_epochs", "instruction_epochs", "learning_rate")}
    return training.model_copy(update={name: value for name, value in own.items() if value is not None})


def training_data(split: UserSplit, news: News, section: UpdateSection, seed: int) -> UserSplit:
    """What an update trains on: what is new, and before it a sample of what was before.

    The sample is drawn from earlier turns and examples alike, as large as ``replay_share`` of the whole
    wants it, or all there are; ``seed`` alone decides. It stands in its own order in time.
    """
    old: list[tuple[str, int]] = []
    if section.data == "replay":
        old = [("turn", i) for i in range(len(news.earlier_turns))]
        old += [("example", i) for i in range(len(news.earlier_examples))]
        wanted = round(news.n_new * section.replay_share / (1.0 - section.replay_share))
        old = sorted(Random(f"replay {seed}").sample(old, min(wanted, len(old))))
    turns = [news.earlier_turns[i] for kind, i in old if kind == "turn"]
    examples = [news.earlier_examples[i] for kind, i in old if kind == "example"]
    return replace(split, history=(*turns, *news.new_turns), train=(*examples, *news.new_examples))
