"""``users``: who is personalised, where their records are, and how their examples are split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, PositiveInt, WithJsonSchema, model_validator

from milp_ray.config.section import Fraction, NonNegativeInt, Section


class PersonaWorldSection(Section):
    """How many embedded users to make; see :mod:`milp_ray.users.persona_world`."""

    n_short_users: NonNegativeInt = 12  # histories that fit the embedded base's context
    n_long_users: NonNegativeInt = 4  # histories several times the context
    long_turns: tuple[PositiveInt, PositiveInt] = (180, 240)  # of a long history: at least, at most
    n_examples: PositiveInt = 50  # query → response pairs of a user, all splits together

    @model_validator(mode="after")
    def _least_turns_come_first(self) -> PersonaWorldSection:
        if self.long_turns[0] > self.long_turns[1]:
            raise ValueError(f"long_turns is {list(self.long_turns)}; give [at least, at most]")
        return self


class SplitSection(Section):
    """Shares of a user's examples, in time order; the rest is test."""

    train: Fraction = 0.7
    validation: Fraction = 0.1

    @model_validator(mode="after")
    def _leaves_a_test_share(self) -> SplitSection:
        if self.train + self.validation >= 1.0:
            raise ValueError(
                f"train {self.train} + validation {self.validation} leaves nothing for test; "
                "keep the sum below 1"
            )
        return self


def _path_or_uri(value: Any) -> Any:
    """A path, or the text of a URI, which as a path would lose a slash."""
    if not isinstance(value, str) or "://" not in value:
        return Path(value) if isinstance(value, str) else value
    parts = urlsplit(value)
    if parts.scheme == "file":
        return Path(parts.path)
    if "@" in parts.netloc:
        raise ValueError(
            f"a URI holds no credentials ({parts.scheme}://BUCKET/…), as it is written into the run folder: "
            "they come from the environment or the provider's own files"
        )
    return value


Source = Annotated[Path | str, BeforeValidator(_path_or_uri), WithJsonSchema({"type": "string"})]


UsersFormat = Literal[
    "persona_world",
    "jsonl",
    "parquet",
    "malp",
    "amazon_qa",
    "reddit_msp",
    "reddit_pchatbot",
    "personachat",
    "lamp",
    "memorybank",
    "casino",
]


class UsersSection(Section):
    """Who is personalised."""

    # The embedded users, users files, or a published dataset's own files (milp_ray/users/<format>.py).
    format: UsersFormat = "persona_world"
    # Files to read, relative to the working directory; of jsonl and parquet also files or folders by URI:
    # s3://BUCKET/…, gs://BUCKET/…, or what an installed fsspec filesystem knows.
    paths: tuple[Source, ...] = ()
    limit: PositiveInt | None = None  # at most so many users, in the order of the files
    # Users whose record says nothing about consent. required: they are neither trained nor served.
    consent: Literal["assumed", "required"] = "assumed"
    persona_world: PersonaWorldSection = PersonaWorldSection()
    split: SplitSection = SplitSection()

    @model_validator(mode="after")
    def _files_have_paths(self) -> UsersSection:
        if self.format != "persona_world" and not self.paths:
            raise ValueError(f"format {self.format!r} reads files: name at least one under users.paths")
        by_uri = self.format in {"jsonl", "parquet"}
        if not by_uri and any(isinstance(path, str) for path in self.paths):
            raise ValueError(
                f"format {self.format!r} reads files of this machine: give paths under users.paths, no URI"
            )
        return self
