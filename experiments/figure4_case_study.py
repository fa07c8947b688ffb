"""What each method answers to the same user's held-out queries (the paper's Figure 4).

    .venv/bin/python experiments/figure4_case_study.py                     # make figure4; a minute or two
    .venv/bin/python experiments/figure4_case_study.py --config experiments/meddia_tinystories.yaml --user 3

One user of a `milp-ray compare` configuration, whose methods are fitted to some of its users (what they
share needs them) with the layout that it names or that its run has chosen, and one query of each kind. Users
who may not be trained are left out. Writes experiments/results/figure4/{table.md,values.csv,figure.png}, with
other options into runs/results/figure4; the last line is one JSON object. Real users' texts would stand in
them: use it on invented or published ones.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from result_files import invocation, results_of, write_csv, write_text

from milp_ray.arguments import run_of
from milp_ray.config import Config
from milp_ray.errors import MilpError
from milp_ray.evaluation.metrics import fact_accuracy, rouge_l
from milp_ray.evaluation.user import Subject, requests_of
from milp_ray.methods import fit_users, label
from milp_ray.personalize.recipe import Recipe
from milp_ray.pipeline.work import working
from milp_ray.report.style import INK, new_figure, save, styled
from milp_ray.training.base import load_base
from milp_ray.users.records import Example, UserSplit

HERE = Path(__file__).resolve().parent
CONFIGS = {"demo": HERE / "table2_methods.yaml", "paper": HERE / "paper_llama2_7b.yaml"}
METHODS = ("base", "text_prompt", "retrieval_dense", "malp", "shared_adapter", "oppu", "milp", "hybrid")


def chosen_queries(split: UserSplit, most: int) -> list[Example]:
    """The first held-out query of each kind, then others in time order."""
    firsts = {example.kind: example for example in reversed(split.test)}
    picked = [example for example in split.test if firsts[example.kind] is example]
    others = [example for example in split.test if example not in picked]
    return (picked + others)[:most]


def answers(
    config: Config,
    recipe: Recipe,
    splits: Sequence[UserSplit],
    user: UserSplit,
    asked: Sequence[Example],
) -> dict[str, list[str]]:
    """Method → its answers to the user."""
    base = load_base(config.base)
    subjects = [Subject(split, None, config.seed + i) for i, split in enumerate(splits)]
    requests = requests_of(
        base, subjects, recipe.layout, config.training, config.prompt, config.evaluation, config.methods
    )
    found = {}
    for name in METHODS:
        fitted = fit_users(name, requests)
        if user.user_id in fitted.personalizers:
            found[name] = fitted.respond([(user.user_id, example.query) for example in asked])
    return found


@dataclass(frozen=True)
class Answer:
    """What a method answered to the query at ``place``; ``rouge_l`` is an F-measure × 100."""

    place: int
    method: str
    text: str
    rouge_l: float
    fact: float | None  # 1 or 0: right or wrong; None: the query asks for none


def judged(asked: Sequence[Example], found: dict[str, list[str]]) -> list[Answer]:
    """Each method's answer to each query, query by query."""
    return [
        Answer(i, name, own[i], rouge_l(own[i], example.response), fact_accuracy(own[i], example.answer))
        for i, example in enumerate(asked)
        for name, own in found.items()
    ]


def verdict(answer: Answer) -> str:
    """In a word; nothing where no fact was asked for."""
    return "" if answer.fact is None else "right" if answer.fact else "wrong"


def table(asked: Sequence[Example], given: Sequence[Answer]) -> list[str]:
    """A query a block: what was asked and wanted, and what each method answered."""
    lines = []
    for i, example in enumerate(asked):
        lines += [
            f"**{example.kind}**: {example.query}",
            "",
            "| | answer | ROUGE-L | fact |",
            "|---|---|---:|---|",
        ]
        lines.append(f"| *wanted* | {example.response} | | |")
        for one in given:
            if one.place == i:
                cells = [label(one.method), one.text or "–", f"{one.rouge_l:.0f}", verdict(one)]
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def write_values(path: Path, asked: Sequence[Example], given: Sequence[Answer]) -> None:
    """A line an answer."""
    header = ["kind", "query", "wanted", "method", "answer", "rouge_l", "fact"]
    rows = [
        [
            example.kind,
            example.query,
            example.response,
            one.method,
            one.text,
            round(one.rouge_l, 2),
            verdict(one),
        ]
        for one in given
        for example in [asked[one.place]]
    ]
    write_csv(path, header, rows)


def draw(path: Path, asked: Sequence[Example], given: Sequence[Answer]) -> None:
    """Methods by queries: ROUGE-L as a shade, and whether the fact is right."""
    methods = list(dict.fromkeys(one.method for one in given))
    shades = [[0.0] * len(asked) for _ in methods]
    for one in given:
        shades[methods.index(one.method)][one.place] = one.rouge_l
    with styled():
        figure, axes = new_figure(1.6 + 0.95 * len(asked), 1.2 + 0.34 * len(methods))
        shown = axes.imshow(shades, cmap="Blues", vmin=0.0, vmax=100.0, aspect="auto")
        for one in given:
            ink = "white" if one.rouge_l > 60.0 else INK
            place = (one.place, methods.index(one.method))
            axes.text(*place, verdict(one), color=ink, ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(asked)), [example.kind for example in asked])
        axes.set_yticks(range(len(methods)), [label(name) for name in methods])
        axes.grid(False)
        figure.colorbar(shown, ax=axes, label="ROUGE-L (F × 100)")
        save(figure, path)


def main() -> None:
    """Fit, ask and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scale", choices=tuple(CONFIGS), default="demo")
    parser.add_argument("--config", type=Path, help="in place of the scale's")
    parser.add_argument(
        "--user", type=int, default=-1, help="place of the user; -1, the last, has a long history"
    )
    parser.add_argument("--queries", type=int, default=5)
    parser.add_argument(
        "--users", type=int, default=6, help="users that the methods are fitted to, the last ones"
    )
    parser.add_argument("--results", type=Path, default=results_of("figure4"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that replace the file's")
    arguments = parser.parse_args()
    try:
        run, config = run_of(str(arguments.config or CONFIGS[arguments.scale]), arguments.overrides)
        with working(run, config, "figure4") as work:
            splits, recipe = work.splits, work.recipe_of(config.compare.layout)
    except MilpError as error:
        raise SystemExit(f"error: {error}") from None
    user = splits[arguments.user]
    some = [split for split in splits[-arguments.users :] if split is not user] + [user]
    asked = chosen_queries(user, arguments.queries)
    given = judged(asked, answers(config, recipe, some, user, asked))
    head = [
        f"{invocation()}: {len(user.history)} turns of history, "
        f"{len(user.train)} past examples, methods fitted to {len(some)} users.",
        "",
    ]
    text = "\n".join([*head, *table(asked, given)])
    write_text(arguments.results / "table.md", text)
    write_values(arguments.results / "values.csv", asked, given)
    draw(arguments.results / "figure.png", asked, given)
    print(text)
    right = Counter({one.method: 0 for one in given})
    right.update(one.method for one in given if one.fact)
    print(json.dumps({"queries": len(asked), "right": right}))


if __name__ == "__main__":
    main()
