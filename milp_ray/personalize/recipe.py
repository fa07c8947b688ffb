"""What an adapter is made from, and the fingerprint by which a rerun knows that nothing of it has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.data import EMBEDDED_BASE
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.layouts.rule import FOR_ALL, Candidate, Decision, LayoutRule
from milp_ray.users.records import Example, UserSplit

if TYPE_CHECKING:
    from milp_ray.config.base import BaseSection
    from milp_ray.config.prompt import PromptSection
    from milp_ray.config.training import TrainingSection

FINGERPRINT_FORMAT = 1  # raised when training changes so that the same recipe gives other adapters

_WHOLE_FILE_BYTES = 16 << 20  # files up to this size are hashed whole, larger ones by samples
_SAMPLE_BYTES = 64 << 10
_N_SAMPLES = 64


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything but the user's own data that decides about the bits of an adapter.

    ``layout`` is the one that was chosen for all; ``rule`` decides on each user's, where it need not be that.
    """

    layout: CanonicalLayout
    base: BaseSection
    training: TrainingSection
    prompt: PromptSection
    seed: int
    rule: LayoutRule | None = None

    def digest(self, decision: Decision | None = None) -> str:
        """Hash of the recipe, the base's files included, for the users of a decision.

        A layout gives the same hash whichever way it was decided on, so that changing the mode makes only
        those adapters again that have another layout now. A race, whose winner is not known before, has a
        hash of its own.
        """
        layout = self.layout if decision is None else decision.candidates[0].layout
        made_from: dict[str, Any] = {
            "format": FINGERPRINT_FORMAT,
            "layout": layout.to_dict(),
            "base": base_identity(self.base),
            "training": self.training.model_dump(mode="json", exclude={"pack_size"}),
            "prompt": self.prompt.model_dump(mode="json"),
            "seed": self.seed,
        }
        if decision is not None and decision.is_race:
            entered = [layout.to_dict() for layout in decision.layouts]
            made_from["race"] = {"layouts": entered, "reduction": decision.reduction}
        return _hash(made_from)

    @property
    def n_candidates(self) -> int:
        """Most layouts that a user is trained under."""
        if self.rule is None or self.rule.mode != "race":
            return 1
        return 1 + len(self.rule.others)

    def decide(self, split: UserSplit) -> Decision:
        """Which layout a user is trained under, or which ones race for it."""
        if self.rule is None:
            own = Candidate(self.layout, 0)  # nobody asks for its size where there is no other
            return Decision((own,), own, "chosen", FOR_ALL)
        return self.rule.decide(split)

    def seed_of(self, user_id: str) -> int:
        """The user's own seed: the same whatever the other users, the workers and the order."""
        return int(_hash([self.seed, user_id])[:8], 16) >> 1

    def parts(self, split: UserSplit) -> frozenset[str]:
        """The parts of training that the user has data for; empty where nothing can be trained."""
        training = self.training
        if training.stages == "joint":
            epochs = max(training.memory_epochs, training.instruction_epochs)
            memory_epochs = instruction_epochs = epochs
        else:
            memory_epochs, instruction_epochs = training.memory_epochs, training.instruction_epochs
        parts = set()
        if split.history and memory_epochs:
            parts.add("memory")
        if split.train and instruction_epochs:
            parts.add("instruction")
        return frozenset(parts)


@dataclass(frozen=True, slots=True)
class Made:
    """What a user's adapter is made from: the decision, the recipe's digest for it, and the fingerprint."""

    decision: Decision
    digest: str
    fingerprint: str


class Maker:
    """Says of user after user what their adapter is made from; the base is hashed once a layout."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._digests: dict[tuple[CanonicalLayout, ...], str] = {}

    def of(self, split: UserSplit) -> Made:
        """What is to be made for a user; pure in the user's data and the recipe."""
        decision = self._recipe.decide(split)
        digest = self._digests.get(decision.layouts)
        if digest is None:
            digest = self._digests[decision.layouts] = self._recipe.digest(decision)
        return Made(decision, digest, fingerprint(digest, split))


def fingerprint(recipe_digest: str, split: UserSplit) -> str:
    """Hash of a recipe and of the user's data that training sees; the test examples are not among it."""
    data = {
        "history": [[turn.role, turn.text] for turn in split.history],
        "train": _pairs(split.train),
        "validation": _pairs(split.validation),  # decides when training stops early
    }
    return _hash([recipe_digest, data])


def base_identity(section: BaseSection) -> dict[str, Any]:
    """What tells one base from another: an id and revision, or the content of the folder's files.

    A folder's path says nothing (it may be mounted elsewhere, or hold retrained weights tomorrow). Large
    weight files are told apart by their size and evenly spread samples of them.
    """
    options = {
        "dtype": section.dtype,
        "context_length": section.context_length,
        "ffn_modules": section.ffn_modules,
    }
    folder = EMBEDDED_BASE if section.model == "embedded" else Path(section.model).expanduser()
    if not folder.is_dir():
        return {"model": section.model, "revision": section.revision, **options}
    names = sorted(p for p in folder.iterdir() if p.suffix in {".json", ".safetensors", ".model", ".txt"})
    return {"files": {path.name: [path.stat().st_size, _sample_hash(path)] for path in names}, **options}


def _pairs(examples: Iterable[Example]) -> list[list[str]]:
    return [[example.query, example.response] for example in examples]


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def _sample_hash(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE_FILE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        for index in range(_N_SAMPLES):
            file.seek(index * (size - _SAMPLE_BYTES) // (_N_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()
