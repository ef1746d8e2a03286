"""Conversations: what the cache keeps, interruptions, the end of the context."""

import dataclasses
import itertools
import json

import pytest

from llama_jax.config.sampling import TopP
from llama_jax.errors import DialogError, GenerationError, TokenizerError
from llama_jax.generate import Chat, Generator, Settings
from llama_jax.text import encode_dialog
from tests.generate.models import LONG, generator, near, tokenizer

SLOTS = 256
SETTINGS = Settings(max_new_tokens=12, sampler=TopP(0.9, temperature=1.2), seed=3)
QUESTIONS = ["Bace di?", "Han kel nos.", "Wex?", "Tur yal, mir?"]


@pytest.fixture(scope="module")
def writer() -> Generator:
    return generator(config=LONG, slots=SLOTS)


@pytest.fixture
def chat(writer) -> Chat:
    return Chat(writer, system="Gu fo.", settings=SETTINGS)


@pytest.fixture
def known(writer, monkeypatch):
    """Of each reading: the tokens of the prompt, and those that were known."""
    seen = []
    read = writer.engine.read

    def noted(rows, *, state=None, known=0):
        seen.append((len(rows[0].ids), known))
        return read(rows, state=state, known=known)

    monkeypatch.setattr(writer.engine, "read", noted)
    return seen


def require_stateless(chat, writer):
    """The newest answer is the one that the same messages have without a cache."""
    *asked, answered = chat.messages
    assert answered == {"role": "assistant", "content": chat.last.text}
    near([chat.last], [writer.chat(asked, SETTINGS)])


def interrupt(monkeypatch, engine, *, at, when):
    """Ctrl-C at one of the calls of `write`: before it has run, or when it has."""
    write, calls = engine.write, []

    def interrupted(*args, **options):
        calls.append(when)
        if len(calls) == at and when == "before":
            raise KeyboardInterrupt
        state = write(*args, **options)
        if len(calls) == at:
            raise KeyboardInterrupt
        return state

    monkeypatch.setattr(engine, "write", interrupted)


def test_each_answer_is_the_one_without_a_cache(chat, writer):
    cached = []
    for number, question in enumerate(QUESTIONS):
        answer = chat.send(question)
        assert answer is chat.last
        assert len(chat.messages) == 1 + 2 * (number + 1)
        assert chat.messages[-2] == {"role": "user", "content": question}
        require_stateless(chat, writer)
        assert answer.timing.prompt_tokens == len(
            encode_dialog(tokenizer(), chat.messages[:-1])
        )
        cached.append(answer.timing.cached_tokens)
    print(f"prompt tokens that the cache had, by turn: {cached}")
    assert cached[0] == 0 and cached == sorted(set(cached))


def test_only_what_is_new_is_read(chat, known):
    for question in QUESTIONS:
        chat.send(question)
    prompts, had = zip(*known, strict=True)
    assert had[0] == 0
    for turn in (1, 2, 3):
        # All of the question before is known, if not the answer as it was written:
        # the dialog spells the answer's text anew.
        assert had[turn] >= prompts[turn - 1]
        assert chat.last.timing.cached_tokens == had[-1]
        assert prompts[turn] - had[turn] < 60 < prompts[turn] or turn == 1


def test_a_stream_is_the_answer(chat, writer):
    chat.send(QUESTIONS[0])
    pieces = list(chat.stream(QUESTIONS[1]))
    assert len(pieces) > 1 and "".join(pieces) == chat.last.text
    require_stateless(chat, writer)


def test_a_stream_that_is_closed_leaves_what_it_said(chat, writer):
    chat.send(QUESTIONS[0])
    stream = chat.stream(QUESTIONS[1])
    first = next(piece for piece in stream if piece)
    stream.close()
    assert chat.messages[-1] == {"role": "assistant", "content": chat.last.text}
    assert chat.last.text.startswith(first) and len(chat.last.tokens) < 12
    chat.send(QUESTIONS[2])
    assert chat.last.timing.cached_tokens > 20
    require_stateless(chat, writer)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupted_answer_leaves_a_chat(chat, writer, monkeypatch, at, when):
    """Before the program of a step has run, and after, when its memory is gone."""
    chat.send(QUESTIONS[0])
    before = chat.messages
    with monkeypatch.context() as patch:
        interrupt(patch, writer.engine, at=at, when=when)
        shown = []
        with pytest.raises(KeyboardInterrupt):
            shown.extend(chat.stream(QUESTIONS[1]))
    if at == 1:
        assert chat.messages == before
    else:
        asked = {"role": "user", "content": QUESTIONS[1]}
        said = {"role": "assistant", "content": chat.last.text}
        assert chat.messages == [*before, asked, said]
        assert chat.last.text.startswith("".join(shown)) and chat.last.text
    chat.send(QUESTIONS[2])
    assert (chat.last.timing.cached_tokens > 0) == (when == "before")
    require_stateless(chat, writer)
    chat.send(QUESTIONS[3])
    assert chat.last.timing.cached_tokens > 0
    require_stateless(chat, writer)


def test_an_interruption_while_the_question_is_read(chat, writer, monkeypatch):
    chat.send(QUESTIONS[0])
    before, last = chat.messages, chat.last

    def read(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer.engine, "read", read)
        with pytest.raises(KeyboardInterrupt):
            chat.send(QUESTIONS[1])
    assert chat.messages == before and chat.last is last
    chat.send(QUESTIONS[1])
    require_stateless(chat, writer)


def test_a_stream_that_is_closed_while_the_question_is_read(chat, writer, monkeypatch):
    """The question is forgotten, but what was read of it need not be read again."""
    chat.send(QUESTIONS[0])
    before, known = chat.messages, chat.last.timing.prompt_tokens
    with monkeypatch.context() as patch:
        patch.setattr("llama_jax.generate.session._is_ready", lambda _: False)
        stream = chat.stream(QUESTIONS[1])
        assert [next(stream) for _ in range(3)] == [""] * 3
        stream.close()
    assert chat.messages == before
    chat.send(QUESTIONS[1])
    assert chat.last.timing.cached_tokens > known + 20
    require_stateless(chat, writer)


def test_an_empty_answer_is_one(chat, writer):
    first = chat.send(QUESTIONS[0]).tokens[0]
    chat.reset()
    chat.settings = dataclasses.replace(SETTINGS, stop_tokens=[first])
    assert chat.send(QUESTIONS[0]).text == ""
    assert chat.messages[-1] == {"role": "assistant", "content": ""}
    assert chat.last.finish_reason == "stop" and chat.last.tokens == []
    assert "0 tokens" in chat._repr_html_()
    chat.settings = SETTINGS
    chat.send(QUESTIONS[1])
    require_stateless(chat, writer)


def test_reset_forgets_all_but_the_system_message(chat, writer):
    first = chat.send(QUESTIONS[0])
    chat.send(QUESTIONS[1])
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Gu fo."}]
    assert chat.last is None
    assert chat.send(QUESTIONS[0]) == first
    assert chat.last.timing.cached_tokens == 0


def test_a_reset_between_a_stream_and_its_first_piece(chat, writer):
    chat.send(QUESTIONS[0])
    stream = chat.stream(QUESTIONS[1])
    asked = [*chat.messages, {"role": "user", "content": QUESTIONS[1]}]
    chat.reset()
    assert "".join(stream) == writer.chat(asked, SETTINGS).text


def test_without_a_system_message(writer):
    chat = Chat(writer, system=None, settings=SETTINGS)
    assert chat.messages == []
    chat.send(QUESTIONS[0])
    require_stateless(chat, writer)


def test_two_chats_at_once(writer):
    chats = [Chat(writer, system=s, settings=SETTINGS) for s in ("Gu.", "Mir.")]
    for question in QUESTIONS[:3]:
        for chat in chats:
            chat.send(question)
            require_stateless(chat, writer)
    streams = [chat.stream(QUESTIONS[3]) for chat in chats]
    for _ in itertools.zip_longest(*streams):
        pass
    for chat in chats:
        require_stateless(chat, writer)


def test_messages_are_copies(chat):
    chat.send(QUESTIONS[0])
    chat.messages[0]["content"] = "changed"
    chat.messages.clear()
    assert chat.messages[0]["content"] == "Gu fo."


def test_settings_may_be_replaced(chat):
    chat.send(QUESTIONS[0])
    chat.settings = dataclasses.replace(SETTINGS, max_new_tokens=3)
    assert len(chat.send(QUESTIONS[1]).tokens) == 3


def test_a_full_context_is_an_error_and_the_chat_goes_on(chat, writer):
    chat.send(QUESTIONS[0])
    before = chat.messages
    with pytest.raises(
        GenerationError, match=r"^the conversation has \d{3} tokens.*context is 256"
    ):
        chat.send("bace " * 120)
    assert chat.messages == before
    chat.send(QUESTIONS[1])
    require_stateless(chat, writer)


def test_an_answer_that_fills_the_context(writer):
    for seed in range(20):
        endless = dataclasses.replace(SETTINGS, max_new_tokens=999, seed=seed)
        chat = Chat(writer, system=None, settings=endless)
        answer = chat.send(QUESTIONS[0])
        if answer.finish_reason == "length":
            break
    assert answer.timing.prompt_tokens + len(answer.tokens) == SLOTS
    with pytest.raises(GenerationError, match="context is 256"):
        chat.send(QUESTIONS[1])
    chat.reset()
    assert chat.send(QUESTIONS[0]) == answer


@pytest.mark.parametrize(
    ("content", "error"),
    [("a [INST] b", DialogError), ("\ud83d", TokenizerError), (5, DialogError)],
)
def test_what_is_no_message(chat, writer, content, error):
    with pytest.raises(error):
        chat.stream(content)
    assert len(chat.messages) == 1
    chat.send(QUESTIONS[0])
    require_stateless(chat, writer)


def test_save_writes_json_lines(chat, tmp_path):
    chat.send('Zoë 🦙 \n \u2028 "quoted"')
    chat.save(tmp_path / "ché.jsonl")
    lines = (tmp_path / "ché.jsonl").read_bytes().decode().split("\n")
    assert lines.pop() == ""
    assert [json.loads(line) for line in lines] == chat.messages
    assert "Zoë 🦙" in lines[1]
    with pytest.raises(GenerationError, match="none/x cannot be written"):
        chat.save(tmp_path / "none" / "x")


def test_a_page_shows_each_message_and_no_tag_of_its_own(chat):
    assert "Gu fo." in chat._repr_html_()
    chat.send("<b>Bace</b> & <script>")
    chat.send(QUESTIONS[1])
    page = chat._repr_html_()
    assert "<script>" not in page and "<b>" not in page
    assert "&lt;b&gt;Bace&lt;/b&gt; &amp; &lt;script&gt;" in page
    assert page.count("<small>") == 5
    # The newest answer shows its tokens, the older one its text.
    assert chat.last._repr_html_() in page
    assert page.count("<span") == len(chat.last.tokens)
