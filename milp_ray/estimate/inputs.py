"""What an estimate starts from: the base's sizes without its weights, and how much its users have said."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from milp_ray.errors import MilpError
from milp_ray.search.measure import trial_parts
from milp_ray.training.published import PUBLISHED_MODELS, published_config, published_id
from milp_ray.training.workload import CharacterTokens, TokenizerTokens, UserWork, invented_work, user_work

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from milp_ray.config import Config
    from milp_ray.config.base import BaseSection
    from milp_ray.config.training import TrainingSection
    from milp_ray.training.data import TextTokens
    from milp_ray.training.model_shape import ModelShape
    from milp_ray.users.records import UserSplit

_MOST_COUNTED = 200  # users; more change a mean by little and cost seconds each
_BOTH_PARTS = frozenset({"memory", "instruction"})


@dataclass(frozen=True, slots=True)
class Numbers:
    """Users told by numbers instead of files: their count, and the tokens and examples of each."""

    n_users: int
    history_tokens: int = 2000
    n_examples: int = 50
    example_tokens: int = 64

    @classmethod
    def given(
        cls,
        n_users: int | None,
        history_tokens: int | None,
        n_examples: int | None,
        example_tokens: int | None,
    ) -> Numbers | None:
        """The numbers of the command line; ``None`` where there are none.

        Raises:
            MilpError: there are some, but not of users.
        """
        others = {
            "history_tokens": history_tokens,
            "n_examples": n_examples,
            "example_tokens": example_tokens,
        }
        stated = {name: value for name, value in others.items() if value is not None}
        if n_users is not None:
            return cls(n_users, **stated)
        if stated:
            raise MilpError(
                "--history-tokens, --examples and --example-tokens tell of invented users: give --users, too"
            )
        return None


@dataclass(frozen=True, slots=True)
class KnownBase:
    """A base's sizes; ``source`` says where they are from, ``is_published`` that they are this package's."""

    model: str
    shape: ModelShape
    source: str
    is_published: bool


@dataclass(frozen=True, slots=True)
class Cohort:
    """The users of a run.

    ``trial`` is what a search does for an average probe user, ``batch`` what making an average user's adapter
    does. ``source`` says how they were counted.
    """

    n_users: int
    trial: UserWork
    batch: UserWork
    source: str


def known_base(section: BaseSection, dtype_bytes: int) -> KnownBase:
    """Sizes of the base that ``section`` names, from its configuration alone.

    A folder and an id in the local cache tell their own; the paper's bases are known without any; for others
    the configuration is fetched.

    Raises:
        MilpError: the configuration cannot be had, or is of no model that can carry an adapter.
    """
    from milp_ray.training.base import EMBEDDED, model_config
    from milp_ray.training.model_shape import shape_of_config

    def shape(config: PretrainedConfig) -> ModelShape:
        return shape_of_config(config, dtype_bytes=dtype_bytes, ffn_modules=section.ffn_modules)

    model = section.model
    if model == EMBEDDED or Path(model).expanduser().is_dir():
        return KnownBase(model, shape(model_config(section)), "its own configuration", False)
    published = published_id(model)
    if published is not None:
        cached = _cached_config(section)
        if cached is not None:
            return KnownBase(model, shape(cached), "its own configuration, in the local cache", False)
        return KnownBase(
            model, shape(published_config(published)), f"the published sizes of {published}", True
        )
    try:
        config = model_config(section)
    except MilpError as error:
        known = ", ".join(PUBLISHED_MODELS)
        raise MilpError(f"{error}. Without any network the sizes of these are known: {known}") from error
    return KnownBase(model, shape(config), "its own configuration", False)


def cohort(config: Config, base: KnownBase, numbers: Numbers | None, context: int) -> Cohort:
    """How much the users of ``config`` hold, counted, or as ``numbers`` say; ``context`` as it is used.

    Raises:
        MilpError: the files are not there, or hold nobody who could be trained on.
    """
    if numbers is not None:
        return _invented(config, numbers, context)
    splits = _splits(config)
    step = -(-len(splits) // _MOST_COUNTED)
    counted = splits[::step]
    tokens, how = _tokens(config, base)
    measurable = [split for split in counted if split.validation] or counted
    new = config.evaluation.max_new_tokens

    def work(some: list[UserSplit], training: TrainingSection, parts: frozenset[str]) -> UserWork:
        return user_work(
            some, tokens, training, config.prompt, parts=parts, context_length=context, max_new_tokens=new
        )

    return Cohort(
        n_users=len(splits),
        trial=work(measurable, trial_training(config), trial_parts(config.search.trial_stages)),
        batch=work(counted, config.training, _BOTH_PARTS),
        source=f"{how}, of {len(counted)} users" if step > 1 else how,
    )


def trial_training(config: Config) -> TrainingSection:
    """The recipe of a trial: the users', with ``search.trial_epochs`` where that is given."""
    epochs = config.search.trial_epochs
    if epochs is None:
        return config.training
    return config.training.model_copy(update={"memory_epochs": epochs, "instruction_epochs": epochs})


def _invented(config: Config, numbers: Numbers, context: int) -> Cohort:
    from milp_ray.users.splits import part_sizes

    n_train, n_validation = part_sizes(numbers.n_examples, config.users.split)

    def work(training: TrainingSection, parts: frozenset[str]) -> UserWork:
        return invented_work(
            training,
            history_tokens=numbers.history_tokens,
            n_train=n_train,
            n_validation=n_validation,
            example_tokens=numbers.example_tokens,
            parts=parts,
            context_length=context,
            max_new_tokens=config.evaluation.max_new_tokens,
        )

    return Cohort(
        n_users=numbers.n_users,
        trial=work(trial_training(config), trial_parts(config.search.trial_stages)),
        batch=work(config.training, _BOTH_PARTS),
        source="as given on the command line",
    )


def _splits(config: Config) -> list[UserSplit]:
    from milp_ray.users.readers import read_users
    from milp_ray.users.splits import split_user

    missing = [str(path) for path in config.users.paths if isinstance(path, Path) and not path.exists()]
    if missing:
        raise MilpError(
            f"users.paths: {', '.join(missing)} is not there. Give the file, or numbers in its place: "
            "--users 1000 --history-tokens 2000 --examples 50"
        )
    users = read_users(config.users, config.seed).users
    splits = [split for split in (split_user(u, config.users.split) for u in users) if _trainable(split)]
    if not splits:
        raise MilpError(f"none of the {len(users)} users has a history or an example to train on")
    return splits


def _trainable(split: UserSplit) -> bool:
    return bool(split.history or split.train)


def _tokens(config: Config, base: KnownBase) -> tuple[TextTokens, str]:
    """The base's tokenizer, or a guess where there is none; and which it is, in words."""
    from milp_ray.training.base import load_tokenizer

    if not base.is_published:
        try:
            return TokenizerTokens(load_tokenizer(config.base)), "counted with the base's tokenizer"
        except MilpError:
            pass
    return CharacterTokens(), "guessed at four characters a token, for want of the base's tokenizer"


def context_length(config: Config, shape: ModelShape) -> int:
    """Tokens of the base's context, as far as the configuration has them used.

    Raises:
        MilpError: nothing states it, or it is longer than the base's or shorter than training.max_length.
    """
    context = config.base.context_length or shape.context_length
    if context < 1:
        raise MilpError(
            f"the configuration of {config.base.model!r} states no context: set base.context_length"
        )
    if shape.context_length and context > shape.context_length:
        raise MilpError(
            f"base.context_length {context} is above the {shape.context_length} tokens of "
            f"{config.base.model!r}; use at most {shape.context_length}"
        )
    if config.training.max_length is not None and config.training.max_length > context:
        raise MilpError(
            f"training.max_length {config.training.max_length} is above the base's context of {context} "
            f"tokens; use at most {context}, or null for all of it"
        )
    return context


def _cached_config(section: BaseSection) -> PretrainedConfig | None:
    """What an earlier download left here; for a base of known sizes no network is asked."""
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            section.model, revision=section.revision, local_files_only=True
        )
    except (OSError, ValueError):
        return None
    if config.model_type == "roberta":
        config.is_decoder = True
    return config
