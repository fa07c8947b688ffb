"""Forget a user, or single items of one: in steps that can be repeated, so that a kill costs nothing.

The first step is a line in the run's record: from then on the user is neither trained nor served, whatever
becomes of this process. The last one is the signed-off line, written only after an audit has found nothing.
What lies between is done again by the same command after an interruption.

What stays, and says nothing about one person any more: the means of a search over all its probe users (the
journal's objective values), the layout that was chosen by them, and counts. What was a mean over all users
(summary, report) is removed and made again from the others' rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from milp_ray.errors import MilpError
from milp_ray.personalize.governance import traces
from milp_ray.personalize.governance.audit import Audit, audit_user, finder_of
from milp_ray.personalize.governance.record import Record
from milp_ray.personalize.governance.stores import stores_of
from milp_ray.personalize.governance.traces import Removed
from milp_ray.personalize.store import AdapterDamagedError, AdapterStore
from milp_ray.personalize.store.names import hash_id, shown

if TYPE_CHECKING:
    from milp_ray.config import Config
    from milp_ray.personalize.governance.needles import IdFinder
    from milp_ray.rundir import RunFolder

Rebuild = Callable[["RunFolder"], object]
Tell = Callable[[str], None]
Step = tuple[str, Callable[[], Removed]]


@dataclass
class Forgotten:
    """What became of a call. ``line`` is the number of the signed-off line, ``None`` of a dry run."""

    removed: list[Removed] = field(default_factory=list)
    audit: Audit | None = None
    line: int | None = None
    was_forgotten: bool = False  # by an earlier call
    remade_report: bool = False

    @property
    def count(self) -> int:
        """Things that were removed, or would be."""
        return sum(removed.count for removed in self.removed)


@dataclass(frozen=True)
class _Work:
    run: RunFolder
    config: Config
    store: AdapterStore
    record: Record
    user_id: str
    dry_run: bool
    rebuild: Rebuild | None
    tell: Tell

    @property
    def has_report(self) -> bool:
        """Whether there is one now, or the summary that comes with it."""
        return self.run.report.is_dir() or self.run.summary_file.is_file()

    @cached_property
    def stores(self) -> list[AdapterStore]:
        """The configured store, and those of earlier configurations."""
        return stores_of(self.run, self.store)


def forget_user(
    run: RunFolder,
    config: Config,
    store: AdapterStore,
    user_id: str,
    *,
    by: str,
    rebuild: Rebuild | None = None,
    dry_run: bool = False,
    tell: Tell = lambda step: None,
) -> Forgotten:
    """Remove everything of a user from a run and its store, and record that; the caller holds the run.

    Args:
        run: the run; it and its store are searched afterwards.
        config: the run's.
        store: where the run's adapters are.
        user_id: who; nothing needs to be there.
        by: who answers for it, for the record.
        rebuild: makes summary and report again, where they were there; ``None``: they are only removed.
        dry_run: say what would be removed, and change nothing.
        tell: called with a step's name before it is done.

    Raises:
        MilpError: something could not be removed, or was found afterwards: the files are named, the user
            stays refused, and the same command goes on.
    """
    work = _Work(run, config, store, Record(run.path), user_id, dry_run, rebuild, tell)
    result = Forgotten(was_forgotten=work.record.is_forgotten(user_id))
    had_report = work.has_report
    user = ""
    if not dry_run:
        tell("record")
        work.record.ensure_key()
        user = work.record.user_key(user_id)
        begun = work.record.state.forgetting.get(user)
        if begun is None:
            begun = work.record.append("forget_begun", user, by, had_report=had_report)
        had_report = had_report or bool(begun.get("had_report"))
    _remove(work, _user_steps(work), had_report, result)
    if dry_run:
        return result
    tell("audit")
    result.audit = audit_user(run, store, config.users, user_id)
    _refuse_leftovers(result.audit, user_id)
    tell("sign off")
    result.line = work.record.append("forgotten", user, by, **_counts(result))["n"]
    result.audit.unfinished = 0
    return result


def forget_items(
    run: RunFolder,
    config: Config,
    store: AdapterStore,
    user_id: str,
    hashes: Sequence[str],
    *,
    by: str,
    rebuild: Rebuild | None = None,
    dry_run: bool = False,
    tell: Tell = lambda step: None,
) -> Forgotten:
    """Take items of a user out of everything to come, and remove what was made with them.

    The items' hashes go onto the run's list of what is excluded, by which every later stage leaves them out;
    the adapter versions made before that are removed, as are the user's scores. Arguments as of
    :func:`forget_user`; ``hashes`` as :func:`milp_ray.personalize.governance.items.resolve` gives them.

    Raises:
        MilpError: the user was forgotten.
    """
    work = _Work(run, config, store, Record(run.path), user_id, dry_run, rebuild, tell)
    if work.record.is_forgotten(user_id):
        raise MilpError(
            f"there is no user {shown(user_id)} in {run.place}: nothing is left to take items from"
        )
    result = Forgotten()
    had_report = work.has_report
    since: datetime | None = None
    user, items = "", []
    if not dry_run:
        tell("record")
        work.record.ensure_key()
        user = work.record.user_key(user_id)
        items = sorted(work.record.item_key(user, sha256) for sha256 in hashes)
        own, done = work.record.state.items.get(user, {}), work.record.state.items_done.get(user, set())
        fresh = [item for item in items if item not in own]
        if fresh:
            line = work.record.append("item_forget_begun", user, by, items=fresh, had_report=had_report)
            own = {**own, **dict.fromkeys(fresh, line)}
        open_items = [item for item in items if item not in done]
        result.was_forgotten = not open_items
        if result.was_forgotten:
            return result
        since = max(datetime.fromisoformat(own[item]["time"]) for item in open_items)
        had_report = had_report or any(own[item].get("had_report") for item in open_items)
    _remove(work, _item_steps(work, since), had_report, result)
    if dry_run:
        return result
    tell("sign off")
    result.line = work.record.append("items_forgotten", user, by, items=items, **_counts(result))["n"]
    return result


# ------------------------------------------------------------------------------------------------- the steps


def _remove(work: _Work, steps: Sequence[Step], had_report: bool, result: Forgotten) -> None:
    """Take the steps; then the report is made again, where there was one."""
    for name, step in steps:
        work.tell(name)
        result.removed.append(step())
    if had_report and work.rebuild is not None and not work.dry_run:
        work.tell("report again")
        result.remade_report = _rebuilt(work.run, work.rebuild)


def _user_steps(work: _Work) -> list[Step]:
    """What is to be done for a user, in order."""
    run, dry_run = work.run, work.dry_run
    finder = finder_of(work.user_id, run, work.store, work.config.users)
    pseudonym = "forgotten-" + (work.record.user_key(work.user_id)[:16] or "…")
    return [
        ("adapters", partial(_adapters, work)),
        *_file_steps(work, finder, pseudonym),
        ("search", lambda: traces.search_values(run, _probe_place(run, work.user_id, pseudonym), dry_run)),
        ("facts", partial(traces.facts, run, finder, pseudonym, dry_run)),
        ("dataset hash", partial(traces.dataset_hashes, run, dry_run)),
    ]


def _item_steps(work: _Work, since: datetime | None) -> list[Step]:
    """What is to be done for items; ``since``: when they were excluded, ``None`` for a dry run."""
    finder = finder_of(work.user_id, work.run, work.store, work.config.users)
    return [
        ("adapters", partial(_versions_before, work, since)),
        # The lines are failures and refused updates: what they say was found on data that holds the items.
        *_file_steps(work, finder, None),
        ("dataset hash", partial(traces.dataset_hashes, work.run, work.dry_run)),
    ]


def _file_steps(work: _Work, finder: IdFinder, pseudonym: str | None) -> list[Step]:
    """The run's files; the report goes before the rows that it was made from.

    ``pseudonym``: takes the id's place in what is other users'; ``None``: mentions stay.
    """
    run, dry_run = work.run, work.dry_run
    return [
        ("temporary files", partial(traces.temporary_files, run, dry_run)),
        ("own files", partial(traces.own_files, run, finder, dry_run)),
        ("leakage audit", partial(traces.leakage_audit, run, finder, dry_run)),
        ("report", partial(traces.pages, run, dry_run)),
        ("tables", partial(traces.tables, run, finder, dry_run, pseudonym)),
        ("lines", partial(traces.lines, run, finder, dry_run, pseudonym)),
    ]


def _probe_place(run: RunFolder, user_id: str, pseudonym: str) -> int | None:
    """The user's place among the probe users of the search; also where the id is a pseudonym by now."""
    probes = run.facts().get("probe_users") or []
    return next((place for place, name in enumerate(probes) if name in (user_id, pseudonym)), None)


def _adapters(work: _Work) -> Removed:
    """Every version, whole or half-written, damaged or sealed."""
    removed = Removed("versions of the adapter")
    place = hash_id(work.user_id)
    for store in work.stores:
        removed.count += len(store.backend.find(place)) + len(store.backend.leftovers(place))
        if not work.dry_run:
            # Also where nothing is seen: a deletion that was interrupted is finished by repeating it.
            store.backend.delete(place)
    return removed


def _versions_before(work: _Work, since: datetime | None) -> Removed:
    """Versions made before the items were excluded, and any whose manifest does not say when."""
    removed = Removed("versions of the adapter")
    place = hash_id(work.user_id)
    for store in work.stores:
        # The newest goes last: until then no older one is the current version.
        for number, spot in sorted(store.backend.find(place).items()):
            try:
                created = datetime.fromisoformat(store.manifest_at(place, number, spot).created)
            except AdapterDamagedError:
                created = None
            if since is None or created is None or created <= since:
                removed.count += 1
                if not work.dry_run:
                    store.backend.delete_version(place, number, spot)
        for leftover in store.backend.leftovers(place):
            removed.count += 1
            if not work.dry_run:
                store.backend.remove(leftover)
    return removed


def _rebuilt(run: RunFolder, rebuild: Rebuild) -> bool:
    """Whether there was enough left to make the report from."""
    try:
        rebuild(run)
    except MilpError:
        return False
    return True


def _refuse_leftovers(audit: Audit, user_id: str) -> None:
    found = [f"  {where}: {', '.join(kinds)}" for where, kinds in audit.found]
    found += [f"  {where}: {why}" for where, why in audit.unread]
    if found:
        raise MilpError(
            f"user {shown(user_id)} is refused from now on, but not all could be removed:\n"
            + "\n".join(found[:20])
            + "\nRemove what these files hold of the user by hand, or what stands in the way, and run the "
            "same command again; it is not signed off before that"
        )


def _counts(result: Forgotten) -> dict[str, Any]:
    """What the record says of the work: numbers alone."""
    counts: dict[str, Any] = {"removed": {removed.what: removed.count for removed in result.removed}}
    if result.audit is not None:
        found = result.audit
        counts["audit"] = {
            "files": found.scan.n_files,
            "bytes": found.scan.n_bytes,
            **({"objects": found.n_objects, "object_bytes": found.n_object_bytes} if found.buckets else {}),
            "items_sought": found.n_needles,
            "found": len(found.found),
        }
    return counts
