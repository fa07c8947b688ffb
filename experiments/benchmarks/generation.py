"""Greedy answers a second: ours against transformers' ``generate``, on the embedded base.

    .venv/bin/python experiments/benchmarks/generation.py          # a few minutes
    .venv/bin/python experiments/benchmarks/generation.py --quick  # under a minute

Both answer the same queries in batches of one size, in turns within one process; medians over the rounds.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from milp_ray.config import BaseSection, PromptSection
from milp_ray.training.base import Base, load_base
from milp_ray.training.generation import generate
from milp_ray.training.text import query_prompt
from milp_ray.users.persona_world import generate_users

MAX_NEW_TOKENS, BATCH_SIZE = 24, 16


def ours(base: Base, prompts: Sequence[str]) -> list[str]:
    """The package's own loop."""
    return generate(base, base.model, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH_SIZE)


def transformers_generate(base: Base, prompts: Sequence[str]) -> list[str]:
    """``model.generate`` with left padding."""
    answers = []
    base.tokenizer.padding_side = "left"
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = base.tokenizer(list(prompts[start : start + BATCH_SIZE]), return_tensors="pt", padding=True)
        with torch.inference_mode():
            ids = base.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
            )
        new = ids[:, batch["input_ids"].shape[1] :]
        answers += [text.strip() for text in base.tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer queries and rounds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    base = load_base(BaseSection(device="cpu"))
    users = generate_users(n_short=2 if quick else 8, n_long=0, n_examples=50, seed=1)
    prompts = [query_prompt(e.query, PromptSection()) for user in users for e in user.examples]
    sides: dict[str, Callable[[Base, Sequence[str]], list[str]]] = {
        "milp_ray": ours,
        "transformers": transformers_generate,
    }
    answers = {name: side(base, prompts) for name, side in sides.items()}  # also warms up
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(3 if quick else 7):
        for name, side in sides.items():
            started = time.perf_counter()
            side(base, prompts)
            seconds[name].append(time.perf_counter() - started)
    ratios = [theirs / own for own, theirs in zip(seconds["milp_ray"], seconds["transformers"], strict=True)]
    for name, values in seconds.items():
        print(f"{name:14s} {len(prompts) / statistics.median(values):8.1f} answers a second (median)")
    equal = sum(a == b for a, b in zip(answers["milp_ray"], answers["transformers"], strict=True))
    print(
        json.dumps(
            {
                "n_prompts": len(prompts),
                "answers_per_second": len(prompts) / statistics.median(seconds["milp_ray"]),
                "generate_speedup_vs_transformers": statistics.median(ratios),
                "equal_answers_share": equal / len(prompts),
            }
        )
    )


if __name__ == "__main__":
    main()
