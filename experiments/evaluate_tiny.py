"""Score the embedded base on personas and wordings that its pretraining never saw, and write its model card.

    .venv/bin/python experiments/evaluate_tiny.py          # prints the scores, some minutes
    .venv/bin/python experiments/evaluate_tiny.py --write  # also writes them into the model card

Fact accuracy (is the right word in the greedy answer) by attribute and kind of question, with the profile in
the prompt, with a history in the prompt, and with nothing. All questions use held-out wordings.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import torch

from milp_ray.config.base import BaseSection
from milp_ray.config.prompt import PromptSection
from milp_ray.evaluation.metrics import fact_accuracy
from milp_ray.training.base import Base, load_base
from milp_ray.training.generation import Questions, generate
from milp_ray.training.text import history_context, profile_context, query_prompt
from milp_ray.users.persona_world import evaluation_rng
from milp_ray.users.persona_world.attributes import ATTRIBUTES, BY_NAME
from milp_ray.users.persona_world.persona import (
    Asked,
    Fact,
    Persona,
    ask_direct,
    ask_generic,
    ask_implicit,
    draw_history,
    draw_persona,
    draw_profile,
)
from milp_ray.users.records import Turn

Context = Literal["profile", "history", "nothing"]
KINDS = ("direct", "implicit", "choice-first", "changed", "generic")
PROMPT = PromptSection()
SEED = 999_999  # a seed of its own, so that no demo or test shares its users
GATE = 0.85


@dataclass(frozen=True)
class Probe:
    """One question about one persona."""

    attribute: str
    kind: str
    asked: Asked
    persona: Persona


def probes(n_per_cell: int, rng: Random) -> Iterator[Probe]:
    """``n_per_cell`` questions for every attribute and kind, and as many generic ones as for one."""
    wanted: dict[tuple[str, str], int] = defaultdict(lambda: n_per_cell)
    open_cells = {(a.name, kind) for a in ATTRIBUTES for kind in KINDS[:4]} | {("none", "generic")}
    while open_cells:
        persona = draw_persona(rng)
        cells = [(fact, kind) for fact in persona.facts for kind in _kinds(fact)]
        for fact, kind in cells:
            cell = (fact.attribute, kind)
            if cell in open_cells:
                yield Probe(fact.attribute, kind, _ask(fact, kind, rng), persona)
                wanted[cell] -= 1
                if not wanted[cell]:
                    open_cells.discard(cell)
        if ("none", "generic") in open_cells:
            yield Probe("none", "generic", ask_generic(rng, "held_out", "all"), persona)
            wanted["none", "generic"] -= 1
            if not wanted["none", "generic"]:
                open_cells.discard(("none", "generic"))


def _kinds(fact: Fact) -> tuple[str, ...]:
    return ("changed",) if fact.earlier is not None else ("direct", "implicit", "choice-first")


def _ask(fact: Fact, kind: str, rng: Random) -> Asked:
    if kind == "direct" or (kind == "changed" and rng.random() < 0.5):
        return ask_direct(fact, rng, "held_out", "all")
    rule = rng.choice(BY_NAME[fact.attribute].rules)
    order: Literal["fact_first", "choice_first"] = "choice_first" if kind == "choice-first" else "fact_first"
    return ask_implicit(fact, rule, order, rng, "held_out", "all")


def prompt_of(probe: Probe, context: Context, rng: Random) -> str:
    """The whole prompt of one question under one kind of context."""
    text = ""
    if context == "profile":
        text = profile_context(draw_profile(probe.persona, rng), PROMPT)
    elif context == "history":
        turns = draw_history(probe.persona, rng.randint(20, 60), rng, "all")
        text = history_context([Turn(turn) for turn in turns], PROMPT)
    return query_prompt(probe.asked.query, PROMPT, text)


def score(base: Base, context: Context, n_per_cell: int) -> dict[tuple[str, str], float]:
    """Fact accuracy by (attribute, kind)."""
    rng = evaluation_rng(SEED, {"profile": 0, "history": 1, "nothing": 2}[context])
    asked = list(probes(n_per_cell, rng))
    prompts = [prompt_of(probe, context, rng) for probe in asked]
    [answers] = generate(base, [Questions(prompts)], max_new_tokens=24, batch_size=16)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for probe, answer in zip(asked, answers, strict=True):
        found[probe.attribute, probe.kind].append(fact_accuracy(answer, probe.asked.answer) or 0.0)
    return {cell: sum(values) / len(values) for cell, values in found.items()}


def table(scores: dict[Context, dict[tuple[str, str], float]]) -> list[str]:
    """A Markdown table: a row an attribute, a column a kind, a value a context."""
    lines = ["| attribute | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for attribute in [*(a.name for a in ATTRIBUTES), "none"]:
        cells = []
        for kind in KINDS:
            values = [by_cell.get((attribute, kind)) for by_cell in scores.values()]
            cells.append(
                " / ".join("–" if v is None else f"{v:.2f}" for v in values) if values[0] is not None else ""
            )
        lines.append(f"| {attribute} | " + " | ".join(cells) + " |")
    means = []
    for kind in KINDS:
        rows = [[v for (_, k), v in by_cell.items() if k == kind] for by_cell in scores.values()]
        means.append(" / ".join(f"{sum(row) / len(row):.2f}" for row in rows))
    lines.append("| **mean** | " + " | ".join(means) + " |")
    return lines


def below_gate(profile_scores: dict[tuple[str, str], float]) -> list[str]:
    """Cells under the gate, choice-first aside (told as it is)."""
    return [
        f"{attribute}/{kind} {value:.2f}"
        for (attribute, kind), value in sorted(profile_scores.items())
        if kind != "choice-first" and value < GATE
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="embedded", help="a folder, or 'embedded'")
    parser.add_argument("--per-cell", type=int, default=40, help="questions an attribute and kind")
    parser.add_argument("--contexts", default="profile,history,nothing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write the table into the model card")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = load_base(BaseSection(model=args.base, device="cpu"))
    contexts: list[Context] = args.contexts.split(",")
    scores = {context: score(base, context, args.per_cell) for context in contexts}
    lines = table(scores)
    print(f"fact accuracy, {' / '.join(contexts)}, {args.per_cell} questions a cell")
    print("\n".join(lines))
    if "profile" in scores:
        weak = below_gate(scores["profile"])
        print(f"below {GATE} with the profile in the prompt: {', '.join(weak) or 'none'}")
    if args.write:
        write_card(Path(base.model.config._name_or_path) / "README.md", lines, args.per_cell)


def write_card(path: Path, lines: list[str], n_per_cell: int) -> None:
    """Put the table between the markers of the model card."""
    begin, end = "<!-- scores -->", "<!-- end of scores -->"
    head, rest = path.read_text(encoding="utf-8").split(begin)
    tail = rest.split(end)[1]
    body = f"\n{n_per_cell} questions a cell.\n\n" + "\n".join(lines) + "\n"
    path.write_text(head + begin + body + end + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
