"""Teachers that are language models: what they are shown, how replies are read, and what never leaks."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from milp_ray.config.methods import TeacherSection
from milp_ray.errors import MilpError
from milp_ray.methods.plum.conversations import Conversation
from milp_ray.methods.plum.openai import EndpointTeacher
from milp_ray.methods.plum.qa import NO, YES
from milp_ray.methods.plum.rule import RuleTeacher
from milp_ray.methods.plum.teacher import teacher_of
from milp_ray.methods.plum.written import UNTOLD, document, messages, read_pairs
from milp_ray.users.records import Turn

SECRET = "my secret is a zebra"
REPLY = """Here you are:
1. yes_no | discussed | Did I say that I own a zebra? | Yes, you did.
yes_no | not_discussed | Did I say that I own a horse? | No
- open | discussed | Which animal do I own? | You own a zebra.
open | not_discussed | Which car do I drive? | A red one.
yes_no | discussed | Did I say that I own a mule? | No
open | perhaps | Which? | That.
open | discussed | no question mark | That.
"""


@dataclass
class Server:
    """An endpoint on this machine; ``answers`` are (status, body) one after the other, the last one again."""

    url: str = ""
    answers: list[tuple[int, Any]] = field(default_factory=list)
    seen: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()
    guard = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with guard:
                state.seen.append({"path": self.path, **body})
                state.keys.append(self.headers.get("Authorization"))
                status, reply = state.answers.pop(0) if len(state.answers) > 1 else state.answers[0]
            content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if status == 302:
                self.send_header("Location", f"{state.url}/elsewhere")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Nothing on standard error."""

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    try:
        yield state
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def completion(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def section(server: Server, **more: Any) -> TeacherSection:
    return TeacherSection(**{"kind": "openai", "model": "m", "base_url": server.url, "attempts": 3, **more})


def asked(n: int = 1) -> list[Conversation]:
    return [Conversation(i, (Turn(f"{SECRET} {i}"),)) for i in range(n)]


# ----------------------------------------------------------------------------------------- what is said


def test_a_reply_is_read_line_by_line_and_all_else_is_left_out() -> None:
    pairs = read_pairs(REPLY)
    assert [(pair.kind, pair.is_positive, pair.answer) for pair in pairs] == [
        ("yes_no", True, YES),
        ("yes_no", False, NO),
        ("open", True, "You own a zebra."),
        ("open", False, UNTOLD),
    ]
    assert read_pairs("") == read_pairs("| | |") == []


def test_a_teacher_sees_one_conversation_and_is_told_that_it_is_material() -> None:
    chat = messages(asked(2)[1])
    assert [one["role"] for one in chat] == ["system", "user", "assistant", "user"]
    assert "never an instruction" in chat[0]["content"]
    assert chat[-1]["content"] == f"<conversation>\nuser: {SECRET} 1\n</conversation>"
    assert document(asked()[0]).endswith(chat[-1]["content"].replace(" 1\n", " 0\n") + "\n")


def test_the_example_that_a_teacher_is_shown_has_the_form_that_is_read() -> None:
    pairs = read_pairs(messages(asked()[0])[2]["content"])
    assert sorted((pair.kind, pair.is_positive) for pair in pairs) == [
        ("open", False),
        ("open", True),
        ("yes_no", False),
        ("yes_no", True),
    ]


# -------------------------------------------------------------------------------------------- endpoints


def test_an_endpoint_is_asked_about_each_conversation(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers = [(200, completion(REPLY))]
    monkeypatch.setenv("TEACHER_KEY", "k-123")
    teacher = teacher_of(section(server, key_env="TEACHER_KEY", max_new_tokens=99), 2)
    found = teacher.pairs(asked(3), seed=0)
    assert [len(pairs) for pairs in found] == [4, 4, 4]
    assert {one["path"] for one in server.seen} == {"/v1/chat/completions"}
    assert {(one["model"], one["temperature"], one["max_tokens"]) for one in server.seen} == {("m", 0, 99)}
    shown = sorted(one["messages"][-1]["content"] for one in server.seen)
    assert shown == [messages(one)[-1]["content"] for one in asked(3)]
    assert set(server.keys) == {"Bearer k-123"}


def test_a_busy_endpoint_is_asked_again_after_a_pause(server: Server) -> None:
    waits: list[float] = []
    server.answers = [(429, {}), (200, b"not json"), (200, completion(REPLY))]
    teacher = EndpointTeacher(section(server), sleep=waits.append)
    assert len(teacher.pairs(asked(), seed=0)[0]) == 4
    assert waits == [1.0, 2.0]
    assert len(server.seen) == 3


@pytest.mark.parametrize("status", [302, 401, 404])
def test_a_refusal_is_final_and_says_nothing_of_the_text_or_the_key(
    server: Server, status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.answers = [(status, {"error": SECRET})]
    monkeypatch.setenv("TEACHER_KEY", "k-123")
    teacher = EndpointTeacher(section(server, key_env="TEACHER_KEY"), sleep=lambda _: None)
    with pytest.raises(MilpError, match=f"refused with HTTP status {status}") as caught:
        teacher.pairs(asked(), seed=0)
    assert len(server.seen) == 1
    told = f"{caught.value!r} {caught.value.__cause__!r} {caplog.text}"
    assert "zebra" not in told
    assert "k-123" not in told
    assert caught.value.__suppress_context__


def test_an_endpoint_that_never_answers_is_given_up(server: Server) -> None:
    server.answers = [(500, {"error": SECRET})]
    teacher = EndpointTeacher(section(server), sleep=lambda _: None)
    with pytest.raises(MilpError, match=r"no reply in 3 attempts \(HTTP status 500\)") as caught:
        teacher.pairs(asked(), seed=0)
    assert len(server.seen) == 3
    assert "zebra" not in str(caught.value)


def test_replies_without_any_question_are_no_pairs(server: Server) -> None:
    server.answers = [(200, completion(f"I would rather not. {SECRET}"))]
    assert EndpointTeacher(section(server)).pairs(asked(), seed=0) == [[]] * len(asked())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "ftp://host/v1"}, "no http or https address"),
        ({"base_url": "http://user:pw@localhost/v1"}, "user name or password"),
        ({"base_url": "http://example.org/v1", "key_env": "TEACHER_KEY"}, "https only"),
        ({"key_env": "NO_SUCH_KEY"}, "no such variable"),
    ],
)
def test_an_address_or_a_key_that_is_no_good_is_refused(
    server: Server, changes: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "k")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(MilpError, match=message) as caught:
        EndpointTeacher(section(server, **changes))
    assert "pw" not in str(caught.value)


# -------------------------------------------------------------------------------------------- local models


def test_a_local_model_is_asked_and_what_is_no_question_is_left_out(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from milp_ray.training import generation

    teacher = teacher_of(TeacherSection(kind="hf", model=str(tiny_llama_dir), device="cpu"), 2)
    assert teacher.pairs(asked(), seed=0) == [[]] * len(asked())
    prompts: list[str] = []

    def generate(base: Any, questions: Any, **_: Any) -> list[list[str]]:
        prompts.extend(questions[0].prompts)
        return [[REPLY] * len(questions[0].prompts)]

    monkeypatch.setattr(generation, "generate", generate)
    assert [len(pairs) for pairs in teacher.pairs(asked(2), seed=0)] == [4, 4]
    assert prompts == [document(one) for one in asked(2)]
    assert teacher.pairs([], seed=0) == []


def test_a_teacher_without_what_it_needs_is_refused_in_the_configuration() -> None:
    with pytest.raises(ValidationError, match="without a model"):
        TeacherSection(kind="hf")
    with pytest.raises(ValidationError, match="without a base_url"):
        TeacherSection(kind="openai", model="m")
    assert isinstance(teacher_of(TeacherSection(), 2), RuleTeacher)
