"""The compiled step: layouts, donation, and steps that are not to be applied."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax.build import build
from llama_jax.config import LlamaConfig
from llama_jax.config.recipe import paper_optimizer
from llama_jax.data.batch import Batch
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.state import abstract_state, fresh_state, from_items, to_items
from llama_jax.train.step import make_eval_step, make_train_step
from sharding import MeshConfig, make_mesh, training_rules

OPTIMIZER_CONFIG = paper_optimizer(peak_lr=0.01, warmup_steps=4)
OPTIMIZER = make_optimizer(OPTIMIZER_CONFIG, 20)
SCHEDULE = make_schedule(OPTIMIZER_CONFIG, 20)
# Between the gradient norms of a usual batch, below 3, and of one odd token, above 5.
SPIKE_NORM = 4.0


@pytest.fixture(scope="module")
def sharded():
    return build(
        LlamaConfig.tiny(),
        make_mesh(MeshConfig(fsdp=4, tensor=2)),
        training_rules(sequence_parallel=False),
        dtype="float32",
        remat="none",
    )


@pytest.fixture(scope="module")
def params(sharded):
    """Initial parameters, on the host."""
    return jax.device_get(sharded.init(seed=0))


@pytest.fixture(scope="module")
def step(sharded):
    """The step, compiled once for all tests here."""
    made = make_train_step(
        sharded, OPTIMIZER, SCHEDULE, accumulate=1, spike_norm=SPIKE_NORM
    )
    with jax.set_mesh(sharded.mesh):
        return made.lower(abstract_state(sharded, OPTIMIZER), _batch()).compile()


@pytest.fixture
def state(sharded, params):
    placed = jax.device_put(params, sharded.param_shardings, may_alias=False)
    return fresh_state(sharded, OPTIMIZER, placed)


def _batch(seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, (8, 9), dtype=np.int32)
    weights = np.ones((8, 8), np.float32)
    return Batch(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=weights, segments=None
    )


def _weighing(weights) -> Batch:
    return dataclasses.replace(_batch(), weights=np.float32(weights))


def _one_token() -> Batch:
    weights = np.zeros((8, 8))
    weights[3, 2] = 1
    return _weighing(weights)


def _host(tree):
    return jax.tree.map(np.array, tree)


@pytest.mark.smoke
def test_a_step_lowers_the_loss_and_keeps_count(step, state):
    losses, rates = [], []
    for _ in range(4):
        state, measured = step(state, _batch())
        losses.append(float(measured.loss))
        rates.append(float(measured.learning_rate))
        assert bool(measured.applied)
    assert losses[0] == losses[1], "the first rate is 0"
    assert losses[3] < losses[2] < losses[1]
    np.testing.assert_allclose(rates, [0, 0.0025, 0.005, 0.0075], rtol=1e-6)
    assert float(measured.num_targets) == 64
    assert (int(state.step), int(state.num_skipped)) == (4, 0)
    assert int(optax.tree_utils.tree_get(state.opt_state, "count", None, _is_adam)) == 4


def _is_adam(path, _):
    """Adam's own count; the schedule has another."""
    return "ScaleByAdamState" in str(path[-1])


def test_layouts_out_are_layouts_in(step, state, sharded):
    wanted = jax.tree.map(lambda leaf: leaf.sharding, state)
    after, _ = step(state, _batch())
    same = jax.tree.map(
        lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim),
        after,
        wanted,
    )
    assert all(jax.tree.leaves(same))
    # A matrix and its two moments: an eighth each on every device.
    moments = optax.tree_utils.tree_get(after.opt_state, "mu")
    for tree in (after.params, moments):
        up = tree["blocks"]["mlp"]["up"]
        assert up.addressable_shards[0].data.size == up.size / 8


def test_no_device_holds_a_whole_gradient(step):
    """Of the feed-forward layers' stack, split in 4 x 2: whole rows are nowhere."""
    program = step.as_text()
    assert "f32[2,16,80]" in program, "a part of the stack"
    assert "f32[2,64,80]" not in program
    assert "f32[2,64,160]" not in program


def test_the_state_is_donated(step, state):
    state_bytes = sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state)
    )
    after, _ = step(state, _batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))
    assert step.memory_analysis().alias_size_in_bytes == pytest.approx(
        state_bytes, rel=0.01
    )


@pytest.mark.parametrize(
    ("batch", "loss"),
    [
        (_weighing(np.full((8, 8), np.nan)), "nan"),
        (_weighing(np.full((8, 8), np.inf)), "nan"),
        (_one_token(), "finite"),
    ],
    ids=["nan", "infinity", "spike"],
)
def test_a_bad_step_changes_nothing_but_the_counts(step, state, batch, loss):
    state, _ = step(state, _batch())  # so that the moments are not 0
    before = _host(state)
    after, measured = step(state, batch)
    assert not bool(measured.applied)
    assert np.isfinite(float(measured.loss)) == (loss == "finite")
    if loss == "finite":
        assert float(measured.grad_norm) > SPIKE_NORM
    for part in ("params", "opt_state"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(before, part), getattr(after, part)
        )
    assert (int(after.step), int(after.num_skipped)) == (2, 1)
    # The schedule does not count the step: the next has the rate that this one had.
    _, next_measured = step(after, _batch(1))
    assert bool(next_measured.applied)
    assert float(next_measured.learning_rate) == float(measured.learning_rate)


def test_a_batch_with_every_token_masked(step, state):
    state, _ = step(state, _batch())
    state, measured = step(state, _weighing(np.zeros((8, 8))))
    assert (float(measured.loss), float(measured.grad_norm)) == (0, 0)
    assert float(measured.num_targets) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(_host(state.params)))


def test_evaluation_gives_sums(sharded, params):
    evaluate = make_eval_step(sharded)
    weights = np.ones((8, 8))
    weights[2:] = 0
    with jax.set_mesh(sharded.mesh):
        placed = jax.device_put(params, sharded.param_shardings)
        whole, part, rest = (
            jax.device_get(evaluate(placed, batch))
            for batch in (_batch(), _weighing(weights), _weighing(1 - weights))
        )
    assert [sums["weight"] for sums in (whole, part, rest)] == [64, 16, 48]
    assert part["loss"] + rest["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert whole["loss"] / 64 == pytest.approx(np.log(256), rel=0.02)


def test_evaluation_with_the_loss_in_chunks(sharded, params):
    totals = []
    for chunks in (1, 4):
        evaluate = make_eval_step(dataclasses.replace(sharded, loss_chunks=chunks))
        with jax.set_mesh(sharded.mesh):
            placed = jax.device_put(params, sharded.param_shardings)
            totals.append(float(evaluate(placed, _batch())["loss"]))
    assert totals[1] == pytest.approx(totals[0], rel=1e-6)


def test_items_of_a_checkpoint_are_the_state(state):
    items = to_items(state)
    assert items.keys() == {"params", "optimizer"}
    again = from_items(items)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert again.params is state.params
    assert jnp.array_equal(again.step, state.step)
