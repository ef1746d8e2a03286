import itertools
import json

import jax
import numpy as np
import pytest

from llama_jax.data import TrainingData, ValidationData
from tests.data.corpus import LENGTH, data_config, prepare_corpus

BATCH = 8


def take(data, num):
    return [batch.tokens for batch in itertools.islice(data, num)]


def as_set(batches):
    return {tuple(row) for batch in batches for row in batch.tolist()}


@pytest.fixture(scope="module")
def other(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("other") / "rows"
    return prepare_corpus(path, tokenizer, seed=9, num_shards=1)


def test_an_epoch_has_every_row_once(prepared):
    rows = [tuple(row[:-1]) for row in prepared.rows("train")]
    data = TrainingData(data_config(prepared), batch_size=1)
    epochs = [[tuple(b[0]) for b in take(data, len(rows))] for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(rows)
        assert epoch != rows
    assert epochs[0] != epochs[1]


def test_the_same_seed_gives_the_same_rows(prepared):
    first, again, other = (
        np.stack(take(TrainingData(config, batch_size=BATCH), 5))
        for config in (
            data_config(prepared),
            data_config(prepared),
            data_config(prepared, seed=6),
        )
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("num_hosts", [2, 4, 8])
def test_hosts_share_one_global_batch(prepared, num_hosts):
    config = data_config(prepared)
    alone = take(TrainingData(config, batch_size=BATCH), 6)
    hosts = [
        take(TrainingData(config, batch_size=BATCH, host=host, num_hosts=num_hosts), 6)
        for host in range(num_hosts)
    ]
    for whole, *parts in zip(alone, *hosts, strict=True):
        np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_resuming_anywhere_goes_on_as_if_uninterrupted(prepared):
    config = data_config(prepared)
    data = TrainingData(config, batch_size=BATCH)
    take(data, 7)
    position = json.loads(json.dumps(data.position))
    assert position == 7 * BATCH  # consumed: what was read ahead does not count
    expected = take(data, 20)  # into the next epoch
    resumed = TrainingData(config, batch_size=BATCH, position=position)
    np.testing.assert_array_equal(take(resumed, 20), expected)
    resumed.position = position
    np.testing.assert_array_equal(take(resumed, 20), expected)


def test_resuming_with_other_hosts_and_another_batch_size(prepared):
    """One integer is enough, because rows have one global order."""
    config = data_config(prepared)
    expected = np.concatenate(take(TrainingData(config, batch_size=4), 9))
    parts = [
        TrainingData(config, batch_size=6, host=host, num_hosts=3, position=12)
        for host in range(3)
    ]
    resumed = np.concatenate(
        [np.concatenate([next(part).tokens for part in parts]) for _ in range(4)]
    )
    np.testing.assert_array_equal(resumed, expected[12:36])
    assert {part.position for part in parts} == {36}


def test_a_mixture_draws_in_proportion(prepared, other):
    rows = {
        name: as_set([np.stack([row[:-1] for row in part.rows("train")])])
        for name, part in (("prepared", prepared), ("other", other))
    }
    assert not rows["prepared"] & rows["other"]
    config = data_config(prepared, other, weights=(3.0, 1.0))
    drawn = [
        tuple(row)
        for row in np.concatenate(take(TrainingData(config, batch_size=4), 20))
    ]
    assert sum(row in rows["prepared"] for row in drawn) == 60
    assert sum(row in rows["other"] for row in drawn) == 20


def test_a_mixture_resumes(prepared, other):
    config = data_config(prepared, other, weights=(2.0, 1.0))
    data = TrainingData(config, batch_size=4)
    take(data, 5)
    expected = take(data, 5)
    resumed = TrainingData(config, batch_size=4, position=20)
    np.testing.assert_array_equal(take(resumed, 5), expected)


@pytest.mark.parametrize("num_hosts", [1, 3])
def test_validation_covers_every_token_once(prepared, num_hosts):
    parts = [
        ValidationData(
            data_config(prepared), batch_size=9, host=host, num_hosts=num_hosts
        )
        for host in range(num_hosts)
    ]
    batches = [
        jax.tree.map(lambda *rows: np.concatenate(rows), *batch)
        for batch in zip(*parts, strict=True)  # every host has equally many
    ]
    assert {batch.tokens.shape for batch in batches} == {(9, LENGTH)}
    assert len(batches) == len(parts[0])
    scored = [
        target
        for batch in batches
        for target in batch.targets[batch.weights == 1].tolist()
    ]
    rows = list(prepared.rows("validation"))
    assert scored == [token for row in rows for token in row[1:].tolist()]
    assert parts[0].num_targets == len(scored)
    assert parts[0].text_bytes == prepared.splits["validation"].text_bytes


def test_validation_can_be_read_again(prepared):
    data = ValidationData(data_config(prepared), batch_size=9)
    first, again = list(data), list(data)
    for one, other in zip(first, again, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_validation_of_a_mixture_is_all_of_both(prepared, other):
    both = ValidationData(data_config(prepared, other), batch_size=4)
    apart = [ValidationData(data_config(p), batch_size=4) for p in (prepared, other)]
    assert both.num_targets == sum(data.num_targets for data in apart)
    assert sum(batch.weights.sum() for batch in both) == both.num_targets


def test_segments_are_the_documents_of_a_row(prepared, tokenizer):
    config = data_config(prepared, segments=True)
    for batch in itertools.islice(TrainingData(config, batch_size=BATCH), 3):
        starts = batch.tokens == tokenizer.bos_id
        np.testing.assert_array_equal(
            np.diff(batch.segments, axis=1), starts[:, 1:].astype(int)
        )
    assert next(iter(ValidationData(config, batch_size=4))).segments is not None
