"""The probe users of a run: whom its search measures layouts on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from milp_ray.errors import MilpError

if TYPE_CHECKING:
    from milp_ray.pipeline.work import Work
    from milp_ray.users.records import UserSplit


def probe_users(splits: Sequence[UserSplit], n: int, seed: int) -> list[UserSplit]:
    """The users that a search measures layouts on: a seeded sample of those with validation examples.

    Raises:
        MilpError: fewer than ``n`` users have any.
    """
    able = [split for split in splits if split.validation and (split.history or split.train)]
    if len(able) < n:
        raise MilpError(
            f"search.n_probe_users is {n}, but {len(able)} of {len(splits)} users have validation examples "
            "and something to train on; lower it, or raise users.split.validation"
        )
    chosen = set(random.Random(f"probe users {seed}").sample(range(len(able)), n))
    return [split for index, split in enumerate(able) if index in chosen]


def probes_of(work: Work) -> list[UserSplit] | None:
    """The probe users; those that the search began with, whoever else came or went since.

    ``None``: the search is finished, and one of them was forgotten or has gone, wholly or in part, or has
    other data by now. What it found stays; nothing more can be measured on the same users.

    Raises:
        MilpError: so it is, and the search is not finished.
    """
    from milp_ray.search.journal import read_study

    search, by_id = work.config.search, {split.user_id: split for split in work.splits}
    state = read_study(work.run.journal)
    names = work.run.facts().get("probe_users")
    if state.header is None or not names:
        return probe_users(work.splits, search.n_probe_users, work.config.seed)
    n_gone = sum(name not in by_id or work.gate.is_trimmed(name) for name in names)
    n_ended = sum(trial.has_ended for trial in state.trials)
    if not n_gone:
        probes = [by_id[name] for name in names]
        if state.finished is None or not _have_changed(work, probes):
            return probes
        work.say(
            f"the search stays as it is, with {n_ended} trials: the data of users that it measured on have "
            "changed since; --fresh searches again"
        )
        return None
    what = f"{n_gone} of the {len(names)} users that the search measured on were forgotten or have gone"
    if state.finished is None:
        raise MilpError(
            f"{what}, so that its {n_ended} trials cannot be followed by comparable ones; go on from them "
            "with `milp-ray choose`, or search again with --fresh (who was forgotten stays so)"
        )
    work.say(f"the search stays as it is, with {n_ended} trials: {what}")
    return None


def _have_changed(work: Work, probes: Sequence[UserSplit]) -> bool:
    from milp_ray.search.study import StudySettings, users_have_changed
    from milp_ray.training.shapes import base_shapes

    config = work.config
    return users_have_changed(work.run.study, StudySettings.of(config), probes, base_shapes(config.base))
