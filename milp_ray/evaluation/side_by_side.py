"""Every method on the same users: what is trained on all of them first, then everybody, seed by seed.

A unit of work is one method with one seed for some users. Each is kept as it ends, in two files of the run's
``compare`` folder, so that the same command goes on after an interruption and repeats only what has changed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from milp_ray.atomic_files import write_json
from milp_ray.errors import MilpError
from milp_ray.evaluation.compare import compare
from milp_ray.evaluation.scores import COLUMNS, read_scores, schema, write_scores
from milp_ray.evaluation.tasks import closed_questions
from milp_ray.evaluation.user import Subject, evaluate_users, requests_of
from milp_ray.methods import INFO, Costs, in_order, is_shared
from milp_ray.personalize.recipe import fingerprint
from milp_ray.progress import progress

if TYPE_CHECKING:
    import pyarrow as pa

    from milp_ray.config.evaluation import CompareSection, EvaluationSection
    from milp_ray.config.methods import MethodsSection
    from milp_ray.personalize.pool import WorkerPool
    from milp_ray.personalize.recipe import Recipe
    from milp_ray.rundir import RunFolder
    from milp_ray.training.base import Base
    from milp_ray.users.records import UserSplit

STAGE = "compare"
_FORMAT = 2  # raised when the same unit would be scored differently
_USERS_A_UNIT = 64
_MEASURED = ("loss", "rouge_1", "rouge_l", "persona_f1", "fact_accuracy", "yes_no")
AHEAD = ("milp", "hybrid")  # whose differences to all others are told


@dataclass(frozen=True, slots=True)
class Settings:
    """All but the users and the seed that the scores depend on."""

    recipe: Recipe
    evaluation: EvaluationSection
    methods: MethodsSection


@dataclass(frozen=True, slots=True)
class Unit:
    """One method with one seed for some users; ``shared`` is the folder of what it trains on all of them."""

    method: str
    seed: int
    part: int
    splits: tuple[UserSplit, ...]
    digest: str
    shared: Path | None

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.method}-{self.seed}-{self.part}"

    @property
    def size(self) -> int:
        """Characters of its users' histories: larger units are begun first."""
        return sum(len(turn.text) for split in self.splits for turn in split.history)


def side_by_side(
    run: RunFolder,
    splits: Sequence[UserSplit],
    settings: Settings,
    section: CompareSection,
    *,
    pool: WorkerPool,
    progress_file: TextIO | None = None,
) -> dict[str, Any]:
    """Fit, ask and score every method, and compare them.

    Args:
        run: whose ``compare`` folder the files go to.
        splits: the users; those without test examples are left out.
        settings: what the scores depend on.
        section: which methods, and with how many seeds.
        pool: open workers that hold the base.
        progress_file: where progress goes; ``None``: standard output.

    Returns:
        What :func:`milp_ray.evaluation.compare.compare` returns, over scores that are means over the seeds
        (``together``: over the answers of all seeds);
        ``costs`` (method → :class:`milp_ray.methods.Costs` as a dict) and ``n_seeds``.

    Raises:
        MilpError: no user has a test example, or a method fails: with its name and the reason.
    """
    import pyarrow as pa

    asked = [split for split in splits if split.test]
    if not asked:
        raise MilpError(
            f"none of {len(splits)} users has test examples, so there is nothing to compare; lower "
            "users.split.train or users.split.validation, or give users more examples"
        )
    folder = run.compare
    units = list(_units(folder, asked, settings, section))
    open_units = [unit for unit in units if _costs(folder, unit) is None]
    _share_first(folder, open_units, asked, settings, pool, progress_file)
    with progress(STAGE, len(units), unit="units", file=progress_file) as bar:
        for _ in range(len(units) - len(open_units)):
            bar.advance(worked=False)
        work = partial(_score_units, settings)
        for outcome in pool.map(
            work, open_units, key=lambda unit: unit.name, size=lambda unit: unit.size, at_once=1
        ):
            if outcome.failed:
                raise MilpError(f"{outcome.key}: {outcome.reason}")
            [unit] = [unit for unit in open_units if unit.name == outcome.key]
            rows, costs = outcome.value
            write_scores(_scores_file(folder, unit), rows, {s.user_id: unit.digest for s in unit.splits})
            write_json(_costs_file(folder, unit), {"digest": unit.digest, "costs": costs})
            bar.advance()
    answers = pa.concat_tables([read_scores(_scores_file(folder, unit)) for unit in units])
    table = _mean_over_seeds(answers)
    write_scores(folder / "scores.parquet", [table], {})
    methods = in_order(section.methods)
    pairs = [(one, other) for one in AHEAD for other in methods if other != one]
    found = {
        **compare(table, settings.evaluation, settings.recipe.seed, pairs, answers=answers),
        "costs": {method: _costs_of(folder, units, method) for method in methods},
        "n_seeds": section.n_seeds,
    }
    write_json(folder / "comparison.json", found)
    return found


def _units(
    folder: Path, splits: Sequence[UserSplit], settings: Settings, section: CompareSection
) -> Iterator[Unit]:
    """Every method with every seed; one that trains nothing with the first alone."""
    for method in in_order(section.methods):
        n_seeds = section.n_seeds if method not in INFO or INFO[method].is_trained else 1
        for seed in range(settings.recipe.seed, settings.recipe.seed + n_seeds):
            of_seed = replace(settings, recipe=replace(settings.recipe, seed=seed))
            everybody = _digest(method, of_seed, splits)
            shared = folder / "shared" / f"{method}-{seed}-{everybody[:16]}" if is_shared(method) else None
            for part, start in enumerate(range(0, len(splits), _USERS_A_UNIT)):
                some = tuple(splits[start : start + _USERS_A_UNIT])
                digest = everybody if shared is not None else _digest(method, of_seed, some)
                yield Unit(method, seed, part, some, digest, shared)


def _share_first(
    folder: Path,
    units: Sequence[Unit],
    splits: Sequence[UserSplit],
    settings: Settings,
    pool: WorkerPool,
    progress_file: TextIO | None,
) -> None:
    """Train what methods train on all users together, where that is not there yet."""
    wanted = {unit.shared: unit for unit in units if unit.shared is not None and not unit.shared.is_dir()}
    if not wanted:
        return
    with progress(f"{STAGE}: for all users", len(wanted), unit="methods", file=progress_file) as bar:
        work = partial(_share_units, settings, tuple(splits))
        for outcome in pool.map(
            work, wanted.values(), key=lambda unit: unit.name, size=lambda unit: unit.size, at_once=1
        ):
            if outcome.failed:
                raise MilpError(f"{outcome.key}: {outcome.reason}")
            bar.advance()


# ------------------------------------------------------------------------------------------- in a worker


def _share_units(
    settings: Settings,
    splits: Sequence[UserSplit],
    base: Base,
    units: Sequence[Unit],
    report: Callable[[int, Any], None],
) -> None:
    """Train a method's part for all users, into its folder."""
    from milp_ray.methods import share

    for place, unit in enumerate(units):
        assert unit.shared is not None
        recipe, subjects = settings.recipe, _subjects(unit, settings, splits)
        how = recipe.layout, recipe.training, recipe.prompt, settings.evaluation, settings.methods
        requests = requests_of(base, subjects, *how)
        started = time.perf_counter()
        made = share(unit.method, requests)
        if made is None:
            raise MilpError("its function share returned None; return a milp_ray.methods.shared.Shared")
        made = replace(made, facts={**made.facts, "seconds": time.perf_counter() - started})
        temporary = unit.shared.with_name(f".{unit.shared.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        made.save(temporary)
        temporary.rename(unit.shared)
        report(place, None)


def _score_units(
    settings: Settings, base: Base, units: Sequence[Unit], report: Callable[[int, Any], None]
) -> None:
    """Fit, ask and score; the rows of a unit, and what it cost."""
    from milp_ray.methods.shared import Shared

    for place, unit in enumerate(units):
        costs: dict[str, Costs] = {}
        shared = {unit.method: Shared.load(unit.shared)} if unit.shared is not None else {}
        recipe = settings.recipe
        rows = evaluate_users(
            base,
            _subjects(unit, settings, unit.splits),
            [unit.method],
            recipe.layout,
            recipe.training,
            recipe.prompt,
            settings.evaluation,
            settings=settings.methods,
            shared=shared,
            costs=costs,
        )
        own = costs[unit.method]
        if shared:
            own.shared_seconds = shared[unit.method].facts["seconds"]
        report(place, ([row for of_user in rows for row in of_user], asdict(own)))


def _subjects(unit: Unit, settings: Settings, splits: Sequence[UserSplit]) -> list[Subject]:
    recipe = replace(settings.recipe, seed=unit.seed)
    return [Subject(split, None, recipe.seed_of(split.user_id)) for split in splits]


# ------------------------------------------------------------------------------------------------- files


def _scores_file(folder: Path, unit: Unit) -> Path:
    return folder / "units" / f"{unit.name}.parquet"


def _costs_file(folder: Path, unit: Unit) -> Path:
    return folder / "units" / f"{unit.name}.json"


def _costs(folder: Path, unit: Unit) -> Costs | None:
    """What a unit cost, where it is finished and nothing has changed since."""
    path = _costs_file(folder, unit)
    if not path.is_file() or not _scores_file(folder, unit).is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return Costs(**found["costs"]) if found["digest"] == unit.digest else None


def _digest(method: str, settings: Settings, splits: Sequence[UserSplit]) -> str:
    """Hash of what a unit's scores are made from."""
    recipe = settings.recipe.digest()
    users = []
    for split in splits:
        test = [[e.query, e.response, e.kind, e.answer, sorted(e.tags.items())] for e in split.test]
        rejected = [e.rejected for e in split.train]
        users.append([split.user_id, fingerprint(recipe, split), split.profile, test, rejected])
    # Without defaults, so that a method that comes new to the package does not make the others' scores old.
    given = settings.methods.model_dump(mode="json", exclude_defaults=True)
    sections = [given, settings.evaluation.max_new_tokens, *closed_questions(settings.evaluation)]
    data = json.dumps([_FORMAT, method, sections, users, *_own_code(method)])
    return hashlib.sha256(data.encode("ascii")).hexdigest()


def _own_code(method: str) -> list[str]:
    """Hash of the file of a method that does not come with the package; nothing where there is none."""
    if method in INFO:
        return []
    try:
        found = find_spec(method)
    except ImportError:  # told where the method is called
        return []
    if found is None or found.origin is None or not Path(found.origin).is_file():
        return []
    return [hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()]


# ------------------------------------------------------------------------------------ over seeds and users


def _mean_over_seeds(answers: pa.Table) -> pa.Table:
    """One row a (user, method, example): means over the seeds; what has no mean is the first seed's."""
    import pyarrow as pa
    import pyarrow.compute as pc

    keys = ["user_id", "method", "example"]
    how = {name: "mean" if name in _MEASURED else "first" for name in COLUMNS if name not in keys}
    first = pc.ScalarAggregateOptions(skip_nulls=False)  # else a null would become a later seed's value
    wanted = [(name, kind, first if kind == "first" else None) for name, kind in how.items()]
    grouped = answers.group_by(keys, use_threads=False).aggregate(wanted)
    columns = [grouped[f"{name}_{how[name]}" if name in how else name] for name in COLUMNS]
    return pa.table(columns, names=list(COLUMNS)).cast(schema())


def _costs_of(folder: Path, units: Sequence[Unit], method: str) -> dict[str, Any]:
    """The means of a method's units, by their users or answers; a shared part is paid once a seed."""
    own = [(unit, costs) for unit in units if unit.method == method if (costs := _costs(folder, unit))]
    n_users = sum(len(unit.splits) for unit, _ in own)
    n_answers = sum(costs.n_answers for _, costs in own)

    def by_users(name: str) -> float:
        total = sum(len(unit.splits) * getattr(costs, name) for unit, costs in own)
        return float(total / n_users) if n_users else 0.0

    def by_answers(name: str) -> float:
        total = sum(costs.n_answers * getattr(costs, name) for _, costs in own)
        return float(total / n_answers) if n_answers else 0.0

    return asdict(
        Costs(
            training_seconds=by_users("training_seconds"),
            shared_seconds=by_users("shared_seconds"),
            stored_bytes=by_users("stored_bytes"),
            shared_bytes=round(by_users("shared_bytes")),
            prompt_tokens=by_answers("prompt_tokens"),
            answer_seconds=by_answers("answer_seconds"),
            n_answers=n_answers,
        )
    )
