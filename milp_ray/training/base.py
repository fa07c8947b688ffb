"""The frozen base: one causal language model that every adapter on a device shares."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.config.base import BaseSection
from milp_ray.data import EMBEDDED_BASE
from milp_ray.errors import MilpError
from milp_ray.memory.architecture import FfnShapes, FfnSpec, ffn_shapes, ffn_spec
from milp_ray.training.device import device_of, dtype_of, take_share
from milp_ray.training.token_cache import TokenCache

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"
# Encoders that transformers also builds as causal decoders, given ``is_decoder``.
_ENCODER_TYPES = frozenset({"bert", "roberta", "xlm-roberta", "camembert"})


@dataclass
class Base:
    """A loaded base and what training and generation must know about it.

    ``model`` is in eval mode and none of its parameters asks for a gradient. ``start_ids`` are the tokens
    that the tokenizer puts before a text by itself (bos, or nothing). ``first_position`` is the position id
    of a sequence's first token (RoBERTa counts from its padding token + 1). ``pad_id`` fills up the rows of
    a batch; no real token sees it, so that any id serves. ``device`` is where the weights lie,
    ``engine_device`` where an engine trains. ``device_share`` is the part of a GPU's memory that this process
    may take.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: FfnSpec
    shapes: FfnShapes
    n_layers: int
    context_length: int
    model_id: str
    revision: str | None
    device: torch.device
    dtype: torch.dtype
    engine_device: torch.device
    start_ids: tuple[int, ...] = ()
    eos_id: int = 0
    pad_id: int = 0
    first_position: int = 0
    device_share: float = 1.0
    tokens: TokenCache = field(default_factory=TokenCache, repr=False)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text, without special tokens."""
        return [len(ids) for ids in self.tokenize(texts)]


def load_base(section: BaseSection, *, share: float = 1.0) -> Base:
    """Load the base that ``section`` names, frozen and in eval mode, from safetensors only.

    ``share`` is the part of a GPU's memory that this process may take, from now on.

    Raises:
        MilpError: the folder or id is not there, has no safetensors weights or not all of the model's, is no
            causal language model that transformers knows, its tokenizer has no end token, the device or
            context cannot be had, or the weights do not fit the device.
    """
    import torch
    from torch import nn

    source, model_id = _source(section)
    device = device_of(section.device)
    dtype = dtype_of(section.dtype, device)
    with accelerator_choice(torch.device(device).type), _quiet_loading(), _worded_errors(section.model):
        from transformers import AutoModelForCausalLM

        config = _model_config(source, section.revision)
        ffn_spec(config, section.ffn_modules)  # an unknown architecture is refused before it is loaded
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=section.revision,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
        )
        model: PreTrainedModel = loaded[0]
        _check_complete(section.model, loaded[1])
        tokenizer = _tokenizer(source, section.revision)
    kept_on = torch.device("cpu" if section.keep_on == "cpu" else device)
    share = take_share(device, share)
    try:
        nn.Module.to(model, kept_on)
    except torch.OutOfMemoryError as error:
        raise MilpError(
            f"base.model {section.model!r} does not fit the {share:.0%} of {device!r} that this process has; "
            "give it a larger part of a GPU, or a base.dtype of fewer bytes"
        ) from error
    # Not "cuda" beside weights on "cuda:0": where the two differ, jobs are not packed.
    engine_device = torch.device(device) if section.keep_on == "cpu" else None
    base = base_around(model, tokenizer, section, model_id=model_id, engine_device=engine_device)
    base.device_share = share
    return base


def base_around(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    section: BaseSection,
    *,
    model_id: str,
    engine_device: torch.device | None = None,
) -> Base:
    """A model that is loaded, as a base: frozen and in eval mode, on the device where it is.

    ``engine_device`` is where engines train, where that is another one.

    Raises:
        MilpError: the tokenizer has no end token, or the context or feed-forward maps cannot be had.
    """
    config: PretrainedConfig = model.config
    model.eval().requires_grad_(False)
    spec = ffn_spec(config, section.ffn_modules)
    shapes = ffn_shapes(model, spec)
    first_position = first_position_of(model)
    eos_id = _eos_id(tokenizer, config, section.model)
    return Base(
        model=model,
        tokenizer=tokenizer,
        spec=spec,
        shapes=shapes,
        n_layers=shapes.n_layers,
        context_length=_context_length(config, first_position, section),
        model_id=model_id,
        revision=section.revision,
        device=model.device,
        dtype=model.dtype,
        engine_device=engine_device or model.device,
        start_ids=start_ids_of(tokenizer),
        eos_id=eos_id,
        pad_id=_pad_id(config, eos_id),
        first_position=first_position,
    )


def model_source(section: BaseSection) -> str:
    """The folder or Hugging Face id that ``section`` names; a folder exists and holds a ``config.json``.

    Raises:
        MilpError: it does not.
    """
    return _source(section)[0]


def model_config(section: BaseSection) -> PretrainedConfig:
    """The model's own configuration. Raises as :func:`load_base` where it cannot be had."""
    source = model_source(section)
    with _quiet_loading(), _worded_errors(section.model):
        return _model_config(source, section.revision)


def load_tokenizer(section: BaseSection) -> PreTrainedTokenizerBase:
    """The base's tokenizer alone. Raises as :func:`load_base` where it cannot be had."""
    source = model_source(section)
    with _quiet_loading(), _worded_errors(section.model):
        return _tokenizer(source, section.revision)


def _source(section: BaseSection) -> tuple[str, str]:
    """Where transformers loads from, and the id that an adapter's configuration names."""
    if section.model == EMBEDDED:
        folder = EMBEDDED_BASE
        if not (folder / "config.json").is_file():
            raise MilpError(
                "base.model is 'embedded', but the package holds no embedded base; reinstall milp_ray, or "
                "name a folder or a Hugging Face model id in base.model"
            )
        return str(folder), str(folder)
    path = Path(section.model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MilpError(
                f"base.model is the folder {section.model!r}, which holds no config.json; "
                "name a folder written by save_pretrained"
            )
        return str(path.resolve()), str(path.resolve())
    looks_like_a_path = section.model.startswith((".", "/", "~")) or section.model.count("/") > 1
    if looks_like_a_path or path.exists():
        raise MilpError(
            f"base.model {section.model!r} is no folder; give 'embedded', an existing folder with a model "
            "in it (relative to the working directory), or a Hugging Face model id"
        )
    return section.model, section.model


def _model_config(source: str, revision: str | None) -> PretrainedConfig:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, revision=revision)
    if config.model_type in _ENCODER_TYPES:
        config.is_decoder = True
    return config


def _check_complete(model: str, found: dict[str, Any]) -> None:
    """Refuse weights that transformers has drawn at random, in every process others, for want of stored ones.

    ``found`` is its loading info; weights that are tied to a stored one are not in it.
    """
    if missing := sorted(found["missing_keys"]):
        raise MilpError(
            f"base.model {model!r} lacks {len(missing)} of the weights that its config.json asks for, the "
            f"first of them {missing[0]!r}; use a causal language model that was saved whole, head included, "
            "and whose config.json states the stored number of layers"
        )
    if unequal := sorted(found["mismatched_keys"]):
        name, stored, asked = unequal[0]
        raise MilpError(
            f"base.model {model!r} holds {len(unequal)} weights of other sizes than its config.json states, "
            f"the first of them {name!r}: {tuple(stored)} is stored, {tuple(asked)} is stated; use the "
            "config.json that was saved with the weights"
        )


def _tokenizer(source: str, revision: str | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, revision=revision)
    return tokenizer


def _context_length(config: PretrainedConfig, first_position: int, section: BaseSection) -> int:
    stated = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if stated is None:
        if section.context_length is None:
            raise MilpError(
                f"the configuration of {section.model!r} states no context length; set base.context_length"
            )
        return section.context_length
    limit = int(stated) - first_position
    if section.context_length is not None and section.context_length > limit:
        raise MilpError(
            f"base.context_length {section.context_length} is above the {limit} tokens of {section.model!r}; "
            f"use at most {limit}"
        )
    return section.context_length or limit


def start_ids_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that the tokenizer itself puts before a text, found by tokenising a word both ways."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start])
    return ()


def _eos_id(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, model: str) -> int:
    """The token that ends a response: the tokenizer's, else the model's, else the separator."""
    stated = config.eos_token_id
    from_config = stated[0] if isinstance(stated, list) else stated
    for candidate in (tokenizer.eos_token_id, from_config, tokenizer.sep_token_id):
        if isinstance(candidate, int) and 0 <= candidate < config.vocab_size:
            return candidate
    raise MilpError(
        f"neither the tokenizer nor the configuration of {model!r} names an end token (eos): "
        "a response could not end; use a base that has one"
    )


def _pad_id(config: PretrainedConfig, eos_id: int) -> int:
    """Not the model's own padding token: transformers warns of that one where no mask is given."""
    return next(i for i in (eos_id, 0, 1) if i != config.pad_token_id)


def first_position_of(model: Any) -> int:
    """Position id of the first token: RoBERTa-like embeddings count from their padding index + 1."""
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids"):
            return int(module.padding_idx) + 1
    return 0


@contextmanager
def accelerator_choice(kind: str) -> Iterator[None]:
    """Tell DeepSpeed, while it may be imported (transformers does, too), which kind of device is meant.

    Left to itself it looks for devices and says on standard output what it found. The variable does not stay:
    a process started from here may use another kind.
    """
    set_before = "DS_ACCELERATOR" in os.environ
    os.environ.setdefault("DS_ACCELERATOR", kind)
    try:
        yield
    finally:
        if not set_before:
            del os.environ["DS_ACCELERATOR"]


@contextmanager
def _worded_errors(model: str) -> Iterator[None]:
    """Turn transformers' ways of saying "cannot be loaded" into one that names the option."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise MilpError(
            f"base.model {model!r}: a *.safetensors file of it is damaged or not whole ({error}); is it a "
            "Git LFS pointer? Run `git lfs pull` in its folder, or fetch the files again"
        ) from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MilpError(
            f"base.model {model!r} cannot be loaded: {reason} "
            "Give 'embedded', a folder with config.json, tokenizer files and *.safetensors, or a Hugging "
            "Face model id that this machine can reach"
        ) from error


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No progress bar for a file that loads at once, no advice about encoders used as decoders."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT and transformers disagree about a renamed attribute; nothing of ours reads it.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
