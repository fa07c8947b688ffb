"""Seconds for four suggestions: ours against Ax's own, for a base of 32 layers and two objectives.

    .venv/bin/python experiments/benchmarks/suggest.py               # over an hour, nearly all of it Ax's
    .venv/bin/python experiments/benchmarks/suggest.py --sizes 100   # one line of it
    .venv/bin/python experiments/benchmarks/suggest.py --quick       # under a minute, without Ax's "quality"

The objectives are synthetic: a few layers matter, some of them together, and there is noise. Ours proposes
through the study's suggester with its Ax experiment kept, as in a search; Ax is its ``Client`` with
``configure_generation_strategy(method=...)``, "fast" (its default) and "quality" (SAAS with NUTS), and told
the same trials. All take turns in one process on one thread; seconds are the process's own, so that other
work on the machine counts little: the best of the rounds for ours, which are run before and after Ax's, and
one round for Ax. Compiling NUTS is counted for Ax, which does so at every batch, and not for ours, which does
so every few. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Literal

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

import numpy as np
import torch
from ax.api.client import Client
from ax.api.configs import RangeParameterConfig
from ax.utils.common.logger import set_ax_logger_levels
from botorch.acquisition.multi_objective import logei
from headline import with_headline

from milp_ray.config.search import SearchSection, SurrogateSection
from milp_ray.memory.space import SearchSpace
from milp_ray.objectives import KNOWN_OBJECTIVES
from milp_ray.search.candidates import initial_points
from milp_ray.search.observations import Observation
from milp_ray.search.suggest import SAAS_NEHVI, Question, Suggester

SPACE = SearchSpace(32, (8, 16, 32, 64, 96))
OBJECTIVES = SearchSection().objectives
N_SUGGESTIONS = 4
NOISE = 0.05  # standard deviation, of objectives that range over a few units


def world(space: SearchSpace, n: int, seed: int = 0) -> tuple[Observation, ...]:
    """``n`` measured layouts: three layers and the rank decide the loss, five other effects the score."""
    rng = np.random.default_rng(seed)
    found = []
    for index, raw in enumerate(initial_points(space, n, seed)):
        layout = space.layout(raw).canonical()
        layers = np.array(layout.mask, dtype=float)
        rank = space.ranks.index(layout.rank) / (len(space.ranks) - 1)
        loss = 5.0 - 2.0 * layers[20] - 1.5 * layers[25] - 1.5 * layers[20] * layers[25]
        loss += -rank * layers[28] + 0.5 * layers.mean()
        score = 30.0 + 3.0 * layers.mean() * (1.0 + rank) + 0.8 * layers[3] - layers[4] * layers[28]
        values = np.array([loss, score]) + NOISE * rng.standard_normal(2)
        found.append(Observation(index, raw, layout, dict(zip(OBJECTIVES, values.tolist(), strict=True))))
    return tuple(found)


def ours(inference: str, observations: tuple[Observation, ...], rounds: int) -> float:
    """Seconds of the suggester, which has already proposed once."""
    section = SearchSection(surrogate=SurrogateSection(inference=inference))
    suggester = Suggester(SPACE, section, 0)
    seconds = []
    for batch in range(rounds + 1):
        question = Question(observations, batch, N_SUGGESTIONS)
        elapsed, proposals = timed(lambda question=question: suggester.propose(question))
        assert [p.generator for p in proposals] == [SAAS_NEHVI] * N_SUGGESTIONS
        seconds.append(elapsed)
    return min(seconds[1:])


def stock_ax(method: Literal["fast", "quality"], observations: tuple[Observation, ...]) -> float:
    """Seconds of Ax's own strategy, which is told the trials beforehand."""
    client = Client(random_seed=0)
    parameters = SPACE.parameters()
    client.configure_experiment(
        parameters=[
            RangeParameterConfig(name=p.name, parameter_type="int", bounds=(0, len(p.values) - 1))
            for p in parameters
        ]
    )
    names = [("-" if s > 0 else "") + name for name, s in zip(OBJECTIVES, signs(), strict=True)]
    client.configure_optimization(objective=", ".join(names))
    client.configure_generation_strategy(method=method, initialization_budget=0, initialize_with_center=False)
    for observation in observations:
        index = client.attach_trial({p.name: p.values.index(observation.raw[p.name]) for p in parameters})
        client.complete_trial(index, raw_data=dict(observation.values or {}))
    elapsed, proposed = timed(lambda: client.get_next_trials(max_trials=N_SUGGESTIONS))
    assert len(proposed) == N_SUGGESTIONS
    return elapsed


def timed(work: Callable[[], object]) -> tuple[float, object]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def signs() -> list[float]:
    return [KNOWN_OBJECTIVES[name].sign for name in OBJECTIVES]


@contextlib.contextmanager
def quiet():
    """Keep Ax's lines and warnings out of the table."""
    set_ax_logger_levels(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer trials and rounds, no sampler")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of trials, ascending")
    arguments = parser.parse_args()
    quick = arguments.quick
    # Ax's acquisition would otherwise compile a kernel for this processor in the time that is measured.
    logei._load_attempted = True
    torch.set_num_threads(1)
    sizes = arguments.sizes or ((10, 50, 100) if quick else (50, 100, 200, 400))
    limits = {"map": 2000, "nuts": 0 if quick else 100, "ax_fast": 10 if quick else 100}
    limits["ax_quality"] = 0 if quick else 100
    table: dict[str, dict[int, float]] = {name: {} for name in limits}
    print(f"seconds for {N_SUGGESTIONS} suggestions; d = {len(SPACE.parameters())}, 2 objectives, one thread")
    print("  trials" + "".join(f"{name:>12s}" for name in table))
    with quiet():
        for n in sizes:
            observations = world(SPACE, n)
            sides: dict[str, Callable[[], float]] = {
                "map": partial(ours, "map", observations, 1 if quick else 2),
                "nuts": partial(ours, "nuts", observations, 1),
                "ax_fast": partial(stock_ax, "fast", observations),
                "ax_quality": partial(stock_ax, "quality", observations),
            }
            for name, side in sides.items():
                if n <= limits[name]:
                    table[name][n] = side()
            table["map"][n] = min(table["map"][n], sides["map"]())
            cells = [f"{column[n]:.2f}" if n in column else "-" for column in table.values()]
            print(f"{n:8d}" + "".join(f"{cell:>12s}" for cell in cells), flush=True)
    print(f"A side is asked with at most so many trials, beyond which it takes too long: {limits}")
    speedups = {
        name: {n: seconds / table["map"][n] for n, seconds in table[name].items()}
        for name in ("ax_fast", "ax_quality")
    }
    first, last = 100 if 100 in sizes[:-1] else sizes[0], sizes[-1]
    seconds = table["map"]
    growth = math.log(seconds[last] / seconds[first]) / math.log(last / first) if last > first else None
    figures = {
        "n_suggestions": N_SUGGESTIONS,
        "n_parameters": len(SPACE.parameters()),
        "seconds": table,
        "speedup_vs_ax_fast": speedups["ax_fast"],
        "speedup_vs_ax_quality": speedups["ax_quality"],
        "speedup_vs_ax_quality_n100": speedups["ax_quality"].get(100),
        "growth_exponent": growth,
        "growth_from_to": [first, last],
    }
    print(json.dumps(with_headline("suggest", figures, keep=not quick)))


if __name__ == "__main__":
    main()
