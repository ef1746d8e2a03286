"""The loop against the whole model at each step; rows, chunks, meshes, compilations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config.sampling import Greedy, TopP
from llama_jax.generate.decode import Vocabulary, decode, prefill
from llama_jax.generate.sample import Rule
from sharding import decoding_rules
from sharding.axes import BATCH, KV_HEADS, LAYERS, SEQUENCE
from tests.generate.models import CONFIG, COPIES, EIGHT, ONE, model

PROMPTS = ([1, 50, 60, 70, 80], [1], [1, 200, 300], [1] + list(range(100, 112)))
NUM_SLOTS, NUM_PROMPT = 32, 16
ALL = Vocabulary(CONFIG.vocab_size, eos_id=-1)


def start(prompts, *, mesh=ONE, sampler=None, new=12, vocabulary=ALL, seeds=None):
    sharded, params = model(mesh)
    tokens = np.full((len(prompts), NUM_PROMPT), 7, np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    seeds = [(0, i) for i in range(len(prompts))] if seeds is None else seeds
    with jax.set_mesh(sharded.mesh):
        return prefill(
            sharded.model,
            params,
            tokens,
            lengths,
            lengths + np.asarray(new, np.int32),
            np.array(seeds, np.uint32),
            Rule.of(sampler or Greedy()),
            vocabulary,
            slots=NUM_SLOTS,
        )


def go_on(state, *, mesh=ONE, sampler=None, vocabulary=ALL, steps=NUM_SLOTS):
    sharded, params = model(mesh)
    rule = Rule.of(sampler or Greedy())
    with jax.set_mesh(sharded.mesh):
        return decode(sharded.model, params, state, rule, vocabulary, steps)


def run(prompts, *, seeds=None, new=12, **options):
    """What was written after each prompt, and the log-probabilities."""
    state = go_on(start(prompts, new=new, seeds=seeds, **options), **options)
    assert np.asarray(state.done).all()
    tokens, logprobs, lengths = jax.device_get(
        (state.tokens, state.logprobs, state.length)
    )
    spans = [slice(len(p), n) for p, n in zip(prompts, lengths, strict=True)]
    return (
        [row[span].tolist() for row, span in zip(tokens, spans, strict=True)],
        [row[span] for row, span in zip(logprobs, spans, strict=True)],
    )


def same(found, expected):
    assert found[0] == expected[0]
    for a, b in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_loop_writes_what_the_whole_model_would():
    sharded, params = model()
    written, logprobs = run(PROMPTS)
    with jax.set_mesh(sharded.mesh):
        logprobs_of = jax.jit(
            lambda tokens: jax.nn.log_softmax(
                sharded.model.apply({"params": params}, tokens)
            )
        )
        rows = np.zeros((len(PROMPTS), NUM_SLOTS), np.int32)
        for row, prompt, new in zip(rows, PROMPTS, written, strict=True):
            row[: len(prompt + new)] = prompt + new
        table = np.asarray(logprobs_of(rows))
    for i, (prompt, new) in enumerate(zip(PROMPTS, written, strict=True)):
        before = table[i, len(prompt) - 1 : len(prompt + new) - 1]
        assert len(new) == 12 and before.argmax(-1).tolist() == new
        np.testing.assert_allclose(logprobs[i], before.max(-1), atol=1e-5)
    assert len({tuple(new) for new in written}) == len(PROMPTS)


def test_a_row_is_the_same_alone_and_in_any_order():
    sampler = TopP(0.9, temperature=1.5)
    together = run(PROMPTS, sampler=sampler)
    order = [2, 0, 3, 1]
    turned = run(
        [PROMPTS[i] for i in order], sampler=sampler, seeds=[(0, i) for i in order]
    )
    same(turned, tuple([part[i] for i in order] for part in together))
    alone = run(PROMPTS[:1], sampler=sampler, seeds=[(0, 0)])
    same(alone, tuple(part[:1] for part in together))


def test_a_row_that_ends_early_changes_no_other():
    free = run(PROMPTS)
    others = {token for new in free[0][1:] for token in new}
    eos = next(token for token in free[0][0] if token not in others)
    stopped = run(PROMPTS, vocabulary=Vocabulary(CONFIG.vocab_size, eos))
    end = free[0][0].index(eos) + 1
    assert end < 12
    same(stopped, tuple([part[0][:end], *part[1:]] for part in free))


def test_rows_end_at_their_own_limits():
    free = run(PROMPTS)
    limited = run(PROMPTS, new=[3, 12, 1, 7])
    assert [len(new) for new in limited[0]] == [3, 12, 1, 7]
    cut = [
        [x[: len(y)] for x, y in zip(part, limited[0], strict=True)] for part in free
    ]
    same(limited, cut)


def test_chunks_of_steps_make_the_whole_and_use_its_memory():
    whole = go_on(start(PROMPTS))
    state = start(PROMPTS)
    for steps in (1, 2, 3, NUM_SLOTS):
        before = state
        state = go_on(before, steps=steps)
        assert before.cache.keys.is_deleted() and before.tokens.is_deleted()
    assert np.array_equal(state.tokens, whole.tokens)
    np.testing.assert_allclose(state.logprobs, whole.logprobs, atol=1e-6)
    # A row that is done stays as it is.
    after = go_on(state, steps=5)
    assert np.array_equal(after.tokens, whole.tokens)


@pytest.mark.parametrize("mesh", [EIGHT, COPIES], ids=["eight", "copies"])
def test_eight_devices_write_the_same(mesh):
    sampler = TopP(0.9, temperature=1.5)
    same(run(PROMPTS, mesh=mesh, sampler=sampler), run(PROMPTS, sampler=sampler))


def test_devices_that_share_a_head_keep_one_each():
    """Of the cache; weights are those of any mesh, and computed with head by head."""
    sharded, params = model(COPIES)
    assert sharded.model.kv_copies == 2
    key = params["blocks"]["attention"]["key"]
    assert key.shape == model()[1]["blocks"]["attention"]["key"].shape
    state = start(PROMPTS, mesh=COPIES)
    for part in (state.cache.keys, state.cache.values):
        assert part.addressable_shards[0].data.shape[3] == 1
    # Two neighbours keep the same head.
    heads = np.asarray(state.cache.keys)[:, :, :NUM_PROMPT]
    np.testing.assert_array_equal(heads[..., ::2, :], heads[..., 1::2, :])


def test_the_cache_is_split_over_the_mesh_and_the_rest_is_whole():
    sharded, _ = model(EIGHT)
    expected = sharded.sharding(LAYERS, BATCH, SEQUENCE, KV_HEADS, None)
    assert decoding_rules() == sharded.rules and not expected.is_fully_replicated
    options = {"mesh": EIGHT, "sampler": TopP(0.9, temperature=1.5)}
    state = start(PROMPTS, **options)
    for _ in range(2):
        for part in (state.cache.keys, state.cache.values):
            assert part.sharding.is_equivalent_to(expected, part.ndim)
            assert part.addressable_shards[0].data.size == part.size // 8
            assert part.dtype == jnp.float32
        rest = [getattr(state, f.name) for f in dataclasses.fields(state)[1:]]
        assert all(part.is_fully_replicated for part in rest)
        state = go_on(state, **options, steps=2)


def test_only_sizes_and_the_kind_of_sampler_are_compiled():
    run(PROMPTS, sampler=TopP(0.9, temperature=1.5))
    compiled = prefill._cache_size(), decode._cache_size()
    rows = [[1, 5], [1] * 9, [1, 7, 8], [4] * 15]
    run(
        rows,
        sampler=TopP(0.3, temperature=0.2),
        new=7,
        vocabulary=Vocabulary(300, eos_id=9),
        seeds=[(9, 9)] * 4,
    )
    assert (prefill._cache_size(), decode._cache_size()) == compiled


def test_padding_of_the_vocabulary_never_comes():
    hot = TopP(1, temperature=50.0)
    for sampler in (Greedy(), hot):
        written, logprobs = run(PROMPTS, sampler=sampler, vocabulary=Vocabulary(20, -1))
        assert max(max(new) for new in written) < 20
        assert np.isfinite(np.concatenate(logprobs)).all()
    assert max(max(new) for new in run(PROMPTS, sampler=hot)[0]) >= 20


def test_each_position_of_each_row_draws_anew():
    hot = TopP(1, temperature=1e6)
    written, _ = run([[1]] * 4, sampler=hot)
    assert len({tuple(new) for new in written}) == 4
    assert all(len(set(new)) > 6 for new in written)
    same_seeds, _ = run([[1]] * 4, sampler=hot, seeds=[(5, 6)] * 4)
    assert len({tuple(new) for new in same_seeds}) == 1
