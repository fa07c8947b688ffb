"""Judges: their formulas, fairness to places, and what an endpoint can do to one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milp_ray.chat import Endpoint
from milp_ray.errors import MilpError, safe_traceback
from milp_ray.evaluation.judges.embedded import PersonaJudge, ReferenceJudge
from milp_ray.evaluation.judges.openai import OpenAIJudge
from milp_ray.evaluation.judges.protocol import Question, choice_of
from milp_ray.evaluation.judges.reward_model import RewardModelJudge

TURTLE = "You have a turtle."
QUESTION = Question("Which pet?", TURTLE, TURTLE, "A secret dog.", frozenset({"dog"}))
SENTENCE = st.lists(st.sampled_from(["dog", "turtle", "you", "have", "a"]), max_size=6).map(" ".join)


def test_a_difference_within_the_margin_is_a_tie() -> None:
    assert [choice_of(d, 0.5) for d in (0.6, 0.5, 0.0, -0.5, -0.6)] == [1, 0, 0, 0, -1]


def test_a_judge_with_another_margin_has_another_name() -> None:
    assert ReferenceJudge().name == "embedded"
    assert ReferenceJudge(margin=2).name == "embedded (margin 2)"
    assert PersonaJudge(0.5).name == "embedded_free (margin 0.5)"


def test_the_reference_judge_by_hand() -> None:
    # First: ROUGE-L 100 and content F1 100. Second: shares "a" of 3 and 4 words, and no content word.
    [difference] = ReferenceJudge().prefer([QUESTION])
    assert difference == pytest.approx(100 - (100 * 2 * 1 / 7) / 2)


def test_the_reference_free_judge_by_hand() -> None:
    # {turtle} has nothing of {dog}; {secret, dog} has one of it: 2·1 / (2 + 1).
    [difference] = PersonaJudge().prefer([QUESTION])
    assert difference == pytest.approx(-200 / 3)


@settings(max_examples=40)
@given(SENTENCE, SENTENCE, SENTENCE, st.frozensets(st.sampled_from(["dog", "turtle"])))
def test_embedded_judges_are_fair_to_places(
    wanted: str, first: str, second: str, persona: frozenset[str]
) -> None:
    question = Question("?", wanted, first, second, persona)
    for judge in (ReferenceJudge(), PersonaJudge()):
        [there], [back] = judge.prefer([question]), judge.prefer([question.swapped()])
        assert there == pytest.approx(-back)
        assert -100 <= there <= 100
        assert first != second or there == 0


# ------------------------------------------------------------------------------------------- reward model


@pytest.fixture(scope="module")
def reward_model_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _classifier(tiny_llama_dir, tmp_path_factory.mktemp("judges") / "tiny-reward", num_labels=1)


def _classifier(source: Path, folder: Path, **settings: Any) -> Path:
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(source, **settings)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def test_a_reward_model_judges_in_batches_of_any_size(reward_model_dir: Path) -> None:
    questions = [
        QUESTION,
        Question("Where?", "", "In Osaka, by the river and the bridge", "Here"),
        Question("Same?", "", "as ever", "as ever"),
    ]
    alone = RewardModelJudge(reward_model_dir, batch_size=1)
    found = alone.prefer(questions)
    assert alone.name == "reward_model:tiny-reward"
    assert found[2] == 0.0
    assert abs(found[0]) > 1e-6
    assert RewardModelJudge(reward_model_dir, batch_size=4).prefer(questions) == pytest.approx(
        found, abs=1e-5
    )
    assert alone.prefer([q.swapped() for q in questions]) == pytest.approx([-d for d in found], abs=1e-6)


def test_a_reward_models_score_is_its_one_logit(reward_model_dir: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reward_model_dir)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model_dir).eval()
    with torch.inference_mode():
        first, second = (
            float(model(**tokenizer(QUESTION.query, text, return_tensors="pt")).logits[0, 0])
            for text in (QUESTION.first, QUESTION.second)
        )
    assert RewardModelJudge(reward_model_dir).prefer([QUESTION]) == pytest.approx([first - second], abs=1e-5)


def test_a_chat_template_says_how_query_and_answer_are_put(reward_model_dir: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path / "chat"
    AutoModelForSequenceClassification.from_pretrained(reward_model_dir).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(reward_model_dir)
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores = []
    for answer in (QUESTION.first, QUESTION.second):
        text = f"<s>user: {QUESTION.query}<s>assistant: {answer}"
        with torch.inference_mode():
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
            scores.append(float(model(**ids).logits[0, 0]))
    assert RewardModelJudge(folder).prefer([QUESTION]) == pytest.approx([scores[0] - scores[1]], abs=1e-5)


def test_a_query_that_is_too_long_is_cut_and_the_answer_still_counts(reward_model_dir: Path) -> None:
    long = Question("so many words " * 100, "", "yes", "no")
    [difference] = RewardModelJudge(reward_model_dir).prefer([long])
    assert difference != 0.0


def test_what_is_no_reward_model_in_safetensors_is_refused(
    tiny_llama_dir: Path, reward_model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(MilpError, match="holds no model"):
        RewardModelJudge(tmp_path)
    with pytest.raises(MilpError, match="2 outputs"):
        RewardModelJudge(_classifier(tiny_llama_dir, tmp_path / "two", num_labels=2))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for file in reward_model_dir.iterdir():
        name = "pytorch_model.bin" if file.suffix == ".safetensors" else file.name
        (pickled / name).write_bytes(file.read_bytes())
    with pytest.raises(MilpError, match="safetensors"):
        RewardModelJudge(pickled)


# ----------------------------------------------------------------------------------------------- endpoint

Reply = tuple[int, dict[str, str], bytes]


def completion(text: Any) -> Reply:
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@dataclass
class Server:
    """An endpoint in this process: answers by a function of the request's body, and remembers requests."""

    url: str = ""
    answer: Callable[[dict[str, Any], int], Reply] = lambda body, n: completion("[[C]]")
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def judge(self, **settings: Any) -> OpenAIJudge:
        settings = {"base_url": self.url, "model": "m", "at_once": 1, "attempts": 3, **settings}
        return OpenAIJudge(Endpoint(**settings), sleep=self.waits.append)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """A client that does not wait is no matter."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            state.headers.append({**self.headers, "path": self.path})
            status, headers, content = state.answer(state.bodies[-1], len(state.bodies))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Nothing on standard error."""

    with Quiet(("127.0.0.1", 0), Handler) as http:
        state.url = f"http://127.0.0.1:{http.server_port}/v1"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        http.shutdown()
        thread.join()


def prefers(text: str) -> Callable[[dict[str, Any], int], Reply]:
    """A judge that prefers an answer with a text in it, wherever that stands."""

    def answer(body: dict[str, Any], n: int) -> Reply:
        a, b = body["messages"][1]["content"].split("<answer_b>")
        return completion(
            "I think [[A]]" if text in a.split("<answer_a>")[1] else f"[[{'BC'[text not in b]}]]"
        )

    return answer


def test_an_endpoint_is_asked_in_both_orders(server: Server) -> None:
    server.answer = prefers("turtle")
    judge = server.judge()
    assert judge.prefer([QUESTION, QUESTION.swapped()]) == [1.0, -1.0]
    assert len(server.bodies) == 4
    assert judge.name == "openai:m"
    assert server.headers[0]["path"] == "/v1/chat/completions"
    assert server.bodies[0]["model"] == "m"
    assert "Authorization" not in server.headers[0]


def test_many_requests_at_once_keep_their_places(server: Server) -> None:
    server.answer = prefers("right")
    questions = [
        Question(f"q{i}", "", *(("right", "no") if i % 3 else ("no", "right")), frozenset())
        for i in range(12)
    ]
    assert server.judge(at_once=4).prefer(questions) == [1.0 if i % 3 else -1.0 for i in range(12)]


def test_a_judge_that_prefers_a_place_makes_ties(server: Server) -> None:
    server.answer = lambda body, n: completion("[[A]]")
    judge = server.judge()
    [difference] = judge.prefer([QUESTION])
    assert choice_of(difference, judge.margin) == 0
    server.answer = lambda body, n: completion("[[A]]" if n % 2 else "[[C]]")
    [difference] = judge.prefer([QUESTION])
    assert (difference, choice_of(difference, judge.margin)) == (0.5, 0)


@pytest.mark.parametrize(
    ("reply", "expected", "n_unclear"),
    [("A", 0.0, 0), ("I cannot say", 0.0, 2), (None, 0.0, 2), ("[[A]] or rather [[C]]", 0.0, 0)],
)
def test_replies_without_a_verdict_are_ties_and_counted(
    server: Server, reply: str | None, expected: float, n_unclear: int
) -> None:
    server.answer = lambda body, n: completion(reply)
    judge = server.judge()
    assert (judge.prefer([QUESTION]), judge.n_unclear) == ([expected], n_unclear)


def test_the_users_history_is_not_sent(server: Server) -> None:
    question = Question("Which pet?", "A dog.", "A cat.", "A dog.", frozenset({"kangaroo"}))
    server.judge().prefer([question])
    assert "kangaroo" not in json.dumps(server.bodies)
    assert "Which pet?" in server.bodies[0]["messages"][1]["content"]


def test_the_key_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "k-123")
    server.judge(key_env="JUDGE_KEY").prefer([QUESTION])
    assert server.headers[0]["Authorization"] == "Bearer k-123"
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(MilpError, match="JUDGE_KEY"):
        server.judge(key_env="JUDGE_KEY")


def test_a_busy_endpoint_is_asked_again_later_and_later(server: Server) -> None:
    busy: dict[int, Reply] = {1: (503, {}, b""), 2: (429, {"Retry-After": "7"}, b"")}
    server.answer = lambda body, n: busy.get(n) or completion("[[C]]")
    assert server.judge().prefer([QUESTION]) == [0.0]
    assert server.waits == [1.0, 7.0]
    assert len(server.bodies) == 4


@pytest.mark.parametrize(
    ("reply", "n_asked", "words"),
    [
        ((500, {}, b"A secret dog."), 3, "3 attempts"),
        ((200, {}, b"A secret dog."), 3, "no chat completion"),
        ((200, {}, b'{"choices": []}'), 3, "no chat completion"),
        ((401, {}, b"A secret dog."), 1, "401"),
        ((302, {"Location": "http://127.0.0.1:9/elsewhere"}, b""), 1, "302"),
    ],
)
def test_a_failing_endpoint_is_told_without_any_text(
    server: Server, reply: Reply, n_asked: int, words: str
) -> None:
    server.answer = lambda body, n: reply
    with pytest.raises(MilpError, match=words) as caught:
        server.judge().prefer([QUESTION])
    # Both orders may be on the way before the first one's failure is known.
    assert n_asked <= len(server.bodies) <= 2 * n_asked
    told = f"{caught.value} {caught.value.__cause__} {safe_traceback(caught.value)}"
    assert "secret" not in told
    assert "turtle" not in told


def test_an_endpoint_that_refuses_is_not_asked_everything_else(server: Server) -> None:
    server.answer = lambda body, n: (403, {}, b"")
    with pytest.raises(MilpError, match="403"):
        server.judge().prefer([QUESTION] * 50)
    assert len(server.bodies) < 50


def test_an_endpoint_that_is_not_there_is_a_mistake(server: Server) -> None:
    with pytest.raises(MilpError, match="ConnectionRefusedError"):
        server.judge(base_url="http://127.0.0.1:9/v1").prefer([QUESTION])


def test_a_silent_endpoint_runs_into_the_time_limit(server: Server) -> None:
    wait = threading.Event()
    server.answer = lambda body, n: (wait.wait(5), completion("[[A]]"))[1]
    with pytest.raises(MilpError, match="TimeoutError"):
        server.judge(timeout=0.05, attempts=1).prefer([QUESTION])
    wait.set()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/v1", "no http"),
        ("localhost:8000", "no http"),
        ("http://me:pw@host/v1", "password"),
        ("http://judge.example/v1", "https only"),
    ],
)
def test_addresses_that_would_give_something_away_are_refused(
    url: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "k-123")
    with pytest.raises(MilpError, match=words) as caught:
        OpenAIJudge(Endpoint(url, "m", key_env="JUDGE_KEY"))
    assert "k-123" not in str(caught.value)
    assert "pw" not in str(caught.value)
