"""Personalised answers a second: ours, with all users' rows in shared batches, against PEFT's two ways.

    .venv/bin/python experiments/benchmarks/generation.py          # a few minutes
    .venv/bin/python experiments/benchmarks/generation.py --quick  # under a minute

The same queries and adapters (one a user, trained for a few steps) of the embedded base, greedily, in turns
within one process; medians over the rounds:

* switching: all adapters loaded into one PEFT model, ``set_adapter`` and ``generate`` for one user after the
  other, that user's queries in a batch;
* mixed: one ``generate`` over rows of several users, with PEFT's ``adapter_names``;
* ours: :func:`milp_ray.training.generation.generate` over all users.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from adapters.bases import base_of
from adapters.users import PROMPT, splits
from headline import with_headline
from rich.console import Console
from rich.table import Table

from milp_ray.config.training import TrainingSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.lora import lora_config
from milp_ray.training.adapters import Adapter
from milp_ray.training.base import Base
from milp_ray.training.generation import Questions, generate
from milp_ray.training.job import Job
from milp_ray.training.text import query_prompt
from milp_ray.training.train import train

RECIPE = TrainingSection(learning_rate=5e-3, memory_epochs=2, instruction_epochs=3)
MAX_NEW_TOKENS = 24
PARTS = frozenset({"memory", "instruction"})
Asked = Sequence[Questions]


def ours(base: Base, asked: Asked, batch_size: int) -> list[list[str]]:
    """The package's own loop."""
    return generate(base, asked, max_new_tokens=MAX_NEW_TOKENS, batch_size=batch_size)


@contextmanager
def peft_model(base: Base, asked: Asked) -> Iterator[Any]:
    """All adapters in one PEFT model, named by their user's place; made once, outside of the clock."""
    from peft import get_peft_model, set_peft_model_state_dict

    adapters = [one.adapter for one in asked if one.adapter is not None]
    config = lora_config(adapters[0].layout, base.spec, RECIPE.lora_alpha, 0.0, base.model_id)
    model: Any = get_peft_model(base.model, config, adapter_name="0")
    for i, adapter in enumerate(adapters):
        if i:
            model.add_adapter(str(i), config)
        set_peft_model_state_dict(model, adapter.tensors, adapter_name=str(i))
    try:
        yield model.eval()
    finally:
        model.unload()


def switching(base: Base, model: Any, asked: Asked) -> list[list[str]]:
    """One user after the other."""
    answers = []
    for i, one in enumerate(asked):
        model.set_adapter(str(i))
        answers.append(_generated(base, model, list(one.prompts)))
    return answers


def mixed(base: Base, model: Any, asked: Asked, batch_size: int) -> list[list[str]]:
    """Rows of several users in a batch, ``adapter_names`` saying whose each is."""
    rows = [(str(i), prompt) for i, one in enumerate(asked) for prompt in one.prompts]
    found: list[str] = []
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        names = [name for name, _ in some]
        found += _generated(base, model, [prompt for _, prompt in some], adapter_names=names)
    answers = iter(found)
    return [[next(answers) for _ in one.prompts] for one in asked]


def _generated(base: Base, model: Any, prompts: list[str], **options: Any) -> list[str]:
    base.tokenizer.padding_side = "left"
    batch = base.tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        ids = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            **options,
        )
    new = ids[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in base.tokenizer.batch_decode(new, skip_special_tokens=True)]


def questions(base: Base, n_users: int) -> list[Questions]:
    """Every user's test queries, and an adapter that has learnt enough to answer differently."""
    layout = CanonicalLayout(tuple(i >= base.n_layers // 2 for i in range(base.n_layers)), 16)
    users = splits(n_users)
    jobs = [Job(str(i), split, layout, PARTS, seed=i) for i, split in enumerate(users)]
    adapters: list[Adapter | None] = [result.adapter for result in train(base, jobs, RECIPE, PROMPT)]
    return [
        Questions([query_prompt(example.query, PROMPT) for example in split.test], adapter)
        for split, adapter in zip(users, adapters, strict=True)
    ]


def main() -> None:
    """Measure, print the table, then the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer users and rounds")
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128, help="rows of a shared batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.users, arguments.rounds = 16, 3
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    base = base_of("embedded", "cpu")
    asked = questions(base, arguments.users)
    n_answers = sum(len(one.prompts) for one in asked)
    n_rows = arguments.batch_size

    def timed(side: Callable[[], list[list[str]]]) -> float:
        started = time.perf_counter()
        answers[name] = side()
        return time.perf_counter() - started

    seconds: dict[str, list[float]] = {"switching": [], "mixed": [], "ours": []}
    answers: dict[str, list[list[str]]] = {}
    for number in range(arguments.rounds + 1):  # the first one warms up
        with peft_model(base, asked) as model:
            of_peft: dict[str, Callable[[], list[list[str]]]] = {
                "switching": lambda model=model: switching(base, model, asked),
                "mixed": lambda model=model: mixed(base, model, asked, n_rows),
            }
            for name, side in of_peft.items():
                spent = timed(side)
                if number:
                    seconds[name].append(spent)
        name = "ours"
        spent = timed(lambda: ours(base, asked, n_rows))
        if number:
            seconds[name].append(spent)
    table = Table(title=f"{arguments.users} users, {n_answers} answers, {arguments.threads} threads")
    for column in ("side", "answers a second (median)", "answers like ours"):
        table.add_column(column, justify="left" if column == "side" else "right")
    flat = {name: [text for own in found for text in own] for name, found in answers.items()}
    for name, values in seconds.items():
        like = sum(a == b for a, b in zip(flat[name], flat["ours"], strict=True))
        table.add_row(name, f"{n_answers / statistics.median(values):.1f}", f"{like} of {n_answers}")
    Console(width=100).print(table)

    def speedup(over: str) -> float:
        pairs = zip(seconds[over], seconds["ours"], strict=True)
        return round(statistics.median(theirs / own for theirs, own in pairs), 3)

    best = min(("switching", "mixed"), key=lambda name: statistics.median(seconds[name]))
    figures = {
        "n_users": arguments.users,
        "n_answers": n_answers,
        "threads": arguments.threads,
        "generate_speedup_vs_peft": speedup(best),
        "best_of_peft": best,
        "speedup_vs_switching": speedup("switching"),
        "speedup_vs_mixed": speedup("mixed"),
        "equal_answers": min(
            sum(a == b for a, b in zip(flat[name], flat["ours"], strict=True)) / n_answers
            for name in ("switching", "mixed")
        ),
    }
    print(json.dumps(with_headline("generation", figures, keep=not arguments.quick)))


if __name__ == "__main__":
    main()
