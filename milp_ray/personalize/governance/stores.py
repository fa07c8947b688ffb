"""The stores that adapters of a run have gone to: a later configuration may name another one.

Every store but the run folder's own is written into ``versions.json`` before anything is published to it, so
that forgetting and the audit visit it whatever the configuration says by then.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from milp_ray.errors import MilpError
from milp_ray.personalize.store.adapter_store import AdapterStore
from milp_ray.personalize.store.backend import local_path
from milp_ray.personalize.store.faults import StoreUnavailableError

if TYPE_CHECKING:
    from milp_ray.rundir import RunFolder


def remember_store(run: RunFolder, store: AdapterStore) -> None:
    """Write down that adapters of the run go to a store from now on; the caller holds the run."""
    place = _place(store.uri)
    known = run.other_stores()
    if place != _place(str(run.store)) and place not in known:
        run.record_facts(stores=[*known, place])


def stores_of(run: RunFolder, store: AdapterStore) -> list[AdapterStore]:
    """The store that is configured now, the run folder's own, and those of earlier configurations.

    Raises:
        MilpError: an earlier one is not there, so that it cannot be told what it holds.
    """
    stores = {_place(store.uri): store}
    if run.uri is not None or run.adapters.is_dir():
        stores.setdefault(_place(str(run.store)), AdapterStore(run.store))
    for uri in run.other_stores():
        if _place(uri) not in stores:
            stores[_place(uri)] = _earlier(run, uri)
    return list(stores.values())


def _earlier(run: RunFolder, uri: str) -> AdapterStore:
    store, folder = AdapterStore(uri), local_path(uri)
    try:
        if folder is not None and not folder.is_dir():
            raise StoreUnavailableError("there is no such folder")
        store.check(writable=False)
    except StoreUnavailableError as error:
        raise MilpError(
            f"adapters of {run.place} went to the store {uri} under an earlier configuration, and what it "
            f"holds cannot be told ({error}); make it available, or, where it was removed for good, take it "
            f'out of "stores" in {run.versions_file}'
        ) from None
    return store


def _place(uri: str) -> str:
    """A URI by which a store is known wherever a command is called."""
    folder = local_path(uri)
    return uri if folder is None else str(Path(folder).resolve())
