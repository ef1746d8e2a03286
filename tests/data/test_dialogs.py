"""Dialogs: what a file may hold, and the rows that are made of it."""

import json

import numpy as np
import pytest

from llama_jax.data import DialogLines, Prepared, prepare, prepare_dialogs
from llama_jax.data.pipeline import TrainingData, open_data
from llama_jax.data.sources import dialog_files
from llama_jax.errors import DataError, DialogError
from llama_jax.text import encode_example
from tests.data import corpus
from tests.data.dialogs import LENGTH, dialogs, prepare_chats, write

USER = {"role": "user", "content": "ba"}
ANSWER = {"role": "assistant", "content": "ce"}
SYSTEM = {"role": "system", "content": "di"}


@pytest.fixture(scope="module")
def chats(tmp_path_factory, tokenizer) -> Prepared:
    return prepare_chats(tmp_path_factory.mktemp("chats"), tokenizer)


class TestSource:
    def test_messages_and_what_to_learn(self, tmp_path):
        last = json.dumps({"messages": [USER, ANSWER], "learn": "last", "id": 7})
        path = write(tmp_path / "a.jsonl", [[SYSTEM, USER, ANSWER], "", last])
        first, second = DialogLines(path)
        assert first == ([SYSTEM, USER, ANSWER], "all")
        assert second == ([USER, ANSWER], "last")

    @pytest.mark.parametrize(
        ("messages", "words"),
        [
            ([ANSWER], "message 1 is from 'assistant' where 'user' belongs"),
            ([USER, USER, ANSWER], "message 2 is from 'user' where 'assistant'"),
            ([USER, SYSTEM, ANSWER], "message 2 is from 'system'"),
            ([USER, {**ANSWER, "role": "bot"}], "message 2 is from 'bot'"),
            ([USER, {**ANSWER, "content": " "}], r"message 2 \(assistant\) is empty"),
            ([{**USER, "content": ""}, ANSWER], r"message 1 \(user\) is empty"),
            ([USER, {**ANSWER, "content": "[INST]"}], r"special tags .* '\[INST\]'"),
            ([USER], "Last message must be from assistant"),
            ([], "the dialog is empty"),
            ([USER, {"role": "assistant"}], "message 2 needs a text under 'content'"),
            ([USER, "ce"], "message 2 is 'ce', not a mapping"),
        ],
    )
    def test_what_is_no_dialog_to_learn_from(self, tmp_path, messages, words):
        path = write(tmp_path / "a.jsonl", [[USER, ANSWER], messages, [USER, ANSWER]])
        with pytest.raises(DialogError, match=rf"a\.jsonl, line 2: .*{words}"):
            list(DialogLines(path))
        skipping = DialogLines(path, on_error="skip")
        assert len(list(skipping)) == 2
        assert skipping.num_skipped == 1

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("{", "it is not JSON"),
            ('{"messages": ' + "9" * 5000 + "}", "it is not JSON .*digits"),
            ("[]", "it is list, not an object with 'messages'"),
            ('{"dialog": []}', "'messages' is missing; it has 'dialog'"),
            ('{"messages": "ba"}', "'messages' is str, not a list"),
            ('{"messages": [], "learn": "first"}', "\"learn\" is 'first'"),
            (json.dumps({"messages": [USER, {**ANSWER, "content": "\0"}]}), "NUL"),
            (
                '{"messages": [{"role": "user", "content": "\\ud800"}, '
                '{"role": "assistant", "content": "ce"}]}',
                "lone surrogate",
            ),
        ],
    )
    def test_what_is_no_row(self, tmp_path, line, words):
        path = write(tmp_path / "a.jsonl", [line])
        with pytest.raises(DataError, match=rf"a\.jsonl, line 1: .*{words}"):
            list(DialogLines(path))

    def test_files_are_json_lines(self, tmp_path):
        with pytest.raises(DataError, match=r"chat.txt is no \.jsonl file"):
            dialog_files([write(tmp_path / "chat.txt", [])])
        with pytest.raises(DataError, match="does not exist|is no file"):
            dialog_files([tmp_path / "none.jsonl"])


def test_rows_hold_each_dialog_whole_and_mark_what_is_learnt(chats, tokenizer):
    wanted = [encode_example(tokenizer, dialog) for dialog in dialogs(60)]
    num_learnt = 0
    for row in chats.rows("train"):
        assert len(row) <= LENGTH + 1
        starts = np.flatnonzero(row["is_first"])
        assert starts[0] == 0
        for part in np.split(row, starts[1:]):
            assert (part["id"].tolist(), part["is_learnt"].tolist()) in wanted
        num_learnt += row["is_learnt"].sum()
    split = chats.splits["train"]
    assert split.num_targets == num_learnt > 0
    assert split.num_documents == 60
    assert split.num_tokens == sum(
        len(encode_example(tokenizer, d).tokens) for d in dialogs(60)
    )
    assert split.num_too_long == split.num_skipped == 0
    answers = [m["content"] for d in dialogs(60) for m in d if m["role"] == "assistant"]
    assert split.text_bytes == len("".join(answers))


def test_the_last_answer_alone(tmp_path, tokenizer):
    dialog = [USER, ANSWER, USER, ANSWER]
    rows = [json.dumps({"messages": dialog, "learn": how}) for how in ("all", "last")]
    path = write(tmp_path / "a.jsonl", rows)
    prepared = prepare_dialogs(
        {"train": [DialogLines(path)]}, tokenizer, tmp_path / "rows", row_length=200
    )
    (row,) = prepared.rows("train")
    both, last = np.split(row, np.flatnonzero(row["is_first"])[1:])
    half = len(both) // 2
    assert both["is_learnt"][:half].sum() == both["is_learnt"][half:].sum() > 0
    assert last["is_learnt"][:half].sum() == 0
    assert last["is_learnt"][half:].tolist() == both["is_learnt"][half:].tolist()


def test_a_dialog_longer_than_a_row_is_counted_and_not_cut(tmp_path, tokenizer):
    long = [USER, {**ANSWER, "content": "ce " * 50}]
    path = write(tmp_path / "a.jsonl", [[USER, ANSWER], long])
    source = {"train": [DialogLines(path)]}
    prepared = prepare_dialogs(source, tokenizer, tmp_path / "rows", row_length=40)
    split = prepared.splits["train"]
    assert (split.num_documents, split.num_too_long, split.num_rows) == (1, 1, 1)
    with pytest.raises(DataError, match=r"a.jsonl holds no dialogs that fit a row of"):
        prepare_dialogs(source, tokenizer, tmp_path / "other", row_length=4)
    assert not (tmp_path / "other").exists()


def test_training_reads_them(chats):
    config = corpus.data_config(chats, sequence_length=LENGTH, segments=True)
    batch = next(TrainingData(config, batch_size=4))
    assert batch.weights.sum() > 0
    assert batch.segments.max() > 1
    for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
        # A dialog opens with BOS, and so does each of its turns.
        assert set(tokens[np.flatnonzero(np.diff(segments)) + 1]) <= {0, 1}


def test_documents_and_dialogs_do_not_mix(chats, tmp_path, tokenizer):
    texts = {"train": [corpus.source(corpus.texts(30))]}
    with pytest.raises(DataError, match="was prepared from dialogs, not documents"):
        prepare(texts, tokenizer, chats.path, row_length=LENGTH)
    documents = prepare(texts, tokenizer, tmp_path / "rows", row_length=LENGTH)
    config = corpus.data_config(documents, chats, sequence_length=LENGTH)
    with pytest.raises(DataError, match=r"holds dialogs and .* documents"):
        open_data(config)
