"""All users of PLUM's experiment under one way of answering and one seed: fitted, asked and kept."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import plum_questions
from plum_questions import (
    AGES,
    CONVERSATION,
    NO,
    PROMPT,
    YES,
    Probe,
    Row,
    age_name,
    open_examples,
    probes,
    users,
)
from result_files import write_text

from milp_ray.config.base import BaseSection
from milp_ray.config.methods import MethodsSection, PlumSection, RetrievalSection
from milp_ray.config.training import LoraAlphaSection, TrainingSection
from milp_ray.evaluation.ability import embedded_texts, token_sequences
from milp_ray.evaluation.metrics import fact_accuracy
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.methods import plum
from milp_ray.methods.plum import train_adapters
from milp_ray.methods.protocol import FitRequest, no_context, training_side
from milp_ray.methods.retrieval import retrieved
from milp_ray.training.base import EMBEDDED, EMBEDDED_BASE, load_base
from milp_ray.training.generation import Questions, generate
from milp_ray.training.response_loss import Wanted, losses_under, response_losses
from milp_ray.training.text import query_prompt
from milp_ray.users.records import Example, UserSplit

if TYPE_CHECKING:
    from milp_ray.methods.protocol import ContextRule
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.base import Base

PLUM = PlumSection(
    yes=YES,
    no=NO,
    conversation=CONVERSATION,
    questions_per_statement=6,
    epochs=5,
    question_weight=0.0,
    own_texts=4,
)
# Besides the paper's way, by which the data of a conversation is discarded after it.
WITH_EARLIER = PLUM.model_copy(update={"earlier_pairs": 256, "epochs": 2, "own_texts": 20})
TRAINED = {
    "plum_earlier": WITH_EARLIER,
    "plum": PLUM,
    "plum_no_negatives": PLUM.model_copy(update={"negatives": False}),
}
WAYS = ("nothing", "bm25", "plum", "plum_earlier", "plum_no_negatives")
RECIPE = TrainingSection(
    learning_rate=1e-3, batch_size=16, lora_alpha=LoraAlphaSection(rule="sqrt", value=8.0)
)
LAYOUT = CanonicalLayout((True,) * 8, 32)
KEPT = Path("runs/plum_100_conversations")
K = 2  # turns that BM25 puts before a question
MOST_NEW_TOKENS = 24
# What a row depends on and no setting says.
CODE = sorted([Path(__file__), Path(plum_questions.__file__), *Path(plum.__file__).parent.glob("*.py")])


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    n_users: int
    n_turns: int
    n_documents: int


FULL = Size(3, 200, 64)
QUICK = Size(1, 8, 4)


@dataclass(frozen=True)
class Unit:
    """All users under one way of answering and one seed: what a process does at a time."""

    way: str
    seed: int
    size: Size
    user_seed: int
    base: str

    @property
    def plum(self) -> PlumSection:
        """The settings of its training."""
        section = TRAINED.get(self.way, PLUM)
        if self.size.n_turns == FULL.n_turns:
            return section
        return section.model_copy(update={"own_texts": 0})  # to write them takes longer than all else

    @property
    def path(self) -> Path:
        """Where it is kept; another setting is another file."""
        settings = [self.plum, RECIPE, PROMPT]
        given = [self.size, self.user_seed, _hash(_weights(self.base)), LAYOUT, K, MOST_NEW_TOKENS]
        setting = [*given, *(section.model_dump() for section in settings), *map(_hash, CODE)]
        digest = hashlib.sha256(repr(setting).encode()).hexdigest()[:12]
        return KEPT / f"{self.way}-{self.seed}-{digest}.json"


def _weights(base: str) -> Path | str:
    folder = Path(EMBEDDED_BASE if base == EMBEDDED else base) / "model.safetensors"
    return folder if folder.is_file() else base


def _hash(data: Path | str) -> str:
    return hashlib.sha256(data.read_bytes() if isinstance(data, Path) else data.encode()).hexdigest()


@dataclass(frozen=True)
class Way:
    """A way of answering one user."""

    adapter: Adapter | None = None
    context: ContextRule = no_context


def measure(base: Base, split: UserSplit, way: Way, seed: int) -> Row:
    """Accuracies in per cent; NaN where nothing of that kind was asked."""
    asked = probes(split, seed)
    right = [answer == one.is_said for one, answer in zip(asked, says_yes(base, way, asked), strict=True)]
    pairs = list(zip(asked, right, strict=True))
    row = {
        "yes": _percent([ok for one, ok in pairs if one.is_said]),
        "no": _percent([ok for one, ok in pairs if not one.is_said]),
        "both": _percent(right),
        "open": _open_accuracy(base, split, way),
    }
    for low, high in AGES:
        row[age_name(low, high)] = _percent([ok for one, ok in pairs if low <= one.age <= high])
    return row


def says_yes(base: Base, way: Way, asked: Sequence[Probe]) -> list[bool]:
    """Whether the answer yes is likelier than the answer no, for each question."""
    contexts = [way.context(one.question, MOST_NEW_TOKENS) for one in asked]
    wanted = [
        Wanted([Example(one.question, answer) for one in asked], contexts, way.adapter)
        for answer in (YES, NO)
    ]
    yes, no = response_losses(base, wanted, PROMPT)
    return [a < b for (a, _), (b, _) in zip(yes, no, strict=True)]


def _open_accuracy(base: Base, split: UserSplit, way: Way) -> float:
    examples = open_examples(split)
    prompts = [query_prompt(one.query, PROMPT, way.context(one.query, MOST_NEW_TOKENS)) for one in examples]
    asked = [Questions(prompts, way.adapter)]
    [answers] = generate(base, asked, max_new_tokens=MOST_NEW_TOKENS, batch_size=48)
    return _percent(
        [bool(fact_accuracy(text, one.answer)) for text, one in zip(answers, examples, strict=True)]
    )


def perplexities(base: Base, adapters: Sequence[Adapter | None], n_documents: int) -> list[float]:
    """Perplexity a token on documents about nobody, which no training has read, under each adapter."""
    documents = token_sequences(embedded_texts(n_documents, PROMPT), base)
    losses = losses_under(base, adapters, [documents] * len(adapters))
    return [math.exp(sum(nll for nll, _ in own) / sum(n for _, n in own)) for own in losses]


def _percent(right: Sequence[bool]) -> float:
    return 100.0 * fmean(right) if right else math.nan


def request_of(base: Base, split: UserSplit, seed: int, plum: PlumSection) -> FitRequest:
    """What a method is told of a user."""
    methods = MethodsSection(plum=plum, retrieval=RetrievalSection(k=K))
    return FitRequest(
        base, training_side(split), LAYOUT, RECIPE, PROMPT, MOST_NEW_TOKENS, 48, seed, methods=methods
    )


def do(unit: Unit) -> None:
    """Fit, ask, and keep each user's row."""
    base = load_base(BaseSection(model=unit.base, device="cpu"))
    splits = users(unit.user_seed, unit.size.n_users, unit.size.n_turns)
    requests = [request_of(base, split, unit.seed, unit.plum) for split in splits]
    ways = [Way() for _ in splits]
    if unit.way == "bm25":
        ways = [Way(context=retrieved(request, "bm25")) for request in requests]
    elif unit.way in TRAINED:
        ways = [Way(adapter) for adapter in train_adapters(requests)]
    before, *after = perplexities(base, [None, *(way.adapter for way in ways)], unit.size.n_documents)
    rows = [
        {**measure(base, split, way, unit.seed), "perplexity": 100.0 * (own / before - 1.0)}
        for split, way, own in zip(splits, ways, after, strict=True)
    ]
    write_text(unit.path, json.dumps(rows))
