"""PLUM at 100 conversations of a user, against retrieval: what is remembered, and what is made up.

    .venv/bin/python experiments/pretrain_yes_no.py                  # the base: forty minutes of one core
    .venv/bin/python experiments/plum_100_conversations.py           # then: about an hour on two cores
    .venv/bin/python experiments/plum_100_conversations.py --quick   # under a minute; says nothing

Users of PersonaWorld with 200 turns, cut into 100 conversations of two. All that was said is asked for in
frames that no training has seen, own facts also in wordings that no training has seen, each beside something
related that the user never said. A yes/no question is answered by the likelier of the two answers. Open ones
are PersonaWorld's held-out questions for the users' facts, answered by greedy generation.

The embedded base has never read a question that is answered with yes or no. So the base here is one that
was taught such questions on other people. PLUM is trained in the paper's way, the data of a conversation
discarded after it, and with pairs of earlier conversations beside each one's own. The recipe was chosen on
the users of ``--development``. General ability is the perplexity on documents of PersonaWorld about none of
these users.

Each way of answering with each seed is kept in runs/plum_100_conversations when it is finished and not done
again. Writes experiments/results/plum/{table.md,values.csv,figure.png}; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from plum_questions import CONVERSATION, NO, PROMPT, YES, Probe, open_examples, probes, users
from plum_results import AGES, Row, age_name, table, write
from result_files import RESULTS, write_text

from milp_ray.config.base import BaseSection
from milp_ray.config.methods import MethodsSection, PlumSection, RetrievalSection
from milp_ray.config.training import LoraAlphaSection, TrainingSection
from milp_ray.evaluation.metrics import fact_accuracy
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.methods.plum import train_adapters
from milp_ray.methods.protocol import FitRequest, no_context, training_side
from milp_ray.methods.retrieval import retrieved
from milp_ray.training.base import load_base
from milp_ray.training.data import Sequence as TokenSequence
from milp_ray.training.generation import Questions, generate
from milp_ray.training.response_loss import Wanted, losses_under, response_losses
from milp_ray.training.text import history_context, profile_context, query_prompt, response_text
from milp_ray.users.persona_world import pretraining_rng
from milp_ray.users.persona_world.documents import Document, draw_document
from milp_ray.users.records import Example, Turn, UserSplit

if TYPE_CHECKING:
    from milp_ray.methods.protocol import ContextRule
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.base import Base

DEVELOPMENT_SEED, TEST_SEED = 82, 83  # of users
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
WITH_EARLIER = PLUM.model_copy(update={"earlier_pairs": 384, "epochs": 2, "own_texts": 24})
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
BASE = Path("runs/yes_no_base")  # what pretrain_yes_no.py makes
KEPT = Path("runs/plum_100_conversations")
K = 2  # turns that BM25 puts before a question
MOST_NEW_TOKENS = 24
# Pretraining read some hundred thousand documents, counted from 0.
FIRST_DOCUMENT = 10**9


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
        weights = Path(self.base) / "model.safetensors"
        base = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else self.base
        setting = (self.size, self.user_seed, base, self.plum.model_dump(), RECIPE.model_dump(), LAYOUT, K)
        digest = hashlib.sha256(repr(setting).encode()).hexdigest()[:12]
        return KEPT / f"{self.way}-{self.seed}-{digest}.json"


@dataclass(frozen=True)
class Way:
    """A way of answering one user."""

    adapter: Adapter | None = None
    context: ContextRule = no_context


# --------------------------------------------------------------------------------------------- measuring


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


# -------------------------------------------------------------------------------------------- experiment


def request_of(base: Base, split: UserSplit, seed: int, plum: PlumSection) -> FitRequest:
    """What a method is told of a user."""
    methods = MethodsSection(plum=plum, retrieval=RetrievalSection(k=K))
    return FitRequest(
        base, training_side(split), LAYOUT, RECIPE, PROMPT, MOST_NEW_TOKENS, 48, seed, methods=methods
    )


def do(unit: Unit) -> tuple[Unit, float]:
    """Fit, ask, and keep each user's row; the seconds that it took."""
    started = time.perf_counter()
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
    return unit, time.perf_counter() - started


def do_all(units: Sequence[Unit], n_processes: int) -> None:
    """Do what is not kept yet, so many units at a time."""
    todo = sorted((one for one in units if not one.path.exists()), key=lambda one: _by_length(one.way))
    n_kept = len(units) - len(todo)
    if n_kept:
        print(f"{n_kept} of {len(units)} units are kept from before", flush=True)
    if not todo:
        return
    n_processes = min(n_processes, len(todo))
    n_threads = max(1, (os.cpu_count() or 1) // n_processes)
    context = multiprocessing.get_context("spawn")
    with context.Pool(n_processes, initializer=_worker, initargs=(n_threads,)) as pool:
        for i, (unit, seconds) in enumerate(pool.imap_unordered(do, todo), n_kept + 1):
            print(f"{i}/{len(units)} units: {unit.way}, seed {unit.seed}: {seconds:.0f} s", flush=True)


def _worker(n_threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the pool, and with it this process
    torch.set_num_threads(n_threads)


def _by_length(way: str) -> int:
    """The longest first, so that no process is left alone with one."""
    return list(TRAINED).index(way) if way in TRAINED else len(TRAINED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--development", action="store_true", help="the users that the recipe was chosen on")
    parser.add_argument("--base", help=f"default: {BASE}; of --quick the embedded one")
    parser.add_argument("--users", type=int, help="how many")
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="units at a time")
    parser.add_argument("--results", type=Path, help=f"default: {RESULTS.name}/plum")
    args = parser.parse_args()

    started = time.perf_counter()
    size, n_seeds = (QUICK, 1) if args.quick else (FULL, 3)
    size, n_seeds = replace(size, n_users=args.users or size.n_users), args.seeds or n_seeds
    if not (args.base or args.quick or BASE.exists()):
        parser.error(
            f"there is no {BASE}; make it with experiments/pretrain_yes_no.py, or say --base embedded"
        )
    base = args.base or ("embedded" if args.quick else str(BASE))
    user_seed = DEVELOPMENT_SEED if args.development else TEST_SEED
    units = [Unit(way, seed, size, user_seed, base) for way in WAYS for seed in range(n_seeds)]
    try:
        do_all(units, args.processes)
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; what is finished is kept in {KEPT}: run the same again") from None
    found = {
        way: [json.loads(unit.path.read_text(encoding="utf-8")) for unit in units if unit.way == way]
        for way in WAYS
    }
    n_questions = sum(len(probes(split, 0)) for split in users(user_seed, size.n_users, size.n_turns))
    text = (
        f"{size.n_users} users of {size.n_turns // CONVERSATION.turns} conversations, {n_questions} yes/no "
        f"questions (of seed 0), {n_seeds} seeds.\n\n{table(found)}"
    )
    # A smoke test's figures, or those of the users that were chosen by, are nobody's results.
    results = args.results or (None if args.quick or args.development else RESULTS / "plum")
    if results:
        write(results, text, found)
    print(text)
    seconds = round(time.perf_counter() - started)
    means = {way: _means([row for rows in runs for row in rows]) for way, runs in found.items()}
    print(json.dumps({"users": size.n_users, "seeds": n_seeds, "seconds": seconds, **means}))


def _means(rows: Sequence[Row]) -> dict[str, float | None]:
    """``None``, which JSON can say, where nothing of that kind was asked."""
    known = {name: [row[name] for row in rows if not math.isnan(row[name])] for name in rows[0]}
    return {name: round(fmean(values), 2) if values else None for name, values in known.items()}


if __name__ == "__main__":
    main()
