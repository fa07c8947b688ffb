"""What each method answers to the same user's held-out queries (the paper's Figure 4), as a Markdown table.

    .venv/bin/python experiments/figure4_case_study.py                     # make figure4; a minute or two
    .venv/bin/python experiments/figure4_case_study.py --config experiments/meddia_tinystories.yaml --user 3

One user of a `milp-ray compare` configuration, whose methods are fitted to some of its users (what they
share needs them) with the layout that it names or that its run has chosen, and one query of each kind. Users
who may not be trained are left out. Writes experiments/results/figure4/table.md; the last line is one JSON
object. Real users' texts would stand in it: use it on invented or published ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from milp_ray.arguments import run_of
from milp_ray.config import Config
from milp_ray.errors import MilpError
from milp_ray.evaluation.metrics import fact_accuracy, rouge_l
from milp_ray.evaluation.user import Subject, requests_of
from milp_ray.methods import fit_users, label
from milp_ray.personalize.recipe import Recipe
from milp_ray.pipeline.work import working
from milp_ray.training.base import load_base
from milp_ray.users.records import Example, UserSplit

HERE = Path(__file__).resolve().parent
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


def table(asked: Sequence[Example], found: dict[str, list[str]]) -> list[str]:
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
        for name, own in found.items():
            right = fact_accuracy(own[i], example.answer)
            mark = "" if right is None else "right" if right else "wrong"
            lines.append(
                f"| {label(name)} | {own[i] or '–'} | {rouge_l(own[i], example.response):.0f} | {mark} |"
            )
        lines.append("")
    return lines


def main() -> None:
    """Fit, ask and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "table2_methods.yaml")
    parser.add_argument(
        "--user", type=int, default=-1, help="place of the user; -1, the last, has a long history"
    )
    parser.add_argument("--queries", type=int, default=5)
    parser.add_argument(
        "--users", type=int, default=6, help="users that the methods are fitted to, the last ones"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results" / "figure4")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that replace the file's")
    arguments = parser.parse_args()
    run, config = run_of(str(arguments.config), arguments.overrides)
    try:
        with working(run, config, "figure4") as work:
            splits, recipe = work.splits, work.recipe_of(config.compare.layout)
    except MilpError as error:
        raise SystemExit(f"error: {error}") from None
    user = splits[arguments.user]
    some = [split for split in splits[-arguments.users :] if split is not user] + [user]
    asked = chosen_queries(user, arguments.queries)
    found = answers(config, recipe, some, user, asked)
    head = [
        f"`experiments/figure4_case_study.py`: {len(user.history)} turns of history, "
        f"{len(user.train)} past examples, methods fitted to {len(some)} users.",
        "",
    ]
    text = "\n".join([*head, *table(asked, found)])
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "table.md").write_text(text, encoding="utf-8")
    print(text)
    right = {
        name: sum(fact_accuracy(own[i], example.answer) or 0 for i, example in enumerate(asked))
        for name, own in found.items()
    }
    print(json.dumps({"queries": len(asked), "right": right}))


if __name__ == "__main__":
    main()
