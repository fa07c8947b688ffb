"""``personalize``: the batch that makes every user's adapter, and the store that it goes to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from milp_ray.config.section import NonNegativeInt, Section


class EncryptionSection(Section):
    """Where the key is that adapters are encrypted with (AES-256-GCM); neither: they are stored in the clear.

    A key is 32 random bytes in base64 or hexadecimal (``openssl rand -base64 32``). Every machine with a
    worker reads it for itself: it is never sent, logged or stored.
    """

    key_env: str | None = None  # name of the environment variable that holds it
    key_file: Path | None = None  # the file that holds it, the same path on every machine

    @model_validator(mode="after")
    def _one_place(self) -> EncryptionSection:
        if self.key_env is not None and self.key_file is not None:
            raise ValueError(
                f"key_env is {self.key_env!r} and key_file is {str(self.key_file)!r}: a key comes from one "
                "place; leave one of them out"
            )
        return self


AdapterPrecision = Literal["float32", "bfloat16", "int8"]
LayoutMode = Literal["chosen", "race", "portfolio"]


class RaceSection(Section):
    """Successive halving among layouts of the front, by each user's own validation loss."""

    # The chosen one, and the others of the front with the lowest validation loss in the search.
    max_layouts: Annotated[int, Field(ge=2, le=64)] = 4
    reduction: Annotated[int, Field(ge=2, le=8)] = 2  # a rung lets the better one in so many go on


class PortfolioSection(Section):
    """A user's layout by what the search measured on similar probe users."""

    # Weight of "no layout is better than the chosen one" in a prediction, in probe users exactly like the
    # user: the larger, the more evidence another layout needs. 0: what was measured is taken as it is.
    shrinkage: Annotated[float, Field(ge=0.0)] = 1.0


class PersonalizeSection(Section):
    """The batch that makes every user's adapter."""

    n_workers: PositiveInt | None = None  # None: as many as the cluster's resources allow
    cpus_per_worker: PositiveFloat = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0.0)] = 0.0
    # Where the adapters go: a folder that every worker sees, s3://BUCKET/… or gs://BUCKET/…
    # None: `adapters/` in the run folder. Runs that share one publish versions of the same users.
    store: str | None = None
    # How weights are stored; they are read as float32. int8 keeps one scale a rank component;
    # `milp-ray store precision` measures what it costs.
    adapter_precision: AdapterPrecision = "float32"
    encryption: EncryptionSection = EncryptionSection()
    # Both go into each adapter's manifest. An adapter older than its days is not served, and
    # `milp-ray store gc --expired` removes it; None: it may be kept.
    purpose: str | None = None  # what the adapters are for, in words
    retention_days: PositiveInt | None = None

    # Of a user whose worker was lost while it worked on that user alone; a worker that is lost with its node
    # (a preempted machine) does not count. 1: who kills two workers is set aside.
    max_retries: NonNegativeInt = 1
    # A worker that takes so many times as long as others would with as much, and ten minutes at least, has
    # hung: it is ended, and its users are tried again; None: it is waited for.
    patience: Annotated[float, Field(ge=2.0)] | None = 20.0
    # A user with more to train on is set aside rather than hold up others for hours; None: nobody is.
    max_characters: PositiveInt | None = 4_000_000

    # Which layout a user gets. chosen: the one that was chosen for all. race: several of the front are begun
    # for each user, and the worse ones stopped by the user's validation loss; costs about twice the training.
    # portfolio: the one that did best on similar probe users of the search, where that is surer than its
    # own error; costs nothing. Both fall back to the chosen one, and every manifest says why.
    layout: LayoutMode = "chosen"
    race: RaceSection = RaceSection()
    portfolio: PortfolioSection = PortfolioSection()
    # race and portfolio: only layouts whose adapters are at most so many times as large as the chosen one's.
    # Larger ones mostly have the lower validation loss, and the choice has weighed that already; None: any.
    max_growth: Annotated[float, Field(gt=0.0)] | None = 1.0

    @model_validator(mode="after")
    def _a_known_kind_of_store(self) -> PersonalizeSection:
        kind, separator, _ = (self.store or "").partition("://")
        if separator and kind not in {"file", "s3", "gs"}:
            raise ValueError(
                f"store is {self.store!r}: give a folder, s3://BUCKET/… or gs://BUCKET/…, or leave it out"
            )
        return self
