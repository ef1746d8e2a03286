"""The closed form: exact where it can be, near compiled steps where it cannot."""

import dataclasses
import math

import jax
import pytest

from llama_jax.build import build_for
from llama_jax.planning.estimate import estimate, state_bytes
from llama_jax.planning.plan import resolve
from llama_jax.planning.topology import parse
from llama_jax.train.optimizer import make_optimizer
from llama_jax.train.state import abstract_state
from sharding import MeshConfig, ShardingError, make_mesh
from tests import runs
from tests.planning.recipes import V5P_64, V5P_128, changed, closed_form

REMATS = ("none", "projections", "attention_block", "attention", "full")


def held(tree) -> int:
    """Bytes on one device of everything but counts."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if leaf.ndim
    )


@pytest.mark.parametrize(
    ("mesh", "moments"),
    [
        (MeshConfig(fsdp=8), "float32"),
        (MeshConfig(fsdp=4, tensor=2), "bfloat16"),
        (MeshConfig(data=2, fsdp=2, context=2), "float32"),
        (MeshConfig(fsdp=1, tensor=8), "float32"),  # more chips than key/value heads
    ],
    ids=str,
)
def test_the_state_is_exact(mesh, moments):
    recipe = runs.changed(runs.recipe("data", mesh=mesh), "optimizer", moments=moments)
    optimizer = make_optimizer(recipe.optimizer, 1)
    state = abstract_state(build_for(recipe, make_mesh(mesh)), optimizer)
    assert state_bytes(recipe.model, mesh, 8, moments) == (
        held(state.params),
        held(state.opt_state),
    )


def test_it_is_near_to_what_compiling_gave():
    """Steps as compiled in November 2026: predicted seconds, GiB per chip."""
    compiled = {
        (V5P_64, "projections", 4): (2.55, 55.1),
        (V5P_128, "projections:30,attention_block", 2): (11.2, 81.6),
        (V5P_128, "projections:40,attention_block", 2): (11.2, 89.8),
    }
    for (place, remat, rows), (seconds, gib) in compiled.items():
        recipe, topology = resolve(place, None, None)
        batch = rows * topology.num_chips
        recipe = changed(
            recipe, remat=remat, batch_size=batch, accumulate=1, loss_chunks=1
        )
        found = estimate(recipe, topology)
        assert found.step_seconds == pytest.approx(seconds, rel=0.15)
        assert found.hbm_bytes / 2**30 == pytest.approx(gib, rel=0.15)


def test_saving_more_takes_memory_and_saves_time():
    plans = [closed_form(V5P_64, remat=remat) for remat in REMATS]
    memory = [plan.memory["activations"] for plan in plans]
    seconds = [plan.step_seconds for plan in plans]
    assert memory == sorted(memory, reverse=True)
    assert len(set(memory)) == len(memory)
    assert seconds == sorted(seconds)
    assert seconds[-1] / seconds[0] == pytest.approx(4 / 3, rel=0.1)


def test_remat_may_change_along_the_depth():
    half = closed_form(V5P_64, remat="projections:16,full").memory["activations"]
    parts = [
        closed_form(V5P_64, remat=remat).memory["activations"]
        for remat in ("projections", "full")
    ]
    assert half == pytest.approx(sum(parts) / 2)


def test_accumulation_divides_activations_and_repeats_what_is_sent():
    once = closed_form(V5P_64, accumulate=1)
    four = closed_form(V5P_64, accumulate=4)
    assert four.memory["activations"] == pytest.approx(once.memory["activations"] / 4)
    gathered = [plan.collectives[0].num_bytes for plan in (once, four)]
    assert gathered[1] == pytest.approx(4 * gathered[0])
    assert four.seconds["matmul"] == pytest.approx(once.seconds["matmul"])


def test_what_each_axis_sends():
    recipe, topology = resolve(V5P_64, None, None)

    def axes(**factors):
        mesh = MeshConfig(**factors)
        found = estimate(changed(recipe, mesh=mesh), topology).collectives
        return {(each.axes[0], each.kind) for each in found}

    assert axes(fsdp=64) == {("fsdp", "all-gather"), ("fsdp", "all-reduce")}
    assert axes(data=4, fsdp=16) == {
        ("fsdp", "all-gather"),
        ("fsdp", "reduce-scatter"),
        ("data", "all-reduce"),
    }
    assert ("tensor", "all-reduce") in axes(fsdp=16, tensor=4)
    assert ("context", "collective-permute") in axes(fsdp=16, context=4)


def test_slices_exchange_gradients_over_the_slow_network():
    recipe, topology = resolve(V5P_64, None, slices=2)
    assert topology.num_chips == 128
    across = [
        each for each in estimate(recipe, topology).collectives if each.network == "dcn"
    ]
    assert [(each.kind, each.axes) for each in across] == [("all-reduce", ("data",))]
    # Each chip exchanges its own part of the float32 gradients, whatever the slice.
    assert across[0].num_bytes == pytest.approx(4 * 6.74e9 / 64, rel=0.01)


def test_attention_that_writes_scores_out_is_slow():
    dot = closed_form(V5P_64, attention="dot")
    splash = closed_form(V5P_64, attention="splash")
    assert dot.seconds["attention"] > 5 * splash.seconds["attention"]


def test_a_mesh_that_does_not_divide_is_refused():
    recipe = runs.recipe("data", mesh=MeshConfig(fsdp=8))
    with pytest.raises(ShardingError, match="takes 8 devices, but there are 4"):
        estimate(recipe, parse("v5e:2x2"))
    odd = dataclasses.replace(recipe.model, vocab_size=401)
    with pytest.raises(ShardingError, match="401"):
        estimate(
            dataclasses.replace(recipe, model=odd, mesh=MeshConfig(fsdp=4, tensor=2)),
            parse("v5e:2x4"),
        )
