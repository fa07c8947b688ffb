"""Reading a configuration: what is accepted, and what the errors say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milp_ray.config import Config
from milp_ray.config_loader import dump_config, known_keys, load_config, override_config
from milp_ray.errors import MilpError


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(MilpError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_a_file_with_a_name_alone_is_the_default_configuration(write) -> None:
    assert load_config(write("name: a")) == Config(name="a")


def test_overrides_are_yaml_values_and_the_last_one_holds(write) -> None:
    config = load_config(
        write("name: a\nsearch: {n_trials: 30, n_initial: 2}"),
        [
            "search.n_trials=24",
            "search.n_trials=25",
            "space.ranks=[4, 8]",
            "base.revision=null",
            "base.model=some/model",
            "training.lora_alpha.rule=sqrt",
            "training.learning_rate=5e-4",
        ],
    )
    assert config.search.n_trials == 25
    assert config.search.n_initial == 2
    assert config.space.ranks == (4, 8)
    assert config.base.revision is None
    assert config.base.model == "some/model"
    assert config.training.lora_alpha.rule == "sqrt"
    assert config.training.learning_rate == 5e-4


def test_an_override_may_hold_an_equals_sign(write) -> None:
    assert load_config(write("name: a"), ["prompt.query=x={query}"]).prompt.query == "x={query}"


def test_an_unknown_key_is_refused_with_the_file_and_the_nearest_key(write) -> None:
    path = write("name: a\nsearch: {n_trails: 3}")
    assert refusal(path) == f"{path}: unknown key search.n_trails; did you mean search.n_trials?"


def test_a_key_in_the_wrong_section_is_pointed_to_the_right_one(write) -> None:
    assert "did you mean search.n_probe_users?" in refusal(write("name: a\nn_probe_users: 2"))


def test_an_unknown_key_that_is_near_to_none_lists_the_known_ones(write) -> None:
    message = refusal(write("name: a\nchoice: {zzz: 1}"))
    assert message.endswith("unknown key choice.zzz; known in choice: rule, tolerance")


def test_an_unknown_override_is_blamed_on_the_command_line(write) -> None:
    assert refusal(write("name: a"), "search.n_trails=3") == (
        "command line: unknown key search.n_trails; did you mean search.n_trials?"
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("search.n_trials=0", "search.n_trials: 0 given; allowed: a whole number (above 0)"),
        ("search.n_trials=many", "search.n_trials: 'many' given; allowed: a whole number (above 0)"),
        ("training.dropout=1.5", "training.dropout: 1.5 given; allowed: a number (at least 0 and below 1)"),
        ("base.dtype=fp32", "base.dtype: 'fp32' given; allowed: one of auto, float32, bfloat16, float16"),
        ("space.ranks=[8, -1]", "space.ranks[1]: -1 given; allowed: a whole number (above 0)"),
        (
            "space.ranks=8",
            "space.ranks: 8 given; allowed: a list such as [a, b], each a whole number (above 0)",
        ),
        ("users.limit=0", "users.limit: 0 given; allowed: a whole number (above 0), or null"),
        ("personalize=3", "personalize: 3 given; allowed: keys n_workers,"),
        ("name=a/b", "name: 'a/b' given; allowed: text like"),
        ("ray.include_dashboard=perhaps", "'perhaps' given; allowed: true or false"),
        ("users.split.train=0.95", "users.split: train 0.95 + validation 0.1 leaves nothing for test"),
        ("users.format=jsonl", "users: format 'jsonl' reads files: name at least one under users.paths"),
        ("search.objectives=[rouge_l]", "search: objectives ['rouge_l']: give two or more different ones of"),
        ("users.persona_world.long_turns=[9, 3]", "long_turns is [9, 3]; give [at least, at most]"),
        ("personalize.store=ftp://host/x", "give a folder, s3://BUCKET/… or gs://BUCKET/…"),
        (
            "personalize.encryption={key_env: A, key_file: b}",
            "a key comes from one place; leave one of them out",
        ),
    ],
)
def test_an_impossible_value_is_refused_with_what_is_allowed(write, override: str, said: str) -> None:
    message = refusal(write("name: a"), override)
    assert message.startswith("command line: ")
    assert said in message
    assert "\n" not in message
    assert "pydantic" not in message


def test_every_problem_is_reported_at_once(write) -> None:
    message = refusal(write("name: a\nseed: -1\nfoo: 1\nbase: {dtype: x}"))
    assert len(message.splitlines()) == 3


def test_a_missing_name_is_asked_for(write) -> None:
    assert "name is missing" in refusal(write("seed: 1"))


def test_a_repeated_key_is_refused_with_its_line(write) -> None:
    assert "line 3: the key 'seed' is given twice" in refusal(write("name: a\nseed: 1\nseed: 2\n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\non: y", 'line 2: a key is text, and on is none in YAML; quote it: "on"'),
        ("name: a\nusers: {1: y}", 'line 2: a key is text, and 1 is none in YAML; quote it: "1"'),
        (
            "seed: 1\nname: {{ NAME }}",
            "line 2: a list or mapping stands for a key; put text like {{ x }} in quotes",
        ),
    ],
)
def test_a_key_that_is_no_text_is_refused_with_its_line(write, text: str, said: str) -> None:
    path = write(text)
    assert refusal(path) == f"{path}: {said}"


def test_a_merged_mapping_gives_the_keys_that_stand_nowhere_else(write) -> None:
    section = "{<<: {n_trials: 30, n_initial: 2}, n_trials: 24}"
    config = load_config(write(f"name: a\nsearch: {section}"))
    assert (config.search.n_trials, config.search.n_initial) == (24, 2)


def test_a_key_that_is_merged_and_given_is_not_given_twice_wherever_it_is_merged_again(write) -> None:
    inner = "name: a\nsearch: {x: {x: &one {<<: {seed: 1}, seed: 2}}}\nspace: {<<: *one}"
    assert "twice" not in refusal(write(inner))


@pytest.mark.parametrize(
    "value", ["2024-30-09", "2024-01-01T99:00:00", "!!int x", "!!bool x", "!!timestamp x"]
)
def test_a_value_that_looks_like_what_it_is_not_is_refused_with_its_place(write, value: str) -> None:
    path = write(f"name: {value}")
    assert f"{path}: line 1, column 7 is not valid YAML: '{value.split()[-1]}' is no " in refusal(path)
    assert "quote it where it is text" in refusal(write("name: a"), f"name={value}")


def test_an_override_of_braces_is_refused_without_a_traceback(write) -> None:
    message = refusal(write("name: a"), "name={{x}}")
    assert message == (
        "command line, name: line 1: a list or mapping stands for a key; put text like {{ x }} in quotes"
    )


def test_a_nesting_too_deep_to_read_is_refused(write) -> None:
    assert "the nesting is too deep to read" in refusal(write("name: " + "[" * 5000))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("- a\n- b", "holds a list"),
        ("name: [a", "is not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_what_is_no_configuration_is_refused(write, text: str, said: str) -> None:
    assert said in refusal(write(text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "nowhere.yaml: there is no such configuration file" in refusal(tmp_path / "nowhere.yaml")
    assert "is a folder" in refusal(tmp_path)


@pytest.mark.parametrize("override", ["search.n_trials", "=3", "a..b=3"])
def test_an_override_without_key_and_value_is_refused(write, override: str) -> None:
    assert "is not an override; write key=value" in refusal(write("name: a"), override)


def test_a_dumped_configuration_loads_back_to_the_same_one(tmp_path: Path) -> None:
    config = override_config(
        Config(name="a"),
        [
            "users.format=jsonl",
            "users.paths=[a.jsonl, ../b.jsonl]",
            "training.weight_decay=1e-5",
            "base.dtype=float32",
        ],
    )
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rate=st.floats(1e-9, 10, allow_nan=False),
    ranks=st.lists(st.integers(1, 512), min_size=1, max_size=6),
    phrase=st.text(max_size=30),
)
def test_dump_and_load_are_inverse(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rate: float, ranks: list[int], phrase: str
) -> None:
    before = Config(
        name="a",
        seed=seed,
        training={"learning_rate": rate},
        space={"ranks": ranks},
        prompt={"history": phrase},
    )
    path = tmp_path_factory.mktemp("dump") / "c.yaml"
    path.write_text(dump_config(before), encoding="utf-8")
    assert load_config(path) == before


def test_known_keys_are_the_dotted_keys_of_the_whole_configuration() -> None:
    keys = set(known_keys())
    assert {"name", "search", "search.n_trials", "training.deepspeed.zero_stage"} <= keys


def test_every_experiment_loads_and_names_its_command_in_the_first_lines(repository: Path) -> None:
    files = sorted((repository / "experiments").glob("*.yaml"))
    assert {"demo.yaml", "meddia_tinystories.yaml", "paper_llama2_7b.yaml"} <= {path.name for path in files}
    names = set()
    for path in files:
        config = load_config(path)
        names.add(config.name)
        head = path.read_text(encoding="utf-8").split("\nname:")[0]
        assert re.search(rf"milp-ray (run|compare) experiments/{re.escape(path.name)}", head), path.name
    assert len(names) == len(files), "two experiments write the same run folder"
