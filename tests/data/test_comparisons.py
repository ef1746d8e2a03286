"""Comparisons: what a file may hold, the rows made of it, and their batches."""

import json

import numpy as np
import pytest

from llama_jax.data import (
    ComparisonLines,
    Prepared,
    TrainingData,
    ValidationData,
    prepare_comparisons,
)
from llama_jax.data.batch import batch_comparisons
from llama_jax.data.prepared import CHOSEN, RATINGS, REJECTED, SAFE, UNSAFE
from llama_jax.data.sources import comparison_files
from llama_jax.errors import DataError, DialogError
from llama_jax.text import encode_example
from tests.data import corpus
from tests.data.comparisons import LENGTH, comparisons, prepare_pairs, write

USER = {"role": "user", "content": "ba"}
ANSWER = {"role": "assistant", "content": "ce"}
PAIR = {"messages": [USER], "chosen": "ce", "rejected": "di"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tokenizer) -> Prepared:
    return prepare_pairs(tmp_path_factory.mktemp("pairs"), tokenizer)


def prepared_of(rows, tokenizer, directory, *, length=LENGTH) -> Prepared:
    source = ComparisonLines(write(directory / "a.jsonl", rows))
    return prepare_comparisons(
        {"train": [source]}, tokenizer, directory / "rows", row_length=length
    )


def ids(tokenizer, pair, answer: str) -> list[int]:
    dialog = [*pair["messages"], {"role": "assistant", "content": pair[answer]}]
    return encode_example(tokenizer, dialog).tokens


class TestSource:
    def test_what_a_line_says(self, tmp_path):
        rated = {**PAIR, "rating": "slightly better"}
        labelled = {**PAIR, "chosen_is_safe": True, "rejected_is_safe": False}
        path = write(tmp_path / "a.jsonl", [rated, labelled])
        first, second = ComparisonLines(path)
        assert first == ([USER], "ce", "di", "slightly better", None)
        assert second == ([USER], "ce", "di", None, (True, False))

    @pytest.mark.parametrize(
        ("change", "kind", "words"),
        [
            (
                {"rating": "much better"},
                DataError,
                "\"rating\" is 'much better': .* 'ne",
            ),
            ({"rating": 3}, DataError, '"rating" is 3: write one of'),
            ({"rejected": "ce "}, DataError, "both answers are the same"),
            ({"chosen": " "}, DataError, "the text is empty"),
            ({"rejected": 7}, DataError, "the field 'rejected' is int, not text"),
            ({"messages": "ba"}, DataError, "'messages' is str, not a list"),
            ({"chosen_is_safe": True}, DataError, '"rejected_is_safe" None: write'),
            (
                {"chosen_is_safe": "yes", "rejected_is_safe": "no"},
                DataError,
                "\"chosen_is_safe\" is 'yes'",
            ),
            ({"chosen": "[/INST]"}, DialogError, "special tags are not allowed"),
            ({"messages": []}, DialogError, "message 1 is from 'assistant'"),
            (
                {"messages": [USER, ANSWER]},
                DialogError,
                "message 3 is from 'assistant' where 'user' belongs",
            ),
        ],
    )
    def test_what_is_no_comparison(self, tmp_path, change, kind, words):
        path = write(tmp_path / "a.jsonl", [PAIR, {**PAIR, **change}, PAIR])
        with pytest.raises(kind, match=rf"a\.jsonl, line 2: .*{words}"):
            list(ComparisonLines(path))
        skipping = ComparisonLines(path, on_error="skip")
        assert len(list(skipping)) == 2
        assert skipping.num_skipped == 1

    @pytest.mark.parametrize("missing", ["messages", "chosen", "rejected"])
    def test_a_missing_field(self, tmp_path, missing):
        row = {name: value for name, value in PAIR.items() if name != missing}
        path = write(tmp_path / "a.jsonl", [row])
        with pytest.raises(DataError, match=f"the field '{missing}' is missing"):
            list(ComparisonLines(path))

    def test_files_are_json_lines(self, tmp_path):
        path = tmp_path / "pairs.txt"
        path.write_text(json.dumps(PAIR))
        with pytest.raises(DataError, match=r"pairs.txt is no \.jsonl file: compar"):
            comparison_files([path])


def test_rows_hold_pairs_whole_and_say_where_answers_end(pairs, tokenizer):
    safe = {True: SAFE, False: UNSAFE, None: 0}
    wanted = [
        (
            ids(tokenizer, pair, "chosen"),
            ids(tokenizer, pair, "rejected"),
            RATINGS.index(pair.get("rating")),
            safe[pair.get("chosen_is_safe")],
            safe[pair.get("rejected_is_safe")],
        )
        for pair in comparisons(60)
    ]
    found = []
    for row in pairs.rows("train"):
        assert len(row) <= LENGTH
        starts = np.flatnonzero(row["is_first"])
        assert starts[0] == 0
        parts = np.split(row, starts[1:])
        for chosen, rejected in zip(parts[::2], parts[1::2], strict=True):
            assert chosen["answer"].tolist() == [0] * (len(chosen) - 1) + [CHOSEN]
            assert rejected["answer"].tolist() == [0] * (len(rejected) - 1) + [REJECTED]
            found.append(
                (
                    chosen["id"].tolist(),
                    rejected["id"].tolist(),
                    chosen["rating"][-1],
                    chosen["safety"][-1],
                    rejected["safety"][-1],
                )
            )
    kept = [pair for pair in wanted if pair[3:] != (UNSAFE, SAFE)]
    assert sorted(found) == sorted(kept)
    split = pairs.splits["train"]
    assert split.num_documents == split.num_targets == len(kept)
    assert split.num_unsafe_chosen == 60 - len(kept) > 0
    assert split.num_tokens == sum(len(pair[0]) + len(pair[1]) for pair in kept)


def test_a_pair_longer_than_a_row_is_counted_and_not_cut(tmp_path, tokenizer):
    size = sum(len(ids(tokenizer, PAIR, answer)) for answer in ("chosen", "rejected"))
    long = {**PAIR, "rejected": "di di"}
    prepared = prepared_of([PAIR, long], tokenizer, tmp_path, length=size)
    split = prepared.splits["train"]
    assert (split.num_documents, split.num_too_long) == (1, 1)
    (row,) = prepared.rows("train")
    assert len(row) == size
    with pytest.raises(DataError, match=r"holds no comparisons that fit a row of 4 "):
        prepare_comparisons(
            {"train": [ComparisonLines(tmp_path / "a.jsonl")]},
            tokenizer,
            tmp_path / "none",
            row_length=4,
        )
    assert not (tmp_path / "none").exists()


def test_a_batch_points_from_the_chosen_answer_to_the_other(tmp_path, tokenizer):
    rated = {**PAIR, "rating": "better", "chosen": "ce fo"}
    rated |= {"chosen_is_safe": True, "rejected_is_safe": False}
    (row,) = prepared_of([PAIR, rated], tokenizer, tmp_path, length=128).rows("train")
    batch = batch_comparisons([row, np.empty(0, np.int32)], length=128)
    sizes = [
        len(ids(tokenizer, pair, answer))
        for pair in (PAIR, rated)
        for answer in ("chosen", "rejected")
    ]
    ends = np.cumsum(sizes) - 1
    np.testing.assert_array_equal(np.flatnonzero(batch.weights[0]), ends[::2])
    np.testing.assert_array_equal(batch.rejected[0, ends[::2]], ends[1::2])
    np.testing.assert_array_equal(
        batch.rating[0, ends[::2]], [RATINGS.index(None), RATINGS.index("better")]
    )
    np.testing.assert_array_equal(batch.safety[0, ends], [0, 0, SAFE, UNSAFE])
    assert batch.safety[0].sum() == SAFE + UNSAFE
    inside = batch.segments[0, : ends[-1] + 1]
    np.testing.assert_array_equal(inside, np.repeat([1, 2, 3, 4], sizes))
    assert len(set(batch.segments[0, ends[-1] :])) == 128 - ends[-1]
    assert batch.weights[1].sum() == batch.safety[1].sum() == 0


def test_training_and_validation_read_them(pairs):
    config = corpus.data_config(pairs, sequence_length=LENGTH, segments=True)
    batch = next(TrainingData(config, batch_size=4))
    assert batch.tokens.shape == batch.rejected.shape == (4, LENGTH)
    assert batch.weights.sum() > 4
    held_out = ValidationData(config, batch_size=4)
    weights = sum(batch.weights.sum() for batch in held_out)
    assert weights == held_out.num_targets == pairs.splits["validation"].num_targets
