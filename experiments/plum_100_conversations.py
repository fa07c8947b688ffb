"""PLUM at 100 conversations of a user, against retrieval: what is remembered, and what is made up.

    .venv/bin/python experiments/pretrain_yes_no.py                  # the base: forty minutes of one core
    .venv/bin/python experiments/plum_100_conversations.py           # then: three users, three seeds
    .venv/bin/python experiments/plum_100_conversations.py --quick   # under a minute; says nothing

Users of PersonaWorld with 200 turns, cut into 100 conversations of two. All that was said is asked for in
frames that no training has seen, own facts also in wordings that no training has seen, each beside something
related that the user never said. A yes/no question is answered by the likelier of the two answers. Open ones
are PersonaWorld's held-out questions for the users' facts, answered by greedy generation.

The embedded base has never read a question that is answered with yes or no, and with it retrieval does not
leave chance (``--base embedded``). So the base here is one that was taught such questions on other people.
PLUM is trained in the paper's way, the data of a conversation discarded after it, and with pairs of earlier
conversations beside each one's own. The recipe was chosen on the users of ``--development``. General ability
is the perplexity on documents of PersonaWorld about none of these users.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

from milp_ray.config.base import BaseSection
from milp_ray.config.methods import MethodsSection, PlumSection, RetrievalSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import LoraAlphaSection, TrainingSection
from milp_ray.config.users import SplitSection
from milp_ray.evaluation.metrics import fact_accuracy
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.methods.plum import train_adapters, world
from milp_ray.methods.plum.conversations import conversations
from milp_ray.methods.plum.rule import Said, clauses_of
from milp_ray.methods.plum.world import Thing
from milp_ray.methods.protocol import FitRequest, no_context, training_side
from milp_ray.methods.retrieval import retrieved
from milp_ray.training.data import Sequence as TokenSequence
from milp_ray.training.generation import Questions, generate
from milp_ray.training.response_loss import Wanted, losses_under, response_losses
from milp_ray.training.text import history_context, profile_context, query_prompt, response_text
from milp_ray.users.persona_world import generate_users, pretraining_rng
from milp_ray.users.persona_world.attributes import BY_NAME
from milp_ray.users.persona_world.documents import Document, draw_document
from milp_ray.users.records import Example, Turn, UserSplit
from milp_ray.users.splits import split_user

if TYPE_CHECKING:
    from milp_ray.methods.protocol import ContextRule
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.base import Base

PROMPT = PromptSection()
DEVELOPMENT_SEED, TEST_SEED = 82, 83  # of users
HELD_OUT_FRAMES = (
    "Can you say whether I said that {clause}?",
    "I wonder whether I said that {clause}.",
    "Please remind me whether I said that {clause}.",
)
# The tokenizer of the embedded base has no tokens for "Yes" and "No", and its pretraining had no use of them.
YES, NO = "You said so.", "You did not say so."
PLUM = PlumSection(yes=YES, no=NO, questions_per_statement=6, epochs=5, question_weight=0.0, own_texts=4)
# Besides the paper's way, by which the data of a conversation is discarded after it.
WITH_EARLIER = PLUM.model_copy(update={"earlier_pairs": 256, "epochs": 2, "own_texts": 32})
RECIPE = TrainingSection(
    learning_rate=1.5e-3, batch_size=16, lora_alpha=LoraAlphaSection(rule="sqrt", value=8.0)
)
LAYOUT = CanonicalLayout((True,) * 8, 32)
BASE = Path("runs/yes_no_base")  # what pretrain_yes_no.py makes
K = 2  # turns that BM25 puts before a question
MOST_NEW_TOKENS = 24
AGES = ((1, 10), (11, 25), (26, 50), (51, 100))
# Pretraining read some hundred thousand documents, counted from 0.
FIRST_DOCUMENT = 10**9


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    n_users: int
    n_seeds: int
    n_turns: int
    n_documents: int


FULL = Size(3, 3, 200, 64)
QUICK = Size(1, 1, 8, 4)


@dataclass(frozen=True)
class Probe:
    """A yes/no question; ``age``: how many conversations ago the thing, or the one beside it, was said."""

    question: str
    is_said: bool
    age: int


@dataclass(frozen=True)
class Way:
    """A way of answering one user."""

    adapter: Adapter | None = None
    context: ContextRule = no_context


# ---------------------------------------------------------------------------------------------- questions


def users(seed: int, n: int, n_turns: int) -> list[UserSplit]:
    """``n`` users with a history of ``n_turns`` turns."""
    found = [user for user in generate_users(0, 3 * n + 5, 50, seed) if len(user.history) >= n_turns]
    assert len(found) >= n, "too few of PersonaWorld's long users have a history so long"
    cut = [replace(user, history=user.history[:n_turns]) for user in found[:n]]
    return [split_user(user, SplitSection()) for user in cut]


def probes(split: UserSplit, seed: int) -> list[Probe]:
    """A question about everything that was said, and one about something related that never was."""
    rng = Random(f"{seed}/{split.user_id}")
    cut = conversations(split.history, PLUM.conversation)
    said, last = Said(), dict[Thing, int]()
    for conversation in cut:
        for clause in clauses_of(conversation):
            said.add(clause)
            last.update(dict.fromkeys(world.things_of(clause), conversation.number))
    found: list[Probe] = []
    used: set[Thing] = set()
    for thing, number in last.items():
        untold = [other for other in said.untold_beside(thing, rng) if other not in used]
        if untold:
            used.add(untold[0])
            age = len(cut) - number
            found += [_probe(thing, True, age, rng), _probe(untold[0], False, age, rng)]
    return found


def _probe(thing: Thing, is_said: bool, age: int, rng: Random) -> Probe:
    attribute = BY_NAME.get(thing.topic)
    clause = rng.choice(world.wordings(thing))
    if attribute is not None and thing == world.own(thing.topic, thing.value):
        # The last statement of an attribute is held out, and the rule-based teacher never uses it by itself.
        held_out = attribute.statements[-1].format(v=thing.value, a=attribute.with_article(thing.value))
        clause = world.without_opening(held_out).rstrip(".")
    return Probe(rng.choice(HELD_OUT_FRAMES).format(clause=clause), is_said, age)


def open_examples(split: UserSplit) -> list[Example]:
    """Held-out direct questions whose answer the (cut) history tells."""
    value: dict[str, str] = {}
    for conversation in conversations(split.history, PLUM.conversation):
        for clause in clauses_of(conversation):
            for thing in reversed(world.things_of(clause)):  # of a change the present value is the first
                if thing == world.own(thing.topic, thing.value):
                    value[thing.topic] = thing.value
    return [
        example
        for example in split.test
        if example.tags["order"] == "none" and value.get(example.tags["attribute"]) == example.answer
    ]


def request_of(base: Base, split: UserSplit, seed: int, plum: PlumSection) -> FitRequest:
    """What a method is told of a user."""
    methods = MethodsSection(plum=plum, retrieval=RetrievalSection(k=K))
    return FitRequest(
        base, training_side(split), LAYOUT, RECIPE, PROMPT, MOST_NEW_TOKENS, 48, seed, methods=methods
    )


# --------------------------------------------------------------------------------------------- measuring


def measure(base: Base, splits: Sequence[UserSplit], ways: Sequence[Way], seed: int) -> dict[str, float]:
    """Accuracies in per cent, means over users."""
    rows = []
    for split, way in zip(splits, ways, strict=True):
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
            row[f"age {low}-{high}"] = _percent([ok for one, ok in pairs if low <= one.age <= high])
        rows.append(row)
    return {name: _mean([row[name] for row in rows]) for name in rows[0]}


def says_yes(base: Base, way: Way, asked: Sequence[Probe]) -> list[bool]:
    """Whether the answer yes is likelier than the answer no, for each question."""
    contexts = [way.context(one.question, MOST_NEW_TOKENS) for one in asked]
    wanted = [
        Wanted([Example(one.question, answer) for one in asked], contexts, way.adapter)
        for answer in (PLUM.yes, PLUM.no)
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
    """Perplexity a token on documents about nobody here, under each adapter."""
    documents = [
        _tokens(draw_document(pretraining_rng(FIRST_DOCUMENT + i), 2), base) for i in range(n_documents)
    ]
    losses = losses_under(base, adapters, [documents] * len(adapters))
    return [math.exp(sum(nll for nll, _ in own) / sum(n for _, n in own)) for own in losses]


def _tokens(document: Document, base: Base) -> TokenSequence:
    """A document as pretraining read it; all of its tokens are predicted."""
    context = profile_context(document.profile, PROMPT)
    context += history_context([Turn(text) for text in document.turns], PROMPT)
    ids = [*base.start_ids, *base.tokenize([context])[0]]
    for asked in document.asked:
        question, response = base.tokenize([query_prompt(asked.query, PROMPT), response_text(asked.response)])
        ids += [*question, *response, base.eos_id]
    return TokenSequence(tuple(ids[: base.context_length]), 1, "memory")


def _percent(right: Sequence[bool]) -> float:
    return 100.0 * fmean(right) if right else math.nan


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


# -------------------------------------------------------------------------------------------- experiment


def one_seed(base: Base, splits: Sequence[UserSplit], seed: int, size: Size) -> dict[str, dict[str, float]]:
    """Every way of answering with one seed of training and questions."""

    def adapters(plum: PlumSection) -> list[Way]:
        if size.n_turns < FULL.n_turns:
            plum = plum.model_copy(update={"own_texts": 0})  # to write them takes longer than all else
        requests = [request_of(base, split, seed, plum) for split in splits]
        return [Way(adapter) for adapter in train_adapters(requests)]

    asked = [request_of(base, split, seed, PLUM) for split in splits]
    ways = {
        "base, nothing known": [Way() for _ in splits],
        f"BM25, {K} turns": [Way(context=retrieved(request, "bm25")) for request in asked],
        "PLUM": adapters(PLUM),
        "PLUM, earlier pairs": adapters(WITH_EARLIER),
        "PLUM, no negatives": adapters(PLUM.model_copy(update={"negatives": False})),
    }
    [before] = perplexities(base, [None], size.n_documents)
    found = {}
    for name, own in ways.items():
        after = perplexities(base, [way.adapter for way in own], size.n_documents)
        change = 100.0 * (fmean(after) / before - 1.0)
        found[name] = {**measure(base, splits, own, seed), "perplexity, %": change}
    return found


def table(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Means over seeds, with their standard deviation."""
    columns = list(next(iter(found.values())))
    lines = [" " * 22 + "".join(f"{name:>15}" for name in columns)]
    for way, row in found.items():
        cells = (_cell(row[name]) for name in columns)
        lines.append(f"{way:<22}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f} ± {pstdev(values):.1f}" if not any(map(math.isnan, values)) else "–"


def _number(values: Sequence[float]) -> float | None:
    """The mean; ``None``, which JSON can say, where nothing of that kind was asked."""
    mean = fmean(values)
    return None if math.isnan(mean) else round(mean, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--development", action="store_true", help="the users that the recipe was chosen on")
    parser.add_argument("--base", help=f"default: {BASE}; of --quick the embedded one")
    parser.add_argument("--users", type=int, help="how many")
    parser.add_argument("--seeds", type=int, help="how many")
    args = parser.parse_args()
    from milp_ray.training.base import load_base

    started = time.perf_counter()
    size = QUICK if args.quick else FULL
    size = replace(size, n_users=args.users or size.n_users, n_seeds=args.seeds or size.n_seeds)
    if not (args.base or args.quick or BASE.exists()):
        parser.error(
            f"there is no {BASE}; make it with experiments/pretrain_yes_no.py, or say --base embedded"
        )
    base = load_base(BaseSection(model=args.base or ("embedded" if args.quick else str(BASE)), device="cpu"))
    splits = users(DEVELOPMENT_SEED if args.development else TEST_SEED, size.n_users, size.n_turns)
    [perplexity] = perplexities(base, [None], size.n_documents)
    by_seed = [one_seed(base, splits, seed, size) for seed in range(size.n_seeds)]
    found = {
        way: {name: [run[way][name] for run in by_seed] for name in row} for way, row in by_seed[0].items()
    }
    n = size.n_turns // PLUM.conversation.turns
    n_questions = sum(len(probes(split, 0)) for split in splits)
    print(
        f"{size.n_users} users, {n} conversations each, {n_questions} yes/no questions, {size.n_seeds} seeds"
    )
    print(f"perplexity of the base on {size.n_documents} documents about nobody here: {perplexity:.3f}\n")
    print(table(found))
    seconds = time.perf_counter() - started
    means = {way: {name: _number(row[name]) for name in row} for way, row in found.items()}
    print(json.dumps({"users": size.n_users, "seeds": size.n_seeds, "seconds": round(seconds), **means}))


if __name__ == "__main__":
    main()
