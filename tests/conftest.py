"""What every test shares: a deterministic environment, tiny random models, a synthetic user, a local Ray.

The environment is set at import time, before torch, transformers or Ray are imported by a test module.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "MPLBACKEND": "Agg",
        "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "0"),
        # Ray workers and DeepSpeed find ninja and the installed commands beside this interpreter.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
)

import hypothesis
import pytest

from milp_ray.users.records import Example, Turn, UserSplit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from milp_ray.training.base import Base

# A time limit an example fails where other work holds the cores, and says nothing about a rule.
hypothesis.settings.register_profile("milp_ray", deadline=None)
hypothesis.settings.load_profile("milp_ray")

pytest_plugins = ["support.buckets", "support.studies"]

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# A skip is an untested rule. These beginnings of reasons are the ones that a machine may rightly give.
ALLOWED_SKIPS = ("needs ../shared", "needs a CUDA device")
_unexpected_skips: list[str] = []


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    import torch

    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start Ray first, since they are long, so that no process is left alone with one at the end.

    And skip tests marked ``gpu`` on a machine without one, with a reason that is allowed.
    """
    long = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in long)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember skips whose reason is not on the list."""
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not reason.removeprefix("Skipped: ").startswith(ALLOWED_SKIPS):
            _unexpected_skips.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail the run when a test was skipped for a reason that is not on the list."""
    if _unexpected_skips and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the unexpected skips."""
    if _unexpected_skips:
        terminalreporter.section("unexpected skips (these fail the run)", red=True)
        for line in _unexpected_skips:
            terminalreporter.line(line)


# ------------------------------------------------------------------------------------------ tiny models

CONTEXT_LENGTH = 256


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, behind RoBERTa's special ids (bos 0, pad 1, eos 2, unk 3)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def _save(folder: Path, model_class: str, config_class: str, **settings: object) -> Path:
    import torch
    import transformers

    tokenizer = _byte_tokenizer()
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "vocab_size": len(tokenizer)}
    config = getattr(transformers, config_class)(**ids, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config)
    model.eval().save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama: 4 layers, hidden 32, feed-forward 64, context 256, byte tokens."""
    return _save(
        tmp_path_factory.mktemp("models") / "tiny_llama",
        "LlamaForCausalLM",
        "LlamaConfig",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
    )


@pytest.fixture(scope="session")
def tiny_gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random GPT-2: 3 layers, hidden 32, feed-forward 64, context 256, byte tokens."""
    return _save(
        tmp_path_factory.mktemp("models") / "tiny_gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        n_embd=32,
        n_inner=64,
        n_layer=3,
        n_head=4,
        n_positions=CONTEXT_LENGTH,
    )


@pytest.fixture(scope="session")
def tiny_roberta_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random RoBERTa decoder: 3 layers, hidden 32, feed-forward 64, context 256, byte tokens."""
    return _save(
        tmp_path_factory.mktemp("models") / "tiny_roberta",
        "RobertaForCausalLM",
        "RobertaConfig",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH + 2,  # RoBERTa counts positions from pad_token_id + 1
        type_vocab_size=1,
        is_decoder=True,
    )


@pytest.fixture(scope="module", params=["tiny_llama_dir", "tiny_gpt2_dir", "tiny_roberta_dir"])
def scaled_base(request: pytest.FixtureRequest) -> Base:
    """A tiny base of each architecture, in which what stands before a token decides the next one, too.

    With weights as small as they are drawn, the last token alone would.
    """
    from milp_ray.config.base import BaseSection
    from milp_ray.training.base import load_base

    base = load_base(BaseSection(model=str(request.getfixturevalue(request.param)), device="cpu"))
    for name, weight in base.model.named_parameters():
        if weight.dim() == 2 and not any(part in name for part in ("embed", "wte", "wpe", "head")):
            weight.data.mul_(12.0)
    return base


# -------------------------------------------------------------------------------------------------- users

_THINGS = ("dog", "cat", "turtle", "garden", "piano", "bicycle", "camera", "oven")
_COLOURS = ("red", "green", "blue", "black", "white", "brown")


@pytest.fixture(scope="session")
def make_split() -> Callable[..., UserSplit]:
    """``make_split(user_id, n_turns, n_train, n_val, n_test, seed)``: a user of short synthetic sentences."""

    def make(
        user_id: str = "u-1",
        n_turns: int = 6,
        n_train: int = 4,
        n_val: int = 2,
        n_test: int = 2,
        seed: int = 0,
    ) -> UserSplit:
        rng = random.Random(f"{user_id}/{seed}")
        things = {thing: rng.choice(_COLOURS) for thing in _THINGS}

        def example(kind: str) -> Example:
            thing = rng.choice(_THINGS)
            return Example(
                query=f"What is the colour of my {thing}?",
                response=f"Your {thing} is {things[thing]}.",
                kind=kind,
                answer=things[thing],
                tags={"exposure": "seen", "order": "fact_first", "mentions": "1", "attribute": thing},
            )

        def examples(n: int) -> tuple[Example, ...]:
            return tuple(example("direct") for _ in range(n))

        turns = tuple(Turn(f"My {t} is {things[t]}.") for t in (rng.choice(_THINGS) for _ in range(n_turns)))
        return UserSplit(
            user_id=user_id,
            profile=" ".join(f"The {thing} is {colour}." for thing, colour in things.items()),
            history=turns,
            train=examples(n_train),
            validation=examples(n_val),
            test=examples(n_test),
        )

    return make


# ------------------------------------------------------------------------------------- what a test runs in


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """Ray in this process with two CPUs; tests never call ``ray.init`` themselves."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=128 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real models and data beside the checkout; a test that needs it is skipped without."""
    if not (SHARED / "models").is_dir():
        pytest.skip(f"needs ../shared (models and data), which is not at {SHARED.name}/ beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT
