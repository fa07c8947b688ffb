"""``milp-ray estimate``: what it prints, for data that is there and for bases that are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from milp_ray.cli import app
from milp_ray.config import Config
from milp_ray.config_loader import load_config
from milp_ray.errors import MilpError
from milp_ray.estimate import result
from milp_ray.estimate.cost import Cost
from milp_ray.estimate.inputs import Numbers, cohort, known_base
from milp_ray.estimate.paper_view import size
from milp_ray.estimate.result import Options, make_estimate


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["estimate", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def experiments(repository: Path) -> Path:
    return repository / "experiments"


def test_the_demo_is_estimated_from_its_own_users(experiments: Path) -> None:
    result = call(experiments / "demo.yaml", "search.n_trials=30")
    assert result.exit_code == 0, result.output
    for said in (
        "1,132,128 parameters",
        "counted with the base's tokenizer",
        "30 trials",
        "13 users",
        "An estimate",
        "50.38",
        "arXiv 2404.03565",
    ):
        assert said in result.output


def test_the_paper_s_base_needs_neither_weights_nor_network_nor_users(experiments: Path) -> None:
    result = call(experiments / "paper_llama2_7b.yaml", "--users", "50000", "--devices", "4")
    assert result.exit_code == 0, result.output
    for said in ("6,738,415,616 parameters", "the published sizes of", "4 × A100 80GB", "50,000 users"):
        assert said in result.output


def test_the_context_is_the_configured_one(experiments: Path) -> None:
    settings = ["base.context_length=1024", "training.max_length=null"]
    config = load_config(experiments / "paper_llama2_7b.yaml", settings)
    found = make_estimate(config, Options(numbers=Numbers(10)))
    assert found.cohort.batch.largest.longest_row <= 1024
    assert found.curve.context_length == 1024  # beyond which a prompt does not go
    assert found.curve.history[-1] == 2048


def test_a_race_for_each_user_is_counted_as_far_as_the_layouts_get(experiments: Path) -> None:
    paper = (experiments / "paper_llama2_7b.yaml", "--users", "10", "--json")
    alone, race = (
        json.loads(call(*paper, f"personalize.layout={mode}").output) for mode in ("chosen", "race")
    )
    assert race["batch"]["whole"]["flops"] == pytest.approx(2.0 * alone["batch"]["whole"]["flops"])
    assert race["search"] == alone["search"]


def test_json_holds_what_is_printed(experiments: Path) -> None:
    result = call(
        experiments / "paper_llama2_7b.yaml",
        "base.model=meta-llama/Llama-2-13b-hf",
        *("--users", "10", "--rank", "8", "--lora-layers", "40", "--device", "h100", "--json"),
    )
    found: dict[str, Any] = json.loads(result.output)
    assert found["base"]["n_parameters"] == 13_015_864_320
    assert found["layouts"]["assumed"]["parameters"] == 8 * 40 * 3 * (5120 + 13824)
    assert found["adapter_bytes"] == 4 * found["layouts"]["assumed"]["parameters"]
    assert found["store_bytes"] == 10 * found["adapter_bytes"]
    assert found["device"]["name"] == "H100"
    assert found["search"]["n"] == 200
    assert found["layouts"]["assumed"]["memory"]["base"] == 2 * 13_015_864_320


def test_sizes_in_the_store_are_those_of_the_configured_precision(experiments: Path) -> None:
    def estimated(precision: str, *options: str) -> Result:
        llama = experiments / "paper_llama2_7b.yaml"
        sizes = ("--users", "10", "--rank", "8", "--lora-layers", "32")
        return call(llama, f"personalize.adapter_precision={precision}", *sizes, *options)

    n_weights = 8 * 32 * 3 * (4096 + 11008)
    n_scales = 2 * 8 * 32 * 3  # a component of the rank, of A and of B, of three maps on each layer
    expected = {"float32": 4 * n_weights, "bfloat16": 2 * n_weights, "int8": n_weights + 4 * n_scales}
    for precision, n_bytes in expected.items():
        found = json.loads(estimated(precision, "--json").output)
        assert (found["adapter_precision"], found["adapter_bytes"]) == (precision, n_bytes)
        assert found["store_bytes"] == 10 * n_bytes
        assert found["adapter_bytes_by_precision"] == expected
    printed = " ".join(estimated("int8").output.split())
    assert "11.1 MiB as stored (int8; 44.2 MiB in float32, 22.1 MiB in bfloat16)" in printed
    assert f"{size(10 * expected['int8'])} for 10 users" in printed


def test_the_figure_goes_where_it_is_told(experiments: Path, tmp_path: Path) -> None:
    figure = tmp_path / "new" / "memory.png"
    result = call(experiments / "demo.yaml", "--users", "3", "--figure", figure)
    assert result.exit_code == 0, result.output
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--users 1000 --history-tokens 2000 --examples 50"),
        (("--history-tokens", "100"), "give --users, too"),
        (("--users", "3", "--device", "tpu"), "use one of a100"),
        (("--users", "3", "--rank", "5000"), "rank 5000 is above the smaller side"),
        (("--users", "3", "--lora-layers", "99"), "use 1 to 32"),
        (("--users", "3", "--figure", "a.pdf"), "ends in .png"),
        (("--users", "3", "--flops", "0"), "above 0"),
        (("--users", "3", "--flops", "1e12", "--measure"), "leave one of them out"),
        (("--users", "3", "search.gpus_per_trial=2"), "--devices 2 or more"),
        (("--users", "3", "base.model=nobody/nothing"), "meta-llama/Llama-2-7b-hf"),
        (("--users", "3", "training.max_length=9999"), "use at most 4096"),
    ],
)
def test_a_mistake_is_one_message_without_a_traceback(
    experiments: Path, arguments: tuple[str, ...], said: str
) -> None:
    result = call(experiments / "paper_llama2_7b.yaml", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_workers_that_share_a_gpu_each_hold_a_base(experiments: Path) -> None:
    result = call(experiments / "paper_dialogpt.yaml", "--users", "500")
    assert "4 workers share a GPU, each with a base of its own" in result.output
    too_much = call(
        experiments / "paper_llama2_7b.yaml",
        *("search.gpus_per_trial=0.1", "training.batch_size=64", "--users", "5"),
    )
    assert "The heaviest layout does not fit" in too_much.output


def test_a_part_of_a_gpu_is_estimated_with_the_pack_that_fits_it(
    experiments: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once: dict[str, int] = {}
    costs = {name: getattr(result, f"{name}_cost") for name in ("trial", "user")}

    def trial_cost(*rest: Any, **options: Any) -> Cost:
        at_once["trial"] = options["at_once"]
        return costs["trial"](*rest, **options)

    def user_cost(*rest: Any) -> Cost:
        at_once["user"] = rest[-1]
        return costs["user"](*rest)

    monkeypatch.setattr(result, "trial_cost", trial_cost)
    monkeypatch.setattr(result, "user_cost", user_cost)

    def estimated(*overrides: str) -> tuple[int, int, int]:
        config = load_config(experiments / "paper_llama2_7b.yaml", ["training.batch_size=1", *overrides])
        found = make_estimate(config, Options(numbers=Numbers(500), device="a100"))
        return at_once["trial"], at_once["user"], found.heaviest.pack_size

    whole, user, shown = estimated("personalize.gpus_per_worker=1")
    assert whole == user == shown
    half, user, shown = estimated("search.gpus_per_trial=0.5", "personalize.gpus_per_worker=1")
    assert (half, user) == (shown, whole)
    assert 1 <= half < whole
    assert estimated("personalize.gpus_per_worker=0.5") == (whole, half, whole)
    # Trials that share a process have its GPU together.
    shared = estimated("search.trials_per_gpu=4", "search.gpus_per_trial=0", "personalize.gpus_per_worker=1")
    assert shared == (whole, whole, whole)


def test_a_folder_tells_its_own_sizes(tiny_gpt2_dir: Path, experiments: Path) -> None:
    config = load_config(experiments / "demo.yaml", [f"base.model={tiny_gpt2_dir}"])
    base = known_base(config.base, dtype_bytes=4)
    assert base.shape.model_type == "gpt2"
    assert not base.is_published


def test_a_missing_folder_of_a_published_base_is_known_by_its_name(experiments: Path) -> None:
    config = load_config(experiments / "paper_dialogpt.yaml")
    base = known_base(config.base, dtype_bytes=2)
    assert base.is_published
    assert base.source == "the published sizes of microsoft/DialoGPT-medium"


def test_users_without_a_tokenizer_are_guessed_and_it_is_said(experiments: Path, tmp_path: Path) -> None:
    users = tmp_path / "users.jsonl"
    users.write_text(
        "\n".join(
            json.dumps({"user_id": name, "history": ["x" * 400], "examples": []}) for name in ("a", "b")
        ),
        encoding="utf-8",
    )
    config = load_config(experiments / "paper_llama2_7b.yaml", [f"users.paths=[{users}]"])
    found = cohort(config, known_base(config.base, 2), None, 4096)
    assert found.n_users == 2
    assert "guessed at four characters a token" in found.source
    assert found.batch.history_tokens == pytest.approx(100 + 5, abs=2), "the turn, and the fixed phrase"


def test_numbers_go_with_a_number_of_users() -> None:
    assert Numbers.given(None, None, None, None) is None
    assert Numbers.given(5, None, 7, None) == Numbers(5, n_examples=7)
    with pytest.raises(MilpError, match="--users"):
        Numbers.given(None, None, 7, None)


def test_longer_training_and_more_trials_cost_more(experiments: Path) -> None:
    numbers = Options(numbers=Numbers(100))

    def estimate(*overrides: str) -> tuple[float, float]:
        config: Config = load_config(experiments / "paper_llama2_7b.yaml", list(overrides))
        found = make_estimate(config, numbers)
        return found.search.whole.flops, found.batch.whole.flops

    search, batch = estimate()
    assert estimate("search.n_trials=400")[0] == pytest.approx(2 * search)
    assert estimate("search.n_probe_users=3")[0] == pytest.approx(3 * search)
    assert estimate("search.trial_epochs=5")[0] < search
    assert estimate("training.instruction_epochs=20")[1] > batch


def test_a_held_factor_of_the_space_is_held_in_the_estimate(experiments: Path) -> None:
    config = load_config(
        experiments / "paper_llama2_7b.yaml",
        ["space.factors=[rank]", "space.fixed_layers=[10,20]", "space.ranks=[8,16]"],
    )
    found = make_estimate(config, Options(numbers=Numbers(10)))
    assert (found.heaviest.placement.n_lora_layers, found.heaviest.placement.rank) == (2, 16)
    assert found.assumed.placement.lowest_layer == 10


def test_sizes_are_said_in_binary_units() -> None:
    assert [size(n) for n in (0, 512, 1024, 44.25 * 2**20, 2**30 * 512)] == [
        "0 B", "512 B", "1.00 KiB", "44.2 MiB", "512 GiB",
    ]  # fmt: skip
