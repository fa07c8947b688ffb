"""How long a history has to be before an adapter remembers it better than a prompt: where the curves cross.

    .venv/bin/python experiments/history_length.py            # twelve minutes of one core
    .venv/bin/python experiments/history_length.py --quick    # a few minutes: fewer users, two lengths

Users of PersonaWorld whose facts are stated equally often, among ever more other talk. For every length
`milp-ray compare` scores the methods on the same kinds of held-out queries, with the settings of
table2_methods.yaml; what is finished is not done again. Intervals are over users.

Writes experiments/results/history_length/{table.md,values.csv,figure.png}, with options
runs/results/history_length; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commands import HERE, milp_ray
from result_files import cell, invocation, markdown, results_of, write_csv, write_text

from milp_ray.config_loader import load_config
from milp_ray.methods import label
from milp_ray.report.style import method_colour, method_marker, new_figure, save, styled
from milp_ray.rundir import RunFolder, place_of

CONFIG = HERE / "table2_methods.yaml"
LENGTHS = (30, 60, 120, 240)
METHODS = ("text_prompt", "retrieval_dense", "milp", "oracle_profile")
# A slice, and what the figure calls it.
SLICES = {"all": "All queries with a fact", "unseen": "Facts that only the history tells"}

Cells = dict[str, dict[str, dict[str, Any]]]  # method → slice → mean, low, high


def measured(n_turns: int, n_users: int, n_seeds: int) -> tuple[float, Cells]:
    """Mean tokens of a history, and the fact accuracies of a comparison at this length."""
    name = f"history_length_{n_turns}"
    overrides = [
        f"name={name}",
        "users.persona_world.n_short_users=0",
        f"users.persona_world.n_long_users={n_users}",
        f"users.persona_world.long_turns=[{n_turns},{n_turns}]",
        f"compare.methods=[{','.join(METHODS)}]",
        f"compare.n_seeds={n_seeds}",
    ]
    milp_ray("compare", str(CONFIG), *overrides)
    run = RunFolder.open(place_of(load_config(CONFIG, overrides)))
    found = json.loads((run.compare / "comparison.json").read_text(encoding="utf-8"))
    cells = {
        method: {key: found["scores"][method][key]["fact_accuracy"] for key in SLICES} for method in METHODS
    }
    return history_tokens(run), cells


def history_tokens(run: RunFolder) -> float:
    """Mean tokens of the run's histories, in the base's tokenizer."""
    from milp_ray.training.base import load_base
    from milp_ray.users.readers import read_users

    config = run.config()
    base = load_base(config.base)
    users = read_users(config.users, config.seed).users
    return sum(sum(base.count_tokens([turn.text for turn in user.history])) for user in users) / len(users)


def crossing(found: Sequence[tuple[float, Cells]], key: str) -> float | None:
    """Tokens of history at which MiLP's accuracy passes the text prompt's; ``None``: it never does.

    Between two measured lengths the difference is taken for a straight line; 0 where MiLP is ahead of the
    prompt at every length.
    """
    gaps = [
        (tokens, cells["milp"][key]["mean"] - cells["text_prompt"][key]["mean"]) for tokens, cells in found
    ]
    behind = [i for i, (_, gap) in enumerate(gaps) if gap <= 0]
    if not behind:
        return 0.0
    last = behind[-1]
    if last == len(gaps) - 1:
        return None
    (x0, y0), (x1, y1) = gaps[last], gaps[last + 1]
    return x0 + (x1 - x0) * -y0 / (y1 - y0)


def table(found: Sequence[tuple[float, Cells]]) -> str:
    """A row a length, a column a method and slice."""
    columns = [(method, key) for key in SLICES for method in METHODS]
    header = [f"{label(method)}, {'all' if key == 'all' else key}" for method, key in columns]
    rows = [
        [f"{tokens:,.0f}", *(cell(cells[method][key], 100.0, 0) for method, key in columns)]
        for tokens, cells in found
    ]
    return markdown(["History (tokens)", *header], rows)


def draw(found: Sequence[tuple[float, Cells]], context: int, path: Path) -> None:
    """Fact accuracy over tokens of history, a line a method."""
    with styled():
        figure, panels = new_figure(9.5, 3.9, ncols=len(SLICES), sharey=True)
        for axes, (key, title) in zip(panels, SLICES.items(), strict=True):
            tokens = [x for x, _ in found]
            for position, method in enumerate(METHODS):
                colour = method_colour(method, position)
                own = [cells[method][key] for _, cells in found]
                low, high = ([100 * cell[end] for cell in own] for end in ("low", "high"))
                axes.fill_between(tokens, low, high, color=colour, alpha=0.15, lw=0)
                means = [100 * cell["mean"] for cell in own]
                axes.plot(tokens, means, method_marker(method) + "-", color=colour, label=label(method))
            axes.axvline(context, color="black", lw=0.8, ls=":")
            axes.annotate("context", (context, 2), xytext=(3, 0), textcoords="offset points", fontsize=7.5)
            axes.set_xscale("log")
            axes.set_xticks(tokens, [f"{x:,.0f}" for x in tokens], minor=False)
            axes.minorticks_off()
            axes.set_xlabel("History (tokens)")
            axes.set_title(title)
        panels[0].set_ylabel("Fact accuracy (%)")
        panels[0].set_ylim(0, 102)
        panels[-1].legend(loc="lower left", fontsize=8)
        save(figure, path)


def main() -> None:
    """Measure what is missing, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four users, two lengths, one seed")
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=results_of("history_length"))
    arguments = parser.parse_args()
    lengths = LENGTHS[::2] if arguments.quick else LENGTHS
    n_users, n_seeds = (4, 1) if arguments.quick else (arguments.users, arguments.seeds)
    found = []
    for n_turns in lengths:
        found.append(measured(n_turns, n_users, n_seeds))
        print(f"{n_turns} turns: {found[-1][0]:,.0f} tokens", flush=True)
    from milp_ray.training.base import load_base

    context = load_base(load_config(CONFIG, []).base).context_length
    points = {key: crossing(found, key) for key in SLICES}
    size = f"{n_users} users a length, {n_seeds} seeds; context {context} tokens"
    text = f"{invocation()}: {size}.\n\n{table(found)}"
    write_text(arguments.results / "table.md", text)
    write_csv(
        arguments.results / "values.csv",
        ["history_tokens", "method", "slice", "fact_accuracy", "low", "high"],
        [
            [round(tokens), method, key, cell["mean"], cell["low"], cell["high"]]
            for tokens, cells in found
            for method, own in cells.items()
            for key, cell in own.items()
        ],
    )
    draw(found, context, arguments.results / "figure.png")
    print(text)
    print(json.dumps({"context_tokens": context, "crossing_tokens": points}))


if __name__ == "__main__":
    main()
