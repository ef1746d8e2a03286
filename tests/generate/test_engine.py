"""Prompts in chunks, from what is known already, in kept memory, in eight bits."""

import dataclasses

import jax
import numpy as np
import pytest

from llama_jax.config.sampling import Greedy
from llama_jax.generate import Settings, score
from llama_jax.generate import decode as programs
from llama_jax.generate.engine import Row
from llama_jax.model.int8 import Quantized
from tests.generate.models import COPIES, EIGHT, LONG, ONE, ROWS, engine, generator, on
from tests.parity.tolerances import INT8_LOGITS, ORDER_LOGITS

SLOTS = 100
RNG = np.random.default_rng(0)
IDS = [1, *RNG.integers(3, LONG.vocab_size, SLOTS - 1).tolist()]
LENGTHS = (5, 60, 90, 99)


def row(length, *, limit=SLOTS):
    return Row(IDS[:length], limit, (1, length))


def write(runner, state, *, num_tokens):
    settings = Settings(max_new_tokens=1, sampler=Greedy())
    choice = generator().choice(settings)
    state = runner.write_first(state, choice)
    return runner.write(state, choice, num_tokens=num_tokens - 1)


def long_engine(mesh=ONE, *, slots=SLOTS, **options):
    return engine(mesh, config=LONG, slots=slots, **options)


@pytest.fixture
def sizes(monkeypatch):
    """The chunks that are read, as they come: first positions and sizes."""
    seen = []
    prefill = programs.prefill

    def noted(decoder, weights, state, start, *, num_new):
        seen.append((int(start), num_new))
        return prefill(decoder, weights, state, start, num_new=num_new)

    monkeypatch.setattr(programs, "prefill", noted)
    return seen


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("llama_jax.generate.rows._CHUNK", 64)


@pytest.fixture(scope="module")
def whole():
    """Logits after each position of IDS, all read at once."""
    return score.logits(long_engine(), [IDS])[0]


def close(state, whole, lengths):
    for logits, length in zip(np.asarray(state.logits), lengths, strict=False):
        np.testing.assert_allclose(logits, whole[length - 1], rtol=0, atol=ORDER_LOGITS)


def test_one_chunk_is_the_whole(whole, sizes):
    close(long_engine().read([row(n) for n in LENGTHS]), whole, LENGTHS)
    assert sizes == [(0, SLOTS)]


@on(ONE, slow=[EIGHT, ROWS, COPIES])
def test_chunks_are_the_whole(whole, sizes, small_chunks, mesh):
    """Of rows that end in any of them; the last is shifted into the cache."""
    runner = long_engine(mesh)
    state = runner.read([row(n) for n in LENGTHS])
    close(state, whole, LENGTHS)
    assert sizes == [(0, 64), (36, 64)]
    state = write(runner, state, num_tokens=SLOTS)
    assert np.asarray(state.length).tolist() == [SLOTS] * 4
    alone = long_engine()
    expected = write(alone, alone.read([row(n) for n in LENGTHS]), num_tokens=SLOTS)
    np.testing.assert_array_equal(state.tokens, expected.tokens)


def test_many_chunks_are_the_whole(sizes):
    """At their real size, in the context of the model."""
    ids = np.random.default_rng(1).integers(3, LONG.vocab_size, 990).tolist()
    runner = long_engine(slots=1000)
    state = runner.read([Row(ids, 1000)])
    assert sizes == [(0, 512), (488, 512)]
    close(state, score.logits(runner, [ids])[0], [990])


@pytest.mark.parametrize("known", [1, 30, 50, 88])
def test_what_is_known_is_not_read_again(whole, sizes, known):
    runner = long_engine()
    state = runner.read([row(known)])
    # Something was written after it, in slots that now are the prompt's.
    state = write(runner, state, num_tokens=5)
    sizes.clear()
    close(runner.read([row(90)], state=state, known=known), whole, [90])
    assert sum(size for _, size in sizes) == (SLOTS if known < 26 else 64)
    assert sizes[0][0] == {1: 0, 30: 30, 50: 36, 88: 36}[known]


def test_the_next_request_has_the_cache_of_the_last(whole):
    runner = long_engine()
    first = runner.read([row(99)])
    runner.release(first)
    second = runner.read([row(5)])
    assert all(x.is_deleted() for x in jax.tree.leaves(first.cache))
    close(second, whole, [5])
    # But not of one that is not released, nor for another number of rows.
    third = runner.read([row(60)])
    assert not second.cache[0].keys.is_deleted()
    runner.release(third)
    close(runner.read([row(n) for n in LENGTHS]), whole, LENGTHS)


@pytest.mark.parametrize(
    ("weights", "cache"),
    [
        (True, None),
        (False, "int8"),
        pytest.param(True, "int8", marks=pytest.mark.slow),
    ],
    ids=["weights", "cache", "both"],
)
def test_eight_bits_are_near(whole, weights, cache):
    """And not the same."""
    runner = long_engine(int8=weights, cache=cache)
    assert runner.is_int8 is weights
    state = runner.read([row(n) for n in LENGTHS])
    assert isinstance(state.cache[0].keys, Quantized) is (cache == "int8")
    off = np.abs(np.asarray(state.logits) - whole[np.array(LENGTHS) - 1]).max()
    print(f"int8 weights: {weights}, cache: {cache}; logits off by {off:.4f} at most")
    assert 10 * ORDER_LOGITS < off < INT8_LOGITS


@pytest.mark.parametrize("field", ["out", "down", "unembed", "query_key_value"])
def test_a_wrong_scale_is_not_near(whole, field):
    """Too large by a fifth, in one kind of matrix: the bound above would notice."""
    runner = long_engine(int8=True)

    def wrong(kept):
        return dataclasses.replace(kept, scale=kept.scale * 1.2)

    tree = runner.weights
    if field == "unembed":
        tree = dataclasses.replace(tree, unembed=wrong(tree.unembed))
    else:
        layers = tuple(
            dataclasses.replace(layer, **{field: wrong(getattr(layer, field))})
            for layer in tree.layers
        )
        tree = dataclasses.replace(tree, layers=layers)
    runner.weights = tree
    state = runner.read([row(n) for n in LENGTHS])
    off = np.abs(np.asarray(state.logits) - whole[np.array(LENGTHS) - 1]).max()
    print(f"{field}: off by {off:.3f}")
    assert off > INT8_LOGITS


@on(slow=[EIGHT, ROWS, COPIES])
def test_eight_bits_are_the_same_on_eight_devices(mesh):
    rows = [row(n) for n in LENGTHS]
    alone, split = (
        long_engine(place, int8=True, cache="int8").read(rows) for place in (ONE, mesh)
    )
    off = np.abs(np.asarray(alone.logits) - np.asarray(split.logits)[:4]).max()
    print(f"int8 on {mesh}: off by {off:.2e}")
    assert off < INT8_LOGITS / 20
    for part in jax.tree.leaves(split.cache):
        assert part.addressable_shards[0].data.size == part.size // 8


@pytest.mark.parametrize("cache", ["int8", "bfloat16"])
def test_a_narrow_cache_is_in_use_and_near(whole, cache):
    runner = long_engine(cache=cache)
    state = runner.read([row(60)])
    kept = {str(leaf.dtype) for leaf in jax.tree.leaves(state.cache)}
    assert kept == {"int8": {"int8", "float32"}, "bfloat16": {"bfloat16"}}[cache]
    new = [*IDS[:60], 5, 7, 11]
    expected = score.logits(long_engine(), [new])[0, -1]
    if cache == "int8":
        # A scale that is wrong by a fifth would be noticed.
        wrong = jax.tree.map(lambda x: x * 1.2 if x.ndim == 3 else x + 0, state.cache)
        wrong = dataclasses.replace(state, cache=wrong)
        far = runner.read([Row(new, SLOTS)], state=wrong, known=60).logits
        assert np.abs(far[0] - expected).max() > INT8_LOGITS
    near = runner.read([Row(new, SLOTS)], state=state, known=60).logits
    assert np.abs(near[0] - expected).max() < INT8_LOGITS
