"""General ability: perplexity on texts about nobody, before and after."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.inline import InlinePool, damage, use_inline_pool, write_chosen
from typer.testing import CliRunner

from milp_ray import cli
from milp_ray.config import Config
from milp_ray.config.base import BaseSection
from milp_ray.config.evaluation import EvaluationSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.evaluation.ability import (
    COLUMNS,
    AbilityOptions,
    Population,
    ability_of,
    measure_ability,
    population_texts,
    token_sequences,
)
from milp_ray.evaluation.table_file import read_table, write_table
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.governance import traces
from milp_ray.personalize.governance.needles import IdFinder
from milp_ray.personalize.store import AdapterStore
from milp_ray.pipeline import quality
from milp_ray.pipeline.work import Work
from milp_ray.report.ability_text import ability_rows, ability_table, ability_title, ability_verdict
from milp_ray.rundir import RunFolder
from milp_ray.training.base import load_base
from milp_ray.users.persona_world.generator import population_rng, pretraining_rng

LAYOUT = CanonicalLayout((False, True, False, True), 2)
TRAINING = TrainingSection(memory_epochs=12, instruction_epochs=1, learning_rate=2e-2)
TEXTS = Population(
    "texts.txt", ((("A plain text.", False),), (("A question? ", False), ("An answer.", True)))
)


@dataclass(frozen=True)
class World:
    """A base, two users' adapters, and the configuration."""

    base: Any
    store: AdapterStore
    config: Config

    def measure(self, file: Path, *users: str, population: Population = TEXTS) -> dict[str, Any]:
        pool: Any = InlinePool(self.base)
        measure_ability(file, users, population, self.config, pool=pool, store=self.store)
        found = ability_of(file, self.config)
        assert found is not None
        return found


@pytest.fixture(scope="module")
def world(tiny_llama_dir: Path, make_split: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    from milp_ray.training.job import Job
    from milp_ray.training.train import train

    section = BaseSection(model=str(tiny_llama_dir), device="cpu")
    base = load_base(section)
    store = AdapterStore(tmp_path_factory.mktemp("able") / "adapters")
    splits = [make_split(user, n_turns=3, n_train=2, n_val=1, n_test=2) for user in ("u-1", "u-12")]
    jobs = [Job(split.user_id, split, LAYOUT, frozenset({"memory"}), 0) for split in splits]
    for result in train(base, jobs, TRAINING, PromptSection()):
        assert result.adapter is not None
        store.publish(result.job_id, result.adapter, {}, fingerprint="any")
    config = Config(name="able", base=section, evaluation=EvaluationSection(n_bootstrap=50))
    return World(base, store, config)


def plain_perplexity(base: Any, model: Any) -> float:
    """Of the texts by transformers' own loss, a text at a time."""
    import torch

    nll, n_tokens = 0.0, 0
    for sequence in token_sequences(TEXTS.texts, base):
        ids = torch.tensor([sequence.ids])
        labels = ids.clone()
        labels[:, : sequence.target_from] = -100
        with torch.no_grad():
            nll += float(model(input_ids=ids, labels=labels).loss) * sequence.n_targets
        n_tokens += sequence.n_targets
    return math.exp(nll / n_tokens)


def test_perplexities_are_those_of_the_plain_base_and_of_peft(world: World, tmp_path: Path) -> None:
    from milp_ray.training.adapters import attached

    found = world.measure(tmp_path / "ability.parquet", "u-1")
    base = plain_perplexity(world.base, world.base.model)
    with attached(world.base, world.store.load("u-1")) as model:
        personal = plain_perplexity(world.base, model)
    assert abs(personal / base - 1) > 1e-3  # the adapter does something
    assert found["base_perplexity"] == pytest.approx(base, rel=1e-5)
    assert found["perplexity"]["mean"] == pytest.approx(personal, rel=1e-5)
    assert found["change"]["mean"] == pytest.approx(personal / base - 1, abs=1e-5)
    assert (found["change"]["low"], found["n_users"], found["n_texts"]) == (None, 1, 2)


def test_users_measured_together_are_measured_as_each_alone(world: World, tmp_path: Path) -> None:
    file = tmp_path / "ability.parquet"
    alone = []
    for user in ("u-1", "u-12"):
        world.measure(file, user)
        alone += read_table(file, COLUMNS)["nll"].to_pylist()
    found = world.measure(file, "u-12", "u-1")
    rows = read_table(file, COLUMNS).to_pylist()
    assert [row["user_id"] for row in rows] == ["u-12", "u-1"]
    assert [row["nll"] for row in rows] == pytest.approx(alone[::-1], rel=1e-5)
    assert found["worst_change"] >= found["change"]["mean"]


def test_a_long_text_is_read_in_pieces_and_every_token_counts_once(world: World) -> None:
    base = world.base
    text = "long words " * 60
    sequences = token_sequences(((("short", True),), ((text, False),)), base)
    assert max(len(sequence.ids) for sequence in sequences) == base.context_length
    lengths = base.count_tokens(["short", text])
    # One end token; this base has no start token, so that nothing predicts the first of a piece.
    assert base.start_ids == ()
    assert sum(sequence.n_targets for sequence in sequences) == sum(lengths) + 1 - len(sequences)
    assert all(sequence.ids[: len(base.start_ids)] == base.start_ids for sequence in sequences)


def test_reasons_are_counted_without_saying_whom_they_are_about(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(monkeypatch, "ann-1", "bob-2")
    pool: Any = InlinePool(world.base)
    file, asked = tmp_path / "ability.parquet", ["u-1", "ann-1", "bob-2"]
    reasons = measure_ability(file, asked, TEXTS, world.config, pool=pool, store=world.store)
    assert reasons == {"the adapter of user …, version … is damaged": 2}


def test_a_user_without_an_adapter_fails_alone(world: World, tmp_path: Path) -> None:
    pool: Any = InlinePool(world.base)
    file = tmp_path / "ability.parquet"
    reasons = measure_ability(file, ["u-1", "stranger"], TEXTS, world.config, pool=pool, store=world.store)
    assert reasons.total() == 1
    assert read_table(file, COLUMNS)["user_id"].to_pylist() == ["u-1"]
    with pytest.raises(MilpError, match="no adapter"):
        measure_ability(file, ["stranger"], TEXTS, world.config, pool=pool, store=world.store)


def test_forgetting_a_user_takes_the_row_away(world: World, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    world.measure(run.ability_file, "u-1", "u-12")
    assert traces.tables(run, IdFinder("u-1"), dry_run=False).count == 1
    assert read_table(run.ability_file, COLUMNS)["user_id"].to_pylist() == ["u-12"]
    traces.tables(run, IdFinder("u-12"), dry_run=False)
    assert ability_of(run.ability_file, world.config) is None


# -------------------------------------------------------------------------------------------------- texts


def test_documents_of_the_world_are_drawn_where_neither_users_nor_pretraining_are() -> None:
    population = population_texts(Config(name="c"), AbilityOptions(n_texts=5))
    assert population.name == "PersonaWorld"
    assert len(population.texts) == 5
    assert population == population_texts(Config(name="c"), AbilityOptions(n_texts=5))
    assert any(ends for text in population.texts for _, ends in text)
    # 2^55 documents are more than pretraining has read, and users' streams end below all of them.
    assert population_rng(0).getstate() != pretraining_rng(0).getstate()
    assert population_rng(0).getstate() == pretraining_rng((1 << 56) - (1 << 48)).getstate()


def test_texts_in_another_encoding_are_refused_without_their_words(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("a secret café".encode("cp1252"))
    with pytest.raises(MilpError, match="UTF-8") as caught:
        population_texts(Config(name="c"), AbilityOptions(texts=path))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.txt", "one\n\n  two  \nthree\n"),
        ("t.jsonl", '{"text": "one"}\n\n{"text": " two "}\n{"text": "x"}\n'),
    ],
)
def test_texts_come_from_lines_and_json_lines(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    population = population_texts(Config(name="c"), AbilityOptions(path, n_texts=2))
    assert population == Population(name, ((("one", False),), (("two", False),)))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.txt", "\n \n", "no text"),
        ("t.jsonl", '{"text": "a"}\n{"words": "secret"}\n', "line 2"),
        ("t.jsonl", "secret\n", "line 1"),
    ],
)
def test_texts_that_cannot_be_read_are_told_without_what_they_say(
    tmp_path: Path, name: str, content: str, words: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(MilpError, match=words) as caught:
        population_texts(Config(name="c"), AbilityOptions(path))
    assert "secret" not in str(caught.value)


def test_another_base_needs_texts(tmp_path: Path) -> None:
    config = Config(name="c", base=BaseSection(model="some/model"))
    with pytest.raises(MilpError, match="--texts"):
        population_texts(config, AbilityOptions())
    with pytest.raises(MilpError, match="no such file"):
        population_texts(config, AbilityOptions(tmp_path / "none.txt"))


# -------------------------------------------------------------------------------------- report and command


def rows(*losses: float) -> list[dict[str, Any]]:
    same = {"texts": "t.txt", "n_texts": 3, "n_tokens": 10, "base_nll": 10.0}
    return [{"user_id": f"u-{i}", "nll": nll, **same} for i, nll in enumerate(losses)]


def test_the_verdict_waits_for_an_interval_off_zero(tmp_path: Path) -> None:
    def verdict(*losses: float) -> str:
        write_table(tmp_path / "a.parquet", rows(*losses), COLUMNS)
        found = ability_of(tmp_path / "a.parquet", Config(name="c"))
        assert found is not None
        assert "3 texts about nobody (t.txt, 10 tokens)" in ability_title(found)
        assert len(ability_table(found).rows) == len(ability_rows(found)) == 2
        return ability_verdict(found)

    assert "raise" in verdict(11.0, 11.0, 11.0)
    assert f"{100 * (math.exp(0.1) - 1):.1f}%" in verdict(11.0, 11.0, 11.0)
    assert "lower" in verdict(9.0, 9.5)
    assert "told apart" in verdict(9.0, 11.0)


def test_an_adapter_that_has_lost_everything_is_still_a_number(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", rows(1e6, 10.0), COLUMNS)
    found = ability_of(tmp_path / "a.parquet", Config(name="c"))
    json.dumps(found, allow_nan=False)


def test_the_command_prints_a_table_or_one_json_object(
    tmp_path: Path, make_study_run: Any, study_events: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_study_run(tmp_path, study_events())
    write_table(run.ability_file, rows(11.0, 11.0), COLUMNS)
    asked: list[AbilityOptions] = []

    def answer(run: Any, config: Any, options: AbilityOptions, quiet: bool) -> dict[str, Any]:
        asked.append(options)
        measured = ability_of(run.ability_file, config)
        assert measured is not None
        return {**measured, "n_failed": 0, "failed_reasons": {}}

    monkeypatch.setattr(quality, "ability", answer)
    done = CliRunner().invoke(cli.app, ["ability", str(run.path), "--documents", "7", "--texts", "t.txt"])
    assert done.exit_code == 0
    for words in ("The base alone", "2.72", "+10.5 [+10.5, +10.5]", "raise"):
        assert words in done.output
    assert asked[0] == AbilityOptions(Path("t.txt"), 7)
    done = CliRunner().invoke(cli.app, ["ability", str(run.path), "--json"])
    assert json.loads(done.output)["n_users"] == 2


def test_the_command_measures_a_run_and_the_report_has_it(
    world: World, tmp_path: Path, make_split: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from milp_ray.report.content import read_content, summary_of

    config = world.config.model_copy(update={"output_dir": tmp_path})
    run = RunFolder.create(config)
    write_chosen(run)
    use_inline_pool(monkeypatch, world.base)
    splits = [make_split(user) for user in ("u-1", "u-12", "stranger")]
    monkeypatch.setattr(Work, "splits", splits)
    monkeypatch.setattr("milp_ray.personalize.store.run_store", lambda *_: world.store)
    texts = tmp_path / "texts.txt"
    texts.write_text("A plain text.\nAnother one.\n")
    done = CliRunner().invoke(cli.app, ["ability", str(run.path), "--texts", str(texts), "--json"])
    assert done.exit_code == 3  # the stranger has no adapter
    found = json.loads(done.stdout)
    assert (found["n_users"], found["n_failed"], found["texts"]) == (2, 1, "texts.txt")
    assert summary_of(read_content(run))["ability"]["change"] == found["change"]
