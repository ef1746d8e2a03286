"""The programs against the whole model; rows, limits, meshes, what is compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config.sampling import Greedy, Penalties, TopK, TopP
from llama_jax.generate import decode as programs
from llama_jax.generate.engine import Row
from llama_jax.generate.sample import PenaltyRule, Rule
from llama_jax.model.cache import CACHE_AXES
from sharding import decoding_rules
from tests.generate.frequencies import chi_squared, distribution
from tests.generate.models import CONFIG, COPIES, EIGHT, ONE, ROWS, engine, model, on
from tests.parity.tolerances import ORDER_LOGITS

PROMPTS = ([1, 50, 60, 70, 80], [1], [1, 200, 300], [1] + list(range(100, 112)))
NUM_SLOTS = CONFIG.max_length
HOT = TopP(0.9, temperature=1.5)
MESHES = on(EIGHT, COPIES, slow=[ROWS])


def choice(sampler=None, *, num_pieces=CONFIG.vocab_size, ends=(), penalties=None):
    ends = np.array([*ends, *[-1] * (8 - len(ends))], np.int32)
    rule = Rule.of(sampler or Greedy())
    return programs.Choice(rule, num_pieces, jnp.asarray(ends), penalties)


def rows_of(prompts, *, new=12, seeds=None):
    new = np.broadcast_to(new, len(prompts)).tolist()
    seeds = [(0, i) for i in range(len(prompts))] if seeds is None else seeds
    return [
        Row(ids, len(ids) + n, seed)
        for ids, n, seed in zip(prompts, new, seeds, strict=True)
    ]


def start(prompts, *, mesh=ONE, slots=None, **options):
    return engine(mesh, slots=slots).read(rows_of(prompts, **options))


def first(state, *, mesh=ONE, allowed=None, **options):
    """With the first token of each row."""
    runner = engine(mesh, slots=state.tokens.shape[1])
    return runner.write_first(state, choice(**options), allowed=allowed)


def go_on(state, *, mesh=ONE, steps=NUM_SLOTS, halted=(), allowed=None, **options):
    runner = engine(mesh, slots=state.tokens.shape[1])
    return runner.write(
        state, choice(**options), num_tokens=steps, halted=halted, allowed=allowed
    )


def finish(state, **options):
    """With all tokens of each row."""
    state = go_on(first(state, **options), **options)
    assert np.asarray(state.done).all()
    return state


def written(prompts, state):
    """What stands after each prompt, and the log-probabilities."""
    tokens, logprobs, lengths = jax.device_get(
        (state.tokens, state.logprobs, state.length)
    )
    # Behind the prompts may be rows of padding.
    spans = [slice(len(p), n) for p, n in zip(prompts, lengths, strict=False)]
    return (
        [row[span].tolist() for row, span in zip(tokens, spans, strict=False)],
        [row[span] for row, span in zip(logprobs, spans, strict=False)],
    )


def run(prompts, *, mesh=ONE, slots=None, new=12, seeds=None, **options):
    state = start(prompts, mesh=mesh, slots=slots, new=new, seeds=seeds)
    return written(prompts, finish(state, mesh=mesh, **options))


def same(found, expected):
    assert found[0] == expected[0]
    for a, b in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, atol=ORDER_LOGITS)


def of(parts, order):
    return tuple([part[i] for i in order] for part in parts)


def test_the_loop_writes_what_the_whole_model_would():
    sharded, params = model()
    new, logprobs = run(PROMPTS)
    rows = np.zeros((len(PROMPTS), NUM_SLOTS), np.int32)
    for row, prompt, ids in zip(rows, PROMPTS, new, strict=True):
        row[: len(prompt + ids)] = prompt + ids
    with jax.set_mesh(sharded.mesh):
        logits = jax.jit(sharded.model.apply)({"params": params}, rows)
    table = np.asarray(jax.nn.log_softmax(logits))
    for i, (prompt, ids) in enumerate(zip(PROMPTS, new, strict=True)):
        before = table[i, len(prompt) - 1 : len(prompt + ids) - 1]
        second, best = np.sort(before, axis=-1)[:, -2:].T
        assert len(ids) == 12 and (best - second).min() > 1e-4
        assert before.argmax(-1).tolist() == ids
        np.testing.assert_allclose(logprobs[i], best, atol=ORDER_LOGITS)
    assert len({tuple(ids) for ids in new}) == len(PROMPTS)
    state = start(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        np.testing.assert_allclose(
            state.logits[i], logits[i, len(prompt) - 1], rtol=0, atol=ORDER_LOGITS
        )


def test_a_row_of_any_batch_is_the_row_alone():
    """In any order and company, behind any padding, at its own length."""
    rng = np.random.default_rng(0)
    pool = [
        [1, *rng.integers(3, CONFIG.vocab_size, length - 1).tolist()]
        for length in (1, 2, 3, 5, 8, 13, 18, 19)
    ]
    seeds = [tuple(rng.integers(2**32, size=2).tolist()) for _ in pool]
    alone = [
        of(run([ids], seeds=[seed], sampler=HOT), [0])
        for ids, seed in zip(pool, seeds, strict=True)
    ]
    alone = tuple([row[part][0] for row in alone] for part in range(2))
    for size in (*[4] * 6, *[7] * 3, *[8] * 3):  # 7 are padded to 8
        order = rng.permutation(len(pool))[:size]
        found = run(
            [pool[i] for i in order], seeds=[seeds[i] for i in order], sampler=HOT
        )
        same(found, of(alone, order))


def test_a_longer_cache_changes_nothing():
    same(run(PROMPTS, sampler=HOT, new=7, slots=20), run(PROMPTS, sampler=HOT, new=7))


def test_a_row_that_ends_early_changes_no_other():
    free = run(PROMPTS)
    others = {token for new in free[0][1:] for token in new}
    end = next(token for token in free[0][0] if token not in others)
    stopped = run(PROMPTS, ends=[383, end])
    place = free[0][0].index(end) + 1
    assert place < 12
    same(stopped, tuple([part[0][:place], *part[1:]] for part in free))


def test_a_row_that_is_halted_changes_no_other():
    free = run(PROMPTS)
    state = go_on(first(start(PROMPTS)), steps=2)
    halted = written(PROMPTS, go_on(state, halted=[2]))
    same(halted, tuple([*p[:2], p[2][:3], p[3]] for p in free))
    once = written(PROMPTS, go_on(first(start(PROMPTS)), halted=[0, 3]))
    same(once, tuple([p[0][:1], p[1], p[2], p[3][:1]] for p in free))


def test_rows_end_at_their_own_limits():
    free = run(PROMPTS)
    limited = run(PROMPTS, new=[3, 12, 0, 7])
    assert [len(new) for new in limited[0]] == [3, 12, 0, 7]
    cut = [
        [x[: len(y)] for x, y in zip(part, limited[0], strict=True)] for part in free
    ]
    same(limited, cut)


def test_chunks_of_steps_make_the_whole_and_use_its_memory():
    whole = finish(start(PROMPTS))
    state = first(start(PROMPTS))
    for steps, num_written in ((2, 3), (3, 6), (NUM_SLOTS, 12)):
        before = state
        state = go_on(before, steps=steps)
        assert before.tokens.is_deleted()
        assert all(layer.keys.is_deleted() for layer in before.cache)
        assert (np.asarray(state.length - state.prompt) == num_written).all()
    assert np.array_equal(state.tokens, whole.tokens)
    np.testing.assert_allclose(state.logprobs, whole.logprobs, atol=1e-6)
    # A row that is done stays as it is.
    expected = written(PROMPTS, whole)
    same(written(PROMPTS, go_on(state, steps=5)), expected)


def test_copies_of_rows_that_were_read_go_their_own_ways():
    """As many samples of a prompt as are wanted, and it is read once."""
    order = [0, 0, 3, 1]
    rows = rows_of([PROMPTS[i] for i in order], new=[12, 5, 12, 9])
    runner = engine()
    state = runner.spread(start(PROMPTS), rows, order)
    assert not np.asarray(state.done).any()
    found = written([row.ids for row in rows], finish(state, sampler=HOT))
    expected = run([row.ids for row in rows], new=[12, 5, 12, 9], sampler=HOT)
    same(found, expected)
    assert found[0][0][:5] != found[0][1]


@MESHES
def test_eight_devices_give_the_same(mesh):
    alone, split = start(PROMPTS), start(PROMPTS, mesh=mesh)
    np.testing.assert_allclose(split.logits[:4], alone.logits, atol=ORDER_LOGITS)
    found = written(PROMPTS, finish(split, mesh=mesh, sampler=HOT))
    same(found, run(PROMPTS, sampler=HOT))


def test_devices_that_share_a_head_keep_one_each():
    sharded, _ = model(COPIES)
    assert sharded.model.kv_copies == 2
    for layer in start(PROMPTS, mesh=COPIES).cache:
        for part in (layer.keys, layer.values):
            assert part.addressable_shards[0].data.shape[1] == 1
            # Two neighbours keep the same head.
            heads = np.asarray(part)[:, :, : len(PROMPTS[-1])]
            np.testing.assert_array_equal(heads[:, ::2], heads[:, 1::2])


@MESHES
def test_the_cache_is_split_over_the_mesh_and_the_rest_is_whole(mesh):
    sharded, _ = model(mesh)
    expected = sharded.sharding(*CACHE_AXES)
    assert decoding_rules() == sharded.rules and not expected.is_fully_replicated
    state = start(PROMPTS, mesh=mesh)
    for step in (first, go_on, go_on):
        for part in jax.tree.leaves(state.cache):
            assert part.sharding.is_equivalent_to(expected, part.ndim)
            assert part.addressable_shards[0].data.size == part.size // 8
            assert part.dtype == jnp.float32
        rest = jax.tree.leaves(dataclasses.replace(state, cache=()))
        assert len(rest) == len(dataclasses.fields(state)) - 1
        assert all(part.is_fully_replicated for part in rest)
        state = step(state, mesh=mesh, sampler=HOT)


def test_only_sizes_and_the_kind_of_sampler_are_compiled(compiled):
    run(PROMPTS, sampler=HOT)
    compiled.clear()
    run(
        [[1, 5], [1] * 9, [1, 7, 8], [4] * 15],
        sampler=TopP(0.3, temperature=0.2),
        new=7,
        num_pieces=300,
        ends=[9, 10, 11],
        seeds=[(9, 9)] * 4,
    )
    assert not compiled


def test_padding_of_the_vocabulary_never_comes():
    hot = TopP(1, temperature=50.0)
    for sampler in (Greedy(), hot):
        new, logprobs = run(PROMPTS, sampler=sampler, num_pieces=20)
        assert max(map(max, new)) < 20
        assert np.isfinite(np.concatenate(logprobs)).all()
    assert max(map(max, run(PROMPTS, sampler=hot)[0])) >= 20


def test_only_what_is_allowed_comes():
    """For each row its own; log-probabilities are still those of the whole model."""
    allowed = np.zeros((4, CONFIG.vocab_size), bool)
    for i, row in enumerate(allowed):
        row[10 * i + 5 : 10 * i + 15] = True
    state = start(PROMPTS)
    logits = np.asarray(state.logits)
    new, logprobs = written(
        PROMPTS, finish(state, sampler=TopP(1, temperature=9.0), allowed=allowed)
    )
    for i, ids in enumerate(new):
        assert len(set(ids)) > 1 and allowed[i, ids].all()
    first = [ids[0] for ids in new]
    table = np.asarray(jax.nn.log_softmax(logits))
    found = [row[0] for row in logprobs]
    np.testing.assert_allclose(found, table[np.arange(4), first], atol=ORDER_LOGITS)


def test_penalties_are_compiled_in_and_their_numbers_are_not(compiled):
    def penalised(**numbers):
        return run(PROMPTS, penalties=PenaltyRule.of(Penalties(**numbers)))

    free, held = run(PROMPTS), penalised(presence=100.0)
    assert all(len(set(ids)) == 12 for ids in held[0])
    compiled.clear()
    assert penalised(presence=1e-9)[0] == free[0] == penalised()[0]
    assert not compiled


def test_each_position_of_each_row_draws_anew():
    hot = TopP(1, temperature=1e6)
    new, _ = run([[1]] * 4, sampler=hot)
    assert len({tuple(ids) for ids in new}) == 4
    assert all(len(set(ids)) > 6 for ids in new)
    same_seeds, _ = run([[1]] * 4, sampler=hot, seeds=[(5, 6)] * 4)
    assert len({tuple(ids) for ids in same_seeds}) == 1


def test_what_is_written_follows_the_distribution():
    """The first token of many rows, and the next after the most frequent one."""
    sampler, wrong = TopK(10, temperature=0.8), TopK(10, temperature=1.6)
    prompt, num_rows, runner = [1, 50, 60], 4096, engine()
    rows = rows_of([prompt] * num_rows, new=2, seeds=[(5, i) for i in range(num_rows)])
    state = runner.read(rows[:1])
    logits = np.asarray(state.logits)
    state = runner.spread(state, rows, [0] * num_rows)
    found, _ = written([prompt] * num_rows, finish(state, sampler=sampler))
    one, two = np.array(found).T
    frequent = int(np.bincount(one).argmax())
    after = runner.read(rows_of([[*prompt, frequent]])).logits
    cases = ((one, logits[0]), (two[one == frequent], np.asarray(after)[0]))
    for tokens, expected in cases:
        statistic, degrees, p = chi_squared(tokens, distribution(sampler, expected))
        _, _, p_wrong = chi_squared(tokens, distribution(wrong, expected))
        print(
            f"{sampler}: {len(tokens)} tokens by decode, chi-squared {statistic:.1f}, "
            f"{degrees} degrees, p = {p:.3f}; if warmer, p = {p_wrong:.1e}"
        )
        assert degrees >= 5 and p > 1e-3 and p_wrong < 1e-6
