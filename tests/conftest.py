"""What every test shares: a deterministic environment, tiny random models, a synthetic user, a local Ray.

The environment is set at import time, before torch, transformers or Ray are imported by a test module.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

    from milp_ray.rundir import RunFolder
    from milp_ray.training.base import Base

# A time limit an example fails where other work holds the cores, and says nothing about a rule.
hypothesis.settings.register_profile("milp_ray", deadline=None)
hypothesis.settings.load_profile("milp_ray")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# A skip is an untested rule. These beginnings of reasons are the ones that a machine may rightly give.
ALLOWED_SKIPS = ("needs ../shared", "needs a CUDA device", "needs Ray's launcher")
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


# ------------------------------------------------------------------------------------------------ studies


@pytest.fixture(scope="session")
def study_events() -> Callable[..., list[dict[str, Any]]]:
    """``study_events(n_completed, is_finished)``: what the journal of a search of four layers holds.

    Two slots; the trials end in pairs, ten seconds a pair; the loss and ROUGE-L fall with the number
    of LoRAs. Unless it is finished, four more were suggested: one was stopped 5 s after the last pair, one
    failed 6 s after it, one runs and one waits.
    """

    def event(second: float, kind: str, **fields: Any) -> dict[str, Any]:
        time = datetime(2024, 5, 1, tzinfo=UTC) + timedelta(seconds=second)
        return {"event": kind, **fields, "time": time.isoformat(timespec="milliseconds")}

    def suggested(second: float, index: int) -> dict[str, Any]:
        mask = [bool((index + 1) >> bit & 1) for bit in range(4)]
        layers = [layer for layer, bit in enumerate(mask) if bit]
        raw = {f"layer_{layer}": bit for layer, bit in enumerate(mask)} | {"n_loras": 4, "rank": 8}
        layout = {"n_layers": 4, "layers": layers, "rank": 8}
        key = "".join(str(int(bit)) for bit in mask) + "-r8"
        where = {"batch": int(index >= 4), "generator": "sobol" if index < 4 else "saas_nehvi"}
        return event(second, "trial_suggested", index=index, raw=raw, layout=layout, key=key, **where)

    def metrics(index: int) -> dict[str, Any]:
        n_loras = (index + 1).bit_count()
        per_user = {
            "validation_loss": [2.0 - 0.2 * n_loras + 0.01 * index + 0.1 * user for user in range(3)],
            "rouge_l": [40.0 - 5 * n_loras - (index * user) % 3 for user in range(3)],
        }
        means = {name: sum(values) / 3 for name, values in per_user.items()}
        sizes = {"adapter_parameters": 100 * n_loras, "seconds": 8.0, "tokens": 10, "steps": 5}
        return {**means, **sizes, "per_user": per_user}

    def make(n_completed: int = 10, is_finished: bool = False) -> list[dict[str, Any]]:
        space = {"n_layers": 4, "ranks": [8, 16], "factors": ["layers", "number", "rank"]}
        held = {"fixed_layers": None, "fixed_number": None, "fixed_rank": None}
        header = {"objectives": ["validation_loss", "rouge_l"], "n_initial": 4, "seed": 0, "worst": {}}
        events = [
            event(0, "study_started", digest="d", space={**space, **held}, n_probe_users=3, **header),
            event(0, "session_started", n_slots=2),
        ]
        for first in range(0, n_completed, 2):
            second, pair = 5 * first, range(first, min(first + 2, n_completed))
            events += [suggested(second, index) for index in pair]
            events += [event(second + 1, "trial_started", index=index) for index in pair]
            events += [
                event(second + 10, "trial_completed", index=index, metrics=metrics(index)) for index in pair
            ]
        second = 10 * ((n_completed + 1) // 2)
        if is_finished:
            return [
                *events,
                event(second, "study_finished", reason="all trials have ended"),
                event(second + 1, "session_ended", max_block_seconds=0.05),
            ]
        stopped, failed, running, waiting = range(n_completed, n_completed + 4)
        loss = {"validation_loss_at_rung": 9.0, "validation_loss_at_rung_sem": None}
        by_user = {"validation_loss_at_rung_by_user": [9.0] * 3, "adapter_parameters": 64}
        at_rung = {**loss, **by_user, "seconds_at_rung": 4.0, "tokens_at_rung": 90, "steps_at_rung": 8}
        events.append(event(second, "batch_proposed", batch=2, seconds=1.5))
        events += [suggested(second, index) for index in (stopped, failed, running, waiting)]
        events += [event(second, "trial_started", index=index) for index in (stopped, failed)]
        return [
            *events,
            event(second + 4, "trial_rung", index=stopped, rung=0, epoch=2, values=at_rung),
            event(second + 5, "trial_stopped", index=stopped, rung=0, epoch=2, seconds=4.0),
            event(second + 5, "trial_started", index=running),
            event(second + 6, "trial_failed", index=failed, reason="training diverged"),
        ]

    return make


@pytest.fixture(scope="session")
def make_study_run() -> Callable[..., RunFolder]:
    """``make_study_run(folder, events, **search)``: a run whose journal holds the events."""

    def make(folder: Path, events: list[dict[str, Any]], **search: Any) -> RunFolder:
        from milp_ray.config import Config
        from milp_ray.config.search import SearchSection
        from milp_ray.rundir import RunFolder

        section = SearchSection(n_trials=20, n_initial=4, **search)
        run = RunFolder.create(Config(name="study-run", output_dir=folder, search=section))
        run.study.mkdir()
        run.journal.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
        return run

    return make


@pytest.fixture(scope="session")
def build_analysis() -> Callable[[Any], Any]:
    """``build_analysis(study)``: layer 2 matters most; layout i of the front has mean i, sd i + 0.5."""

    def build(study: Any) -> Any:
        from milp_ray.search.insight import Beliefs

        objectives, n_front = study.result.objectives, len(study.result.front)
        shares = {"layer 0": 0.1, "layer 1": 0.0, "layer 2": 0.8, "layer 3": 0.4, "n": 0.05, "rank": 0.2}
        importance = {factor: (m, m / 2, m + 0.1) for factor, m in shares.items()}
        return Beliefs(
            objectives,
            tuple(shares),
            {name: dict(importance) for name in objectives},
            {name: [float(i) for i in range(n_front)] for name in objectives},
            {name: [i + 0.5 for i in range(n_front)] for name in objectives},
        )

    return build


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
