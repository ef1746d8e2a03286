"""Prompts: what a file may hold, the rows made of it, and their batches."""

import json

import pytest

from llama_jax.data import (
    Prepared,
    PromptBatch,
    PromptLines,
    TrainingData,
    ValidationData,
    prepare_prompts,
)
from llama_jax.data.sources import prompt_files
from llama_jax.errors import DataError, DialogError
from llama_jax.text import encode_dialog
from tests.data import corpus
from tests.data.comparisons import write
from tests.data.prompts import LENGTH, MAX_NEW_TOKENS, prepare_questions, prompts

USER = {"role": "user", "content": "ba"}
ANSWER = {"role": "assistant", "content": "ce"}


@pytest.fixture(scope="module")
def questions(tmp_path_factory, tokenizer) -> Prepared:
    return prepare_questions(tmp_path_factory.mktemp("questions"), tokenizer)


def prepared_of(rows, tokenizer, directory, *, room=MAX_NEW_TOKENS) -> Prepared:
    return prepare_prompts(
        {"train": [PromptLines(write(directory / "a.jsonl", rows))]},
        tokenizer,
        directory / "rows",
        row_length=LENGTH,
        max_new_tokens=room,
    )


class TestSource:
    def test_what_a_line_says(self, tmp_path):
        rows = [
            {"messages": [USER]},
            {"messages": [USER, ANSWER, USER], "about_safety": True},
            {"messages": [USER], "about_safety": True, "risk": "unqualified advice"},
        ]
        first, second, third = PromptLines(write(tmp_path / "a.jsonl", rows))
        assert first == ([USER], False, None)
        assert second == ([USER, ANSWER, USER], True, None)
        assert third == ([USER], True, "unqualified advice")

    @pytest.mark.parametrize(
        ("row", "kind", "words"),
        [
            ({}, DataError, "the field 'messages' is missing"),
            ({"messages": [USER], "about_safety": 1}, DataError, '"about_safety" is 1'),
            (
                {"messages": [USER], "about_safety": True, "risk": "rain"},
                DataError,
                "\"risk\" is 'rain': .*'unqualified advice'",
            ),
            (
                {"messages": [USER], "risk": "unqualified advice"},
                DataError,
                '"risk" is .*: beside "about_safety": true',
            ),
            (
                {"messages": [USER, ANSWER]},
                DialogError,
                "message 3 is from 'assistant'",
            ),
            ({"messages": []}, DialogError, "message 1 is from 'assistant'"),
            (
                {"messages": [{"role": "user", "content": " "}]},
                DialogError,
                "message 1 .user. is empty",
            ),
        ],
    )
    def test_what_is_no_prompt(self, row, kind, words, tmp_path):
        path = write(tmp_path / "a.jsonl", [{"messages": [USER]}, row])
        with pytest.raises(kind, match=rf"a.jsonl, line 2: .*{words}"):
            list(PromptLines(path))
        source = PromptLines(path, on_error="skip")
        assert len(list(source)) == source.num_skipped == 1

    def test_files(self, tmp_path):
        with pytest.raises(DataError, match="is no .jsonl file: prompts are objects"):
            prompt_files([write(tmp_path / "a.txt", [])])


class TestRows:
    def test_one_prompt_is_one_row(self, questions, tokenizer):
        made = prompts(60)
        rows = questions.rows("train")
        expected = {
            (tuple(encode_dialog(tokenizer, p["messages"])), "about_safety" in p)
            for p in made
        }
        short = {e for e in expected if len(e[0]) <= LENGTH - MAX_NEW_TOKENS}
        found = {
            (tuple(row["id"].tolist()), bool(row["about_safety"].all()))
            for row in map(rows.__getitem__, range(len(rows)))
        }
        assert found == short
        assert 0 < len(short) < len(expected)
        assert {True, False} == {about for _, about in found}
        split = questions.splits["train"]
        assert split.num_documents == split.num_targets == split.num_rows == len(rows)
        assert split.num_documents + split.num_too_long == 60
        assert questions.room == MAX_NEW_TOKENS
        assert Prepared.load(questions.path) == questions

    def test_prepared_otherwise(self, questions, tokenizer, tmp_path):
        prepared_of([{"messages": [USER]}], tokenizer, tmp_path)
        with pytest.raises(
            DataError, match="with max_new_tokens 12, not 11: choose an"
        ):
            prepared_of([{"messages": [USER]}], tokenizer, tmp_path, room=11)

    def test_what_leaves_no_room(self, tokenizer, tmp_path):
        for room in (0, LENGTH):
            with pytest.raises(DataError, match="leave prompt and answer at least one"):
                prepared_of([{"messages": [USER]}], tokenizer, tmp_path, room=room)
        with pytest.raises(DataError, match=r"no prompts that fit a row of 1 tokens"):
            prepared_of([{"messages": [USER]}], tokenizer, tmp_path, room=LENGTH - 1)


class TestBatches:
    def test_each_prompt_is_padded_at_its_end(self, questions, tokenizer):
        config = corpus.data_config(questions, sequence_length=LENGTH)
        batch = next(TrainingData(config, batch_size=16))
        assert isinstance(batch, PromptBatch)
        assert batch.tokens.shape == (16, LENGTH)
        for row, length in zip(batch.tokens, batch.lengths, strict=True):
            assert 0 < length <= LENGTH - MAX_NEW_TOKENS
            assert not row[length:].any()
            assert tokenizer.decode(row[:length].tolist()).endswith("[/INST]")

    def test_the_last_batch_is_filled_up(self, questions):
        config = corpus.data_config(questions, sequence_length=LENGTH)
        batches = list(ValidationData(config, batch_size=8))
        num = questions.splits["validation"].num_rows
        assert sum((batch.lengths > 0).sum() for batch in batches) == num
        assert {batch.tokens.shape for batch in batches} == {(8, LENGTH)}
        assert not batches[-1].tokens[batches[-1].lengths == 0].any()


def test_what_older_data_sets_do_not_say(questions, tmp_path):
    """`room` came later."""
    content = json.loads((questions.path / "dataset.json").read_text())
    del content["room"]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert Prepared.load(tmp_path).room == 0
