"""The methods: what each puts before the query, and that nothing held out reaches any of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.jobs import ONE_EPOCH

from milp_ray.config.base import BaseSection
from milp_ray.config.methods import ALL_METHODS
from milp_ray.config.prompt import PromptSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.methods import INFO, fit, fit_users, in_order, share
from milp_ray.methods.protocol import FitRequest, most_that_fits, respond_all, training_side
from milp_ray.methods.text_prompt import history_fits, recent_turns
from milp_ray.training.base import load_base
from milp_ray.training.text import query_prompt
from milp_ray.users.records import Example, Turn, UserSplit

PROMPT = PromptSection()
LAYOUT = CanonicalLayout((False, True, False, True), 2)
QUERY = "What is it?"
RESERVE = 8


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> Any:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


@pytest.fixture
def request_for(base: Any) -> Callable[[UserSplit], FitRequest]:
    def make(split: UserSplit) -> FitRequest:
        return FitRequest(
            base=base,
            split=training_side(split),
            layout=LAYOUT,
            training=ONE_EPOCH,
            prompt=PROMPT,
            max_new_tokens=RESERVE,
            batch_size=4,
            seed=3,
        )

    return make


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Everything that methods hand to generation, to the loss and to training."""
    from milp_ray.training import generation, response_loss, train

    found = SimpleNamespace(prompts=[], contexts=[], jobs=[])

    def generate(base: Any, asked: Sequence[Any], **_: Any) -> list[list[str]]:
        found.prompts += [prompt for questions in asked for prompt in questions.prompts]
        return [["yes"] * len(questions.prompts) for questions in asked]

    def response_losses(
        base: Any, wanted: Sequence[Any], prompt: Any, **_: Any
    ) -> list[list[tuple[float, int]]]:
        found.contexts += [context for one in wanted for context in one.contexts]
        return [[(1.0, 2)] * len(one.examples) for one in wanted]

    real = train.train

    def recorded(base: Any, jobs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        found.jobs += jobs
        return real(base, jobs, *args, **kwargs)

    monkeypatch.setattr(generation, "generate", generate)
    monkeypatch.setattr(response_loss, "response_losses", response_losses)
    monkeypatch.setattr(train, "train", recorded)
    return found


def fit_one(name: str, request: FitRequest) -> Any:
    """What a method makes of one user."""
    [personalizer] = fit(name, [replace(request, shared=share(name, [request]))])
    return personalizer


def turns(*texts: str) -> tuple[Turn, ...]:
    return tuple(Turn(text) for text in texts)


# ------------------------------------------------------------------------------------------ text prompt


def test_text_prompt_takes_the_most_recent_whole_turns_in_time_order(base: Any) -> None:
    # The tiny base has 256 tokens of one byte each: five turns of 60 bytes do not fit, three do.
    history = turns(*(f"{i} " + "x" * 58 for i in range(5)))
    kept = recent_turns(history, QUERY, base, PROMPT, reserve=RESERVE)
    assert kept == history[2:]


def test_a_turn_that_fits_exactly_is_kept_and_one_token_more_drops_it(base: Any) -> None:
    from milp_ray.training.text import history_context, query_prompt

    used = base.count_tokens([query_prompt(QUERY, PROMPT, history_context(turns(""), PROMPT))])[0]
    room = base.context_length - len(base.start_ids) - 1 - RESERVE - used
    fitting, longer = turns("y" * room), turns("y" * (room + 1))
    assert recent_turns(fitting, QUERY, base, PROMPT, reserve=RESERVE) == fitting
    assert recent_turns(longer, QUERY, base, PROMPT, reserve=RESERVE) == ()


def test_a_turn_too_long_for_the_context_hides_all_older_ones(base: Any) -> None:
    history = turns("old and short", "z" * 400, "new and short")
    assert recent_turns(history, QUERY, base, PROMPT, reserve=RESERVE) == history[2:]


def test_a_longer_query_leaves_room_for_fewer_turns(base: Any) -> None:
    history = turns(*("x" * 40 for _ in range(8)))
    short = recent_turns(history, QUERY, base, PROMPT, reserve=RESERVE)
    long = recent_turns(history, QUERY * 8, base, PROMPT, reserve=RESERVE)
    assert 0 < len(long) < len(short)


def test_the_history_fits_when_no_turn_is_dropped_for_any_query(base: Any, make_split: Any) -> None:
    split = make_split("u", n_turns=3)
    assert history_fits(split, [QUERY], base, PROMPT, reserve=RESERVE)
    assert not history_fits(split, [QUERY, "q" * 300], base, PROMPT, reserve=RESERVE)
    longer = replace(split, history=split.history * 10)
    assert not history_fits(longer, [QUERY], base, PROMPT, reserve=RESERVE)


def test_text_prompt_stands_before_the_query_and_keeps_room_for_the_answer(
    base: Any, request_for: Any, make_split: Any, seen: SimpleNamespace
) -> None:
    split = replace(make_split("u"), history=turns(*(f"turn {i} " + "x" * 50 for i in range(9))))
    fit_one("text_prompt", request_for(split)).respond([QUERY])
    [prompt] = seen.prompts
    assert prompt.startswith(PROMPT.history)
    assert prompt.endswith(f"Question: {QUERY}\nAnswer:")
    assert "turn 8" in prompt
    assert "turn 0" not in prompt
    assert base.count_tokens([prompt])[0] + len(base.start_ids) + RESERVE <= base.context_length


def test_the_loss_makes_room_for_a_response_longer_than_an_answer_may_be(
    request_for: Any, make_split: Any, seen: SimpleNamespace, base: Any
) -> None:
    split = replace(make_split("u"), history=turns(*("x" * 20 for _ in range(9))))
    response = "a long response " * 6
    fit_one("text_prompt", request_for(split)).losses([Example(QUERY, response)])
    [context] = seen.contexts
    text = f"{context}Question: {QUERY}\nAnswer: {response}"
    assert 0 < base.count_tokens([text])[0] + len(base.start_ids) + 1 <= base.context_length


# --------------------------------------------------------------------------------------- oracle profile


def test_the_oracle_needs_a_profile(request_for: Any, make_split: Any) -> None:
    for profile in (None, "", "  \n"):
        assert fit_one("oracle_profile", request_for(replace(make_split("u"), profile=profile))) is None


def test_the_oracle_puts_the_profile_and_no_history_before_the_query(
    request_for: Any, make_split: Any, seen: SimpleNamespace
) -> None:
    split = replace(make_split("u"), profile="Has a turtle.")
    fit_one("oracle_profile", request_for(split)).respond([QUERY])
    assert seen.prompts == [f"User profile:\nHas a turtle.\nQuestion: {QUERY}\nAnswer:"]


def test_a_profile_too_long_for_the_context_is_cut_after_a_sentence(
    base: Any, request_for: Any, make_split: Any, seen: SimpleNamespace
) -> None:
    profile = " ".join(f"Fact {i} is a sentence of some length." for i in range(12))
    fit_one("oracle_profile", request_for(replace(make_split("u"), profile=profile))).respond([QUERY])
    [prompt] = seen.prompts
    kept = prompt.removeprefix(PROMPT.profile).partition("\nQuestion")[0]
    assert profile.startswith(kept)
    assert kept.endswith("length.")
    assert base.count_tokens([prompt])[0] + len(base.start_ids) + RESERVE <= base.context_length


# ------------------------------------------------------------------------------------ adapters, leakage


@pytest.mark.parametrize(
    ("name", "parts"),
    [("memory_only", {"memory"}), ("instruction_only", {"instruction"}), ("milp", {"memory", "instruction"})],
)
def test_adapters_differ_in_the_data_they_are_trained_on_alone(
    name: str, parts: set[str], request_for: Any, make_split: Any, seen: SimpleNamespace
) -> None:
    personalizer = fit_one(name, request_for(make_split("u")))
    assert personalizer is not None
    [job] = seen.jobs
    assert (job.parts, job.layout, job.seed) == (parts, LAYOUT, 3)
    personalizer.respond([QUERY])
    assert seen.prompts == [f"Question: {QUERY}\nAnswer:"]


def test_users_are_trained_in_one_call_and_stored_adapters_are_not(
    request_for: Any, make_split: Any, seen: SimpleNamespace
) -> None:
    requests = [request_for(make_split(f"u-{i}")) for i in range(3)]
    stored = fit_one("milp", requests[1]).adapter
    seen.jobs.clear()
    found: list[Any] = list(fit("milp", [requests[0], replace(requests[1], adapter=stored), requests[2]]))
    assert [job.split.user_id for job in seen.jobs] == ["u-0", "u-2"]
    assert found[1].adapter is stored
    assert len({id(one.adapter) for one in found}) == 3
    answers = respond_all(found, [[QUERY]] * 3)
    assert answers == [["yes"]] * 3


def test_milp_takes_the_stored_adapter_instead_of_training(
    base: Any, request_for: Any, make_split: Any, seen: SimpleNamespace
) -> None:
    request = request_for(make_split("u"))
    stored = fit_one("milp", request).adapter
    seen.jobs.clear()
    assert fit_one("milp", replace(request, adapter=stored)).adapter is stored
    assert seen.jobs == []


@pytest.mark.parametrize("name", ["memory_only", "milp"])
def test_without_data_or_with_the_empty_layout_the_base_answers(
    name: str, request_for: Any, make_split: Any, seen: SimpleNamespace
) -> None:
    request = request_for(make_split("u"))
    empty = CanonicalLayout((False,) * 4, 8)
    bare = replace(request.split, history=(), train=())
    for changed in (replace(request, layout=empty), replace(request, split=bare)):
        assert fit_one(name, changed).adapter is None
    assert seen.jobs == []


@pytest.mark.parametrize("name", ALL_METHODS)
def test_no_text_of_a_held_out_example_reaches_a_method(
    name: str, base: Any, request_for: Any, make_split: Any, seen: SimpleNamespace
) -> None:
    split = make_split("u", n_val=2, n_test=2)
    marked = replace(
        split,
        validation=tuple(replace(e, response=f"VALIDATIONMARK {e.response}") for e in split.validation),
        test=tuple(replace(e, response=f"TESTMARK {e.response}", answer="TESTMARK") for e in split.test),
    )
    personalizer = fit_one(name, request_for(marked))
    assert personalizer is not None
    personalizer.respond([example.query for example in marked.test])
    personalizer.losses(marked.test)
    given = "\n".join([*seen.prompts, *seen.contexts])
    assert "MARK" not in given
    for job in seen.jobs:
        assert job.split.test == ()
        assert "MARK" not in repr((job.split.history, job.split.train))
        for sequence in (s for stage in job.stages or () for s in stage.sequences):
            assert "MARK" not in base.tokenizer.decode(sequence.ids)


def test_no_held_out_query_stands_in_the_prompt_of_another(
    request_for: Any, make_split: Any, seen: SimpleNamespace
) -> None:
    split = make_split("u", n_test=3, seed=5)
    queries = [f"held out query number {i}?" for i in range(3)]
    fit_one("text_prompt", request_for(split)).respond(queries)
    for own, prompt in zip(queries, seen.prompts, strict=True):
        assert [query for query in queries if query in prompt] == [own]


def test_a_real_run_of_every_method_answers_and_measures_and_leaves_the_base_alone(
    base: Any, request_for: Any, make_split: Any
) -> None:
    import torch

    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    split = make_split("u")
    losses = {}
    for name in ALL_METHODS:
        personalizer = fit_one(name, request_for(split))
        assert personalizer is not None
        answers = personalizer.respond([example.query for example in split.test])
        assert len(answers) == len(split.test)
        losses[name] = personalizer.losses(split.test)
        assert [n for _, n in losses[name]] == [n for _, n in losses["base"]]
    assert losses["milp"] != losses["base"] != losses["text_prompt"]
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---------------------------------------------------------------------------------------------- registry


def test_the_registry_holds_the_methods_of_the_configuration() -> None:
    assert tuple(INFO) == ALL_METHODS
    assert in_order(["milp", "unheard_of", "base"]) == ["base", "milp", "unheard_of"]


def test_a_method_of_ones_own_is_a_module(
    request_for: Any, make_split: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
from milp_ray.methods.protocol import Answerer

def fit(requests):
    return [Answerer(request, context=lambda query, reserve: "Be brief.\\n") for request in requests]
"""
    (tmp_path / "my_methods").mkdir()
    (tmp_path / "my_methods" / "brief.py").write_text(source.replace("\\\\", "\\"), encoding="utf-8")
    (tmp_path / "my_methods" / "empty.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    fitted = fit_users("my_methods.brief", [request_for(make_split("u"))])
    assert fitted.personalizers["u"].questions([QUERY]).prompts == [
        "Be brief.\n" + query_prompt(QUERY, PROMPT)
    ]
    with pytest.raises(MilpError, match="no function fit"):
        fit("my_methods.empty", [])
    with pytest.raises(MilpError, match=r"no module .my_methods\.absent."):
        fit("my_methods.absent", [])


def test_the_readmes_example_of_a_method_works(
    request_for: Any, make_split: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    [source] = [part for part in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def fit(" in part]
    assert len(source.splitlines()) <= 15
    (tmp_path / "readme_methods").mkdir()
    (tmp_path / "readme_methods" / "latest.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    split = replace(make_split("u"), history=turns("an old turn", "the latest turn"))
    fitted = fit_users("readme_methods.latest", [request_for(split)])
    [prompt] = fitted.personalizers["u"].questions([QUERY]).prompts
    assert "the latest turn" in prompt
    assert "old" not in prompt
    assert fitted.costs.stored_bytes == len("the latest turn")
    [answer] = fitted.respond([("u", QUERY)])
    assert isinstance(answer, str)
    assert fitted.costs.n_answers == 1


def test_an_unknown_method_is_refused_by_name(request_for: Any, make_split: Any) -> None:
    with pytest.raises(MilpError, match=r"'rag'.*text_prompt"):
        fit_one("rag", request_for(make_split("u")))


@pytest.mark.parametrize("limit", range(12))
def test_bisection_finds_the_largest_that_fits(limit: int) -> None:
    def render(units: Sequence[str]) -> str:
        return "".join(units)

    assert most_that_fits("x" * 9, render, lambda text: len(text) <= limit) == min(limit, 9)
