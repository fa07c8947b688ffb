"""The users files that ``personalize --users`` was given: noted by the run, to be read again for one user.

Their users have adapters like those of the configuration's files, so that what asks where a user still stands
has to look there, too. Only one user's records are kept of what is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from milp_ray.errors import MilpError
from milp_ray.users.records import User
from milp_ray.users.sources import SourceMissingError, find_users_files, lasting_source
from milp_ray.users.stream import UserStream

if TYPE_CHECKING:
    from milp_ray.rundir import RunFolder
    from milp_ray.users.problems import Problem


def note_given(run: RunFolder, sources: Sequence[str]) -> None:
    """Note what a batch is given, beside what earlier ones were given: their adapters are there still."""
    recorded = run.facts().get("batch_users") or {}
    noted = dict.fromkeys([*map(lasting_source, sources), *recorded.get("sources", ())])
    run.record_facts(batch_users={**recorded, "sources": list(noted)})


def records_given(
    run: RunFolder, user_id: str, besides: Sequence[Path | str] = ()
) -> Iterator[tuple[str, User | Problem] | MilpError]:
    """A user's records, each with its file, the latest files first; or why a path or URI cannot be read now.

    What is gone by now is passed over: the team may have removed it.

    Args:
        run: whose batches.
        user_id: who.
        besides: files that are read already.
    """
    known = {lasting_source(str(source)) for source in besides}
    for source in (run.facts().get("batch_users") or {}).get("sources", ()):
        if source in known:
            continue
        try:
            for file, _, item in UserStream(find_users_files([source])).records():
                if item.user_id == user_id:
                    yield file.name, item
        except SourceMissingError:
            continue
        except MilpError as error:
            yield error


def find_given(run: RunFolder, user_id: str) -> User | None:
    """One user of the files that batches were given; ``None`` where there is none.

    Raises:
        MilpError: the user is in none of the files that can be read, and one cannot be read now.
    """
    failed: MilpError | None = None
    for found in records_given(run, user_id):
        if isinstance(found, MilpError):
            failed = failed or found
        elif isinstance(found[1], User):
            return found[1]
    if failed is not None:
        raise failed
    return None
