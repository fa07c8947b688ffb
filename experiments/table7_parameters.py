"""Trainable parameters by rank (the paper's Table 7), and memory by length of history (its Figure 3).

    .venv/bin/python experiments/table7_parameters.py    # make table7; seconds, and no weights

For the paper's two LLaMA2 bases, from their published sizes; the memory is that of the smaller, as `milp-ray
estimate` draws it by our own equations. Of the paper's table one figure is quoted, whose base and layout we
do not know.

Writes experiments/results/table7/{table.md,values.csv} and results/figure3/{values.csv,figure.png}; the last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TYPE_CHECKING

from commands import HERE, milp_ray
from result_files import RESULTS, invocation, markdown, write_csv, write_text

from milp_ray.config.base import BaseSection
from milp_ray.estimate.inputs import known_base
from milp_ray.estimate.paper import PAPER, PAPER_RANKS, PAPER_TABLE_7, nearest_layout, rank_rows

if TYPE_CHECKING:
    from milp_ray.training.model_shape import ModelShape

CONFIG = HERE / "paper_llama2_7b.yaml"
BASES = ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf")
LAYERS = {"one_layer": "one layer", "half": "half of the layers", "all_layers": "all layers"}


def shape_of(base: str) -> ModelShape:
    """The published sizes of a base."""
    return known_base(BaseSection(model=base), 2).shape


def rows_of(base: str) -> list[list[str]]:
    """Millions of trainable parameters, a row a number of layers; the paper's beside the last."""
    ranks = rank_rows(shape_of(base), PAPER_RANKS)
    rows = [
        [f"{_name(base)}, {label}", *(f"{getattr(one, layers) / 1e6:.2f}" for one in ranks), ""]
        for layers, label in LAYERS.items()
    ]
    rows[-1][-1] = f"{PAPER_TABLE_7 / 1e6:.2f}"
    return rows


def deviation(base: str) -> str:
    """How near a layout of ours comes to the paper's number."""
    nearest = nearest_layout(shape_of(base), PAPER_RANKS, PAPER_TABLE_7)
    off = 100.0 * (nearest.parameters / PAPER_TABLE_7 - 1.0)
    return (
        f"* {_name(base)}: nearest to the paper's {PAPER_TABLE_7 / 1e6:.2f} are {nearest.n_lora_layers} "
        f"layers with rank {nearest.rank}, {nearest.parameters / 1e6:.2f} ({off:+.1f} %); on all layers it "
        f"would take a rank of {nearest.rank_on_all_layers:.1f}.\n"
    )


def _name(base: str) -> str:
    return base.rpartition("/")[2].removesuffix("-hf")


def main() -> None:
    """Count, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write into")
    arguments = parser.parse_args()
    table7, figure3 = (arguments.results / name for name in ("table7", "figure3"))
    figure3.mkdir(parents=True, exist_ok=True)
    header = ["Trainable parameters (millions)", *(f"r = {rank}" for rank in PAPER_RANKS), "paper"]
    table = markdown(header, [row for base in BASES for row in rows_of(base)])
    text = f"{invocation()}. The paper is {PAPER}.\n\n{table}\n"
    text += "".join(deviation(base) for base in BASES)
    write_text(table7 / "table.md", text)
    found = {base: rank_rows(shape_of(base), PAPER_RANKS) for base in BASES}
    values = [[base, *astuple(row)] for base, rows in found.items() for row in rows]
    write_csv(table7 / "values.csv", ["base", "rank", *LAYERS], values)
    figure = str(figure3 / "figure.png")
    # How many users there are does not matter to one's memory.
    estimated = milp_ray("estimate", str(CONFIG), "--users", "1", "--json", "--figure", figure)
    memory = json.loads(estimated)["memory_by_history"]
    adapters = memory["parameterised"]
    write_csv(
        figure3 / "values.csv",
        ["history_tokens", "prompted_bytes", *(f"adapter_r{rank}_bytes" for rank in adapters)],
        [
            [tokens, prompted, *adapters.values()]
            for tokens, prompted in zip(memory["history"], memory["prompted"], strict=True)
        ],
    )
    print(text)
    print(json.dumps({base: [asdict(row) for row in rows] for base, rows in found.items()}))


if __name__ == "__main__":
    main()
