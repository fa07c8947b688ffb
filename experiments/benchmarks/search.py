"""Layout searches compared in simulated time: ours against random, Optuna and stock Ax, with four workers.

    .venv/bin/python experiments/benchmarks/search.py --quick   # under a minute: fewer of everything
    .venv/bin/python experiments/benchmarks/search.py           # hours, most of them stock Ax's; see below
    .venv/bin/python experiments/benchmarks/search.py --algorithms random,ours_map --problems lora_table

Problems answer at once (comparison/problem.py), so that only suggestions take time; workers, trials and early
stopping are simulated (comparison/simulation.py). Every finished run is kept under runs/search_comparison: a
comparison that was interrupted goes on, and more seeds, problems or algorithms add to it. A run is made anew
when what it was made from has changed: its settings, the table, the peer's version, or for ours the code of
the search. Optuna is no dependency of the package: pip install optuna, or leave it out with --algorithms.
What JAX compiles for samplers is kept there as well, and compiled once instead of at every suggestion of
Ax's.

Writes experiments/results/search/regret.png. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from comparison.algorithms import ENTRIES, N_INITIAL, early_stopping
from comparison.measured import TABLE, LoraTable
from comparison.problem import Problem, best_hypervolume
from comparison.simulation import PROTOCOL, simulate
from comparison.summary import by_problem, draw, figures_of, table_of
from comparison.synthetic import few_layers, two_depths
from headline import with_headline

import milp_ray

CACHE = Path("runs/search_comparison/runs.jsonl")
JAX_CACHE = {
    "JAX_COMPILATION_CACHE_DIR": str(CACHE.with_name("jax").absolute()),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
FIGURE = Path("experiments/results/search/regret.png")
# The embedded base's trials take seconds, those that a search is run for take minutes: with this factor the
# median trial of the table takes about one and a half.
TIME_SCALE = 60.0
N_WORKERS = 4
# The modules of milp_ray.search that decide what is proposed, and which trials are stopped.
PROPOSING = (
    *("acquisition", "boxes", "candidates", "earlier", "features", "front", "nehvi", "nuts", "observations"),
    *("outputs", "partial", "posterior", "quasi_newton", "rungs", "saas", "subset", "suggest", "surrogate"),
)
# A search that stops trials early starts more of them in the same time; all are compared by time, and by
# trials only where each of them is a whole one.
STOPPING_FACTOR = 2
PROBLEMS = {
    "lora_table": lambda: LoraTable(time_scale=TIME_SCALE),
    "few_layers": few_layers,
    "two_depths": two_depths,
}
QUICK = ("random", "optuna_motpe", "ours_map")
# Without the one that tells what fitting fewer trials costs: it is compared with ours alone.
COMPARED = tuple(name for name in ENTRIES if name != "ours_map_subset")


def run_one(problem: Problem, algorithm: str, seed: int, n_trials: int) -> dict[str, Any]:
    """One search: what it cost, and the share of the best hypervolume after each trial that ended."""
    entry = ENTRIES[algorithm]
    run = simulate(
        problem,
        entry.make(problem, seed),
        n_trials=n_trials * (STOPPING_FACTOR if entry.stops_early else 1),
        n_workers=N_WORKERS,
        early_stopping=early_stopping() if entry.stops_early else None,
    )
    best = best_hypervolume(problem)
    return {
        "ended": [round(trial.ended, 3) for trial in run.trials],
        "keys": [trial.key for trial in run.trials],
        "share": [volume / best for volume in run.hypervolumes],
        "suggestion_seconds": run.suggestion_seconds,
        "n_repeats": run.n_repeats,
        "n_stopped": sum(trial.was_stopped for trial in run.trials),
    }


# ------------------------------------------------------------------------------------------------- cache


def identity(problem: str, algorithm: str, seed: int, n_trials: int) -> dict[str, Any]:
    """What a run depends on, in plain types."""
    here = Path(__file__).parent / "comparison"
    made_from: dict[str, Any] = {
        "n_trials": n_trials,
        "n_workers": N_WORKERS,
        "problems": _digest_of(*(here / f"{n}.py" for n in ("problem", "measured", "synthetic"))),
        "protocol": PROTOCOL,
    }
    if problem == "lora_table":
        made_from |= {"time_scale": TIME_SCALE, "table": hashlib.sha256(TABLE.read_bytes()).hexdigest()[:16]}
    if ENTRIES[algorithm].is_ours:
        made_from |= {
            "search": _digest_of(*(Path(milp_ray.__file__).parent / "search" / f"{n}.py" for n in PROPOSING)),
            "n_initial": N_INITIAL,
        }
    for head, package in (("optuna", "optuna"), ("ax", "ax-platform")):
        if algorithm.startswith(head):
            made_from["version"] = importlib.metadata.version(package)
    return {"problem": problem, "algorithm": algorithm, "seed": seed, "made_from": made_from}


@lru_cache
def _digest_of(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def read_cache(path: Path) -> list[dict[str, Any]]:
    """Finished runs; a last line that a kill cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a run as a line of its own, whatever a kill left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def all_runs(
    problems: Sequence[str],
    algorithms: Sequence[str],
    *,
    n_seeds: int,
    n_slow_seeds: int,
    n_trials: int,
    cache: Path,
    n_slow_trials: int | None = None,
) -> list[dict[str, Any]]:
    """Every run of the comparison, from the cache or made now; seed by seed, so that early ends are even.

    Slow algorithms get ``n_slow_trials``, or as many as their entry says, and ``n_slow_seeds``.
    """
    known = {_key(record): record for record in read_cache(cache)}
    found: list[dict[str, Any]] = []
    for seed in range(n_seeds):
        for problem_name in problems:
            problem = PROBLEMS[problem_name]()
            for algorithm in algorithms:
                most = ENTRIES[algorithm].most_trials
                if seed >= n_slow_seeds and most is not None:
                    continue
                n = n_trials if most is None else min(n_trials, n_slow_trials or most)
                record = identity(problem_name, algorithm, seed, n)
                key = _key(record)
                if key not in known:
                    known[key] = record | run_one(problem, algorithm, seed, n)
                    append(cache, known[key])
                    _drop_compiled()
                    share = known[key]["share"][-1]
                    print(f"seed {seed}  {problem_name:12s} {algorithm:20s} {share:.4f}", flush=True)
                found.append(known[key])
    return found


def _drop_compiled() -> None:
    """Unload what JAX compiled for the run that ended.

    Ax's SAAS model has code of its own for each number of trials, and after a few searches its mappings are
    as many as a process may have.
    """
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


def _key(record: dict[str, Any]) -> str:
    names = ("problem", "algorithm", "seed", "made_from")
    return json.dumps([record[name] for name in names], sort_keys=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="the table only, two seeds, few trials, no figure"
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--slow-seeds", type=int, default=5, help="seeds of the algorithms that take minutes")
    parser.add_argument("--trials", type=int, default=64, help="trials a search")
    parser.add_argument(
        "--slow-trials", type=int, help="trials of the algorithms that take minutes (12 or 32 of each)"
    )
    parser.add_argument("--problems", default=",".join(PROBLEMS), help="some of: %(default)s")
    parser.add_argument(
        "--algorithms", default=",".join(COMPARED), help="%(default)s, or others: ours_map_subset"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="file of finished runs")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    arguments = parser.parse_args()
    problems, algorithms = arguments.problems.split(","), arguments.algorithms.split(",")
    unknown = [*(set(problems) - set(PROBLEMS)), *(set(algorithms) - set(ENTRIES))]
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; give some of {[*PROBLEMS]} and {[*ENTRIES]}")
    os.environ.update(JAX_CACHE)  # JAX is imported when an algorithm that needs it is made
    n_seeds, n_trials = arguments.seeds, arguments.trials
    if arguments.quick:
        problems, n_seeds, n_trials = ["lora_table"], 2, 32
        algorithms = [name for name in algorithms if name in QUICK]
    runs = by_problem(
        all_runs(
            problems,
            algorithms,
            n_seeds=n_seeds,
            n_slow_seeds=arguments.slow_seeds,
            n_trials=n_trials,
            n_slow_trials=arguments.slow_trials,
            cache=arguments.cache,
        )
    )
    numbers = figures_of(runs, n_trials)
    print(table_of(numbers))
    if not arguments.quick:
        print(f"\nfigure: {draw(runs, n_trials, arguments.figure)}")
    print(json.dumps(with_headline("search", numbers, keep=not arguments.quick)))


if __name__ == "__main__":
    main()
