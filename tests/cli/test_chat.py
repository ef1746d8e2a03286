"""`llama-jax chat` over a pipe; tests/endtoend/test_chat_terminal.py has a terminal."""

import dataclasses
import io
import json
import logging
import signal
import sys
from collections.abc import Iterator

import pytest

from llama_jax.cli import main
from llama_jax.cli.chat import Terminal
from llama_jax.cli.writer import show
from llama_jax.config.sampling import Greedy, TopP
from tests.generate import models

# Short answers, and in a context with room for several of them.
NUM_NEW = 8
EOS = 2


def start(**options):
    """A chat with the small model."""
    return models.llm(config=models.LONG).start_chat(max_new_tokens=NUM_NEW, **options)


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C interrupts, whatever started the tests: a job of a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def typed(monkeypatch):
    """A function that lets standard input be some text, or bytes."""

    def type_(text: str | bytes) -> None:
        content = text.encode() if isinstance(text, str) else text
        stdin = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)

    return type_


@pytest.fixture
def talk(typed, capsys):
    """A function that types all of a text to a chat: what is answered, what is said."""

    def run(chat, text: str | bytes) -> tuple[str, list[str]]:
        typed(text)
        Terminal(chat).run()
        said = capsys.readouterr()
        return said.out, said.err.splitlines()

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("a place with späces") / "model"
    models.llm(config=models.LONG).save(path)
    return str(path)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_what_would_command_a_terminal_is_shown(is_terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    text = "a\tb\n\x1b]0;title\x07\r\x9bé"
    show(text)
    shown = "a\tb\n\\x1b]0;title\\x07\\x0d\\x9bé" if is_terminal else text
    assert capsys.readouterr().out == shown


def test_the_options_reach_the_chat(checkpoint, typed, capsys):
    argv = ["chat", checkpoint, "--system", "han", "--max-new-tokens", str(NUM_NEW)]
    argv += ["--seed", "3", "--temperature", "1.5", "--stop", "a", "e"]
    typed("ba ce\n\n   \nfo gu\n")
    assert main(argv) == 0
    answered, said = capsys.readouterr()
    twin = start(system="han", seed=3, sampler=TopP(0.9, temperature=1.5))
    twin.settings = dataclasses.replace(twin.settings, stop=["a", "e"])
    texts = [twin.send(question).text for question in ("ba ce", "fo gu")]
    assert answered == "".join(f"{text}\n" for text in texts)
    assert said.count("[prompt") == 2


def test_dry_run(checkpoint, capsys):
    argv = ["chat", checkpoint, "--top-k", "4", "--system", "Be kind.", "--dry-run"]
    assert main(argv) == 0
    assert capsys.readouterr().out.endswith(
        "parameters, float32; TopK(k=4, temperature=0.6), system 'Be kind.'\n"
    )


def test_answers_and_what_was_cached(talk):
    chat = start(sampler=Greedy())
    answered, notes = talk(chat, "ba ce\nfo gu\n")
    twin = start(sampler=Greedy())
    for question, note in zip(["ba ce", "fo gu"], notes, strict=True):
        answer = twin.send(question)
        assert f"prompt {answer.timing.prompt_tokens} tokens, " in note
        assert f"{answer.timing.cached_tokens} of them cached; " in note
        assert f"{len(answer.tokens)} written, " in note
        assert answered.startswith(f"{answer.text}\n")
        answered = answered.removeprefix(f"{answer.text}\n")
    assert answered == ""
    assert chat.messages == twin.messages
    assert chat.last.timing.cached_tokens > 0
    assert notes[1].endswith("; cut by --max-new-tokens]")


def test_the_end_of_the_context(talk):
    # Long enough to leave room for less than an answer.
    question = "ba ce di " * 251
    chat = start(sampler=Greedy())
    room = models.LONG.max_length - start().send(question).timing.prompt_tokens
    assert 0 < room < NUM_NEW
    _, (note,) = talk(chat, f"{question}\n")
    assert f"; {room} written, " in note
    assert note.endswith("; cut by the end of the context]")


def test_a_message_of_several_lines(talk):
    chat = start()
    talk(chat, "ba \\\n\\\nce\n")
    assert chat.messages[0]["content"] == "ba \n\nce"
    talk(chat, "fo\\\n")  # and there the pipe ends
    assert chat.messages[2]["content"] == "fo"


def test_a_message_may_begin_with_a_slash(talk):
    chat = start()
    talk(chat, " /help\n")
    assert chat.messages[0]["content"] == " /help"


def test_commands(talk, tmp_path):
    file = tmp_path / "a chät.jsonl"
    chat = start(system="han", sampler=TopP(1.0, temperature=2.0))
    script = f"ba ce\n/save {file}\n/reset\n/seed 7\nba ce\n/exit\nnever read\n"
    answered, notes = talk(chat, script)
    saved = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert notes[1:4] == [
        f"3 messages are in {file}.",
        "The conversation is forgotten.",
        "The seed is 7.",
    ]
    assert len(notes) == 5
    twin = start(system="han", sampler=TopP(1.0, temperature=2.0), seed=7)
    again = twin.send("ba ce").text
    assert again != saved[-1]["content"]
    assert answered == f"{saved[-1]['content']}\n{again}\n"
    assert chat.messages == twin.messages


def test_help_lists_the_commands(talk):
    _, notes = talk(start(), "/help\n")
    for name in ("/help", "/reset", "/save FILE", "/seed N", "/exit"):
        assert any(line.startswith(name) for line in notes)


@pytest.mark.parametrize(
    "line", ["/rest", "/", "/reset now", "/seed", "/seed ten", "/seed 1.5", "/save"]
)
def test_what_is_no_command(talk, line):
    answered, (note,) = talk(start(), f"{line}\n")
    assert answered == ""
    assert note == (
        f"{line!r} is no command: type /help, /reset, /save FILE, /seed N with an "
        "integer, or /exit."
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[INST] ba", "special tags are not allowed"),
        (b"ba \xff", "lone surrogate"),
        (b"/save nowhere/chat.jsonl", "cannot be written"),
        (b"ba ce " * 400, "Or type /reset, which forgets the conversation."),
    ],
    ids=["tag", "no UTF-8", "no directory", "too long"],
)
def test_the_chat_goes_on_after_an_error(talk, line, reason):
    chat = start(sampler=Greedy())
    answered, notes = talk(chat, b"ba ce\n" + line + b"\nfo gu\n")
    twin = start(sampler=Greedy())
    texts = [twin.send(question).text for question in ("ba ce", "fo gu")]
    assert answered == "".join(f"{text}\n" for text in texts)
    assert len(notes) == 3
    assert reason in notes[1]
    assert chat.messages == twin.messages


def test_an_answer_of_nothing(talk):
    chat = start()
    chat.settings = dataclasses.replace(chat.settings, allowed=lambda ids: [EOS])
    answered, notes = talk(chat, "ba ce\n")
    assert answered == "\n"
    assert "; 0 written, " in notes[0]
    assert chat.messages[-1] == {"role": "assistant", "content": ""}


def test_ctrl_c_before_anything_is_written(talk, monkeypatch):
    chat = start()

    def stream(content: str) -> Iterator[str]:
        signal.raise_signal(signal.SIGINT)
        yield ""

    monkeypatch.setattr(chat, "stream", stream)
    answered, notes = talk(chat, "ba ce\n")
    assert answered == "\n"
    assert notes == ["Nothing was written, and the question is forgotten."]


class Interrupting(io.StringIO):
    """Standard output during whose first `num` pieces somebody presses Ctrl-C twice."""

    num = 1

    def write(self, text: str) -> int:
        if text and self.num:
            self.num -= 1
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_stops_the_answer_and_not_the_chat(typed, monkeypatch, capsys):
    output = Interrupting()
    monkeypatch.setattr(sys, "stdout", output)
    chat = start(sampler=Greedy())
    typed("ba ce\nfo gu\n")
    Terminal(chat).run()
    stopped, whole = capsys.readouterr().err.splitlines()
    assert stopped.endswith("; stopped]")
    assert "stopped" not in whole
    first, second = (message["content"] for message in chat.messages[1::2])
    assert output.getvalue() == f"{first}\n{second}\n"
    answer = start(sampler=Greedy()).send("ba ce").text
    assert answer.startswith(first) and answer != first
    assert chat.last.timing.cached_tokens > 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_at_a_pipe_leaves(checkpoint, monkeypatch):
    class Waiting(io.StringIO):
        def readline(self, size: int = -1) -> str:
            signal.raise_signal(signal.SIGINT)
            return ""

    monkeypatch.setattr(sys, "stdin", Waiting())
    assert main(["chat", checkpoint]) == 130


class AtTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def ask_for_help(monkeypatch):
    """At what says that it is a terminal, and has no keys that edit a line."""
    monkeypatch.setattr(sys, "stdin", AtTerminal("/help\n"))
    monkeypatch.setattr(sys, "stdout", AtTerminal())
    Terminal(start()).run()


def test_history_that_cannot_be_kept(monkeypatch, tmp_path, caplog, capsys):
    pytest.importorskip("readline")
    blocked = tmp_path / "a file"
    blocked.touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(blocked))
    with caplog.at_level(logging.WARNING):
        ask_for_help(monkeypatch)
    assert "What is typed is not kept for later chats: " in caplog.text
    assert "/save FILE" in capsys.readouterr().err


def test_without_readline(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "readline", None)
    ask_for_help(monkeypatch)
    said = capsys.readouterr().err
    assert said.startswith("/help lists commands; Ctrl-D leaves.\n/help ")
    assert list(tmp_path.iterdir()) == []
