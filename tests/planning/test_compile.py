"""Real steps of a small model, compiled for slices that are not here.

Those marked `plan` need libtpu: `make plan`.
"""

import dataclasses
import math

import jax
import pytest

from llama_jax.config import LlamaConfig
from llama_jax.config.data import DataConfig
from llama_jax.config.recipe import PretrainRecipe, paper_optimizer
from llama_jax.config.train import TrainConfig
from llama_jax.errors import PlanError
from llama_jax.model.count import num_params
from llama_jax.planning.compile import compile_step, memory_refused, uncached
from llama_jax.planning.schedule import Placement, predict
from llama_jax.planning.topology import parse
from sharding import MeshConfig, ShardingError

GIB = 2**30
# Weights are large beside activations, so that one sees where the weights are; and
# layers many, so that one of them is small beside all.
MODEL = LlamaConfig(
    vocab_size=512,
    dim=512,
    num_layers=8,
    num_heads=4,
    num_kv_heads=4,
    hidden_dim=2048,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_length=128,
)


SMALL = dataclasses.replace(MODEL, dim=256, hidden_dim=512, num_heads=2, num_kv_heads=2)


def recipe(*, mesh, model=MODEL, rows=16, length=128):
    return PretrainRecipe(
        model=dataclasses.replace(model, max_length=length),
        data=DataConfig(paths=("data",), sequence_length=length, seed=0),
        optimizer=paper_optimizer(peak_lr=1e-3, warmup_steps=1),
        train=TrainConfig(
            num_steps=10,
            batch_size=rows,
            accumulate=1,
            compute_dtype="bfloat16",
            remat="full",
            seed=0,
            validate_every=5,
            checkpoint_every=5,
            keep_latest=1,
            keep_period=0,
            on_bad_step="stop",
        ),
        mesh=mesh,
        sequence_parallel=False,
        topology="",
    )


@pytest.fixture(scope="module")
def step():
    return compile_step(recipe(mesh=MeshConfig(fsdp=16)), parse("v5e:4x4"))


@pytest.mark.plan
def test_memory_by_kind(step):
    memory = step.memory
    assert step.fits
    # A sixteenth of the weights a chip, but for the norms, which are everywhere.
    norms = (2 * MODEL.num_layers + 1) * MODEL.dim
    held = 4 * ((num_params(MODEL) - norms) // 16 + norms)
    assert memory.parameters == held
    assert memory.optimizer == pytest.approx(2 * held, rel=1e-4)  # and two counts
    assert memory.peak == memory.parameters + memory.optimizer + memory.activations
    assert memory.peak < memory.limit == parse("v5e:4x4").chip.hbm_bytes
    assert memory.host == 0


@pytest.mark.plan
def test_gradients_stay_split(step):
    """Held whole, even in bfloat16, they would take more than all that a step adds."""
    assert 0 < step.memory.activations < 2 * num_params(MODEL)


@pytest.mark.plan
def test_collectives_by_axis(step):
    profile = predict(step.text, step.topology, Placement.of(step.mesh))
    assert {each.axes for each in profile.collectives} == {("fsdp",)}
    assert {each.network for each in profile.collectives} == {"ici"}
    kinds = {each.kind: each for each in profile.collectives}
    # Weights travel in bfloat16: once to be used, once more for the backward pass.
    weights = 2 * num_params(MODEL)
    assert 1.5 * weights < kinds["all-gather"].num_bytes < 2.5 * weights
    gradients = kinds.keys() & {"reduce-scatter", "all-reduce"}
    reduced = sum(kinds[kind].num_bytes for kind in gradients)
    assert 0.9 * weights < reduced < 2.1 * weights


@pytest.mark.plan
def test_layers_are_loops_with_a_timeline(step):
    profile = predict(step.text, step.topology, Placement.of(step.mesh))
    assert profile.uncounted_loops == 0
    passes = {
        loop.direction
        for loop in profile.loops
        if loop.name == "blocks" and loop.trips == MODEL.num_layers and loop.spans
    }
    assert passes == {"forward", "backward"}
    assert 0 < profile.work["matmul"] < profile.step_seconds
    assert {"mlp", "out", "attend", "unembed"} <= {s.name for s in profile.scopes}


@pytest.mark.plan
def test_two_slices():
    mesh = MeshConfig(dcn_data=2, fsdp=4)
    step = compile_step(recipe(mesh=mesh, model=SMALL), parse("v5e:2x2", slices=2))
    profile = predict(step.text, step.topology, Placement.of(step.mesh))
    far = [each for each in profile.collectives if each.network == "dcn"]
    assert {(each.kind, each.axes) for each in far} == {("all-reduce", ("data",))}
    # Each chip sends its quarter of the gradients, in bfloat16 or float32.
    quarter = num_params(SMALL) / 4
    assert 1.9 * quarter < sum(each.num_bytes for each in far) < 4.5 * quarter


@pytest.mark.plan
def test_a_step_that_does_not_fit():
    large = recipe(mesh=MeshConfig(fsdp=16), model=SMALL, rows=2**19, length=256)
    step = compile_step(large, parse("v5e:4x4"))
    assert not step.fits
    assert step.text == ""
    assert step.memory.peak > step.memory.limit == int(15.75 * GIB)
    assert "GiB per chip" in step.problem


def test_nothing_is_left_in_the_cache():
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    with uncached():
        assert jax.config.jax_persistent_cache_min_compile_time_secs == math.inf
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before


@pytest.mark.plan
def test_a_compiler_option_that_is_none():
    with pytest.raises(PlanError, match="no_such_option"):
        compile_step(
            recipe(mesh=MeshConfig(fsdp=4), model=SMALL),
            parse("v5e:2x2"),
            compiler_options={"no_such_option": "1"},
        )


def test_a_batch_that_does_not_divide():
    with pytest.raises(ShardingError, match="batch_size 12"):
        compile_step(recipe(mesh=MeshConfig(fsdp=16), rows=12), parse("v5e:4x4"))


@pytest.mark.parametrize(
    ("said", "needed", "there"),
    [
        ("HLO temporaries (24.50G) exceeds available HBM (15.75G)", 24.5, 15.75),
        ("Used 1.50T of 95.74G hbm. Exceeded hbm capacity", 1536, 95.74),
        ("Used 512.00M of 0.25G hbm", 0.5, 0.25),
        ("Used 15.75G of 15.75G hbm", 15.75, 15.75),
    ],
)
def test_the_compilers_refusals(said, needed, there):
    error = jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}.")
    found = memory_refused(error)
    assert all(
        math.isclose(a, b * GIB, rel_tol=1e-6)
        for a, b in zip(found, (needed, there), strict=True)
    )
    assert found[0] > found[1]  # refused, though two decimals may be the same


def test_another_failure_of_the_compiler():
    error = jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")
    with pytest.raises(PlanError, match="RET_CHECK failure"):
        memory_refused(error)
