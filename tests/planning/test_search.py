"""Searching layouts by arithmetic; what the compiler adds, `make plan` tests."""

import dataclasses

import pytest

from llama_jax.config.train import remat_pieces
from llama_jax.errors import PlanError
from llama_jax.planning import report
from llama_jax.planning.plan import resolve
from llama_jax.planning.search import layouts, ranked, search
from llama_jax.train.layout import check_layout
from sharding import MeshConfig
from tests import runs
from tests.planning.recipes import POWER, V5P_128, changed, closed_form
from tests.planning.test_report import text


@pytest.fixture(scope="module")
def placed():
    return resolve(V5P_128, None, None)


@pytest.fixture(scope="module")
def all_layouts(placed):
    return list(layouts(*placed))


def found_for(recipe, topology, *, num=5):
    return search(recipe, topology, POWER, num_compiled=num, num_processes=1)


def test_layouts_differ_and_keep_what_is_trained(placed, all_layouts):
    recipe, _ = placed
    assert len(set(all_layouts)) == len(all_layouts) > 100
    for layout in all_layouts:
        assert (layout.model, layout.data, layout.optimizer) == (
            recipe.model,
            recipe.data,
            recipe.optimizer,
        )
        assert layout.train.batch_size == recipe.train.batch_size
    meshes = {layout.mesh for layout in all_layouts}
    assert MeshConfig(fsdp=128) in meshes
    assert MeshConfig(fsdp=16, context=2, tensor=4) in meshes
    mixed = [x for x in all_layouts if len(remat_pieces(x.train.remat)) == 2]
    assert mixed


def test_layouts_are_ones_that_training_accepts(all_layouts):
    for layout in all_layouts[:: len(all_layouts) // 40]:
        check_layout(layout)


def test_the_ranking(placed, without_compiler):
    found = found_for(*placed)
    seconds = [plan.step_seconds for plan in found.plans]
    assert all(a <= 1.01 * b for a, b in zip(seconds, seconds[1:], strict=False))
    assert all(plan.fits for plan in found.plans)
    assert 0 < len(found.plans) <= 5
    assert found.num_tried > found.num_near > len(found.plans)
    assert {plan.source for plan in found.plans} == {"closed-form estimate"}
    meshes = [plan.recipe.mesh for plan in found.plans]
    assert max(meshes.count(mesh) for mesh in meshes) <= 2


def test_of_layouts_alike_that_of_fewest_parts_is_first():
    plan = closed_form(V5P_128)

    def taking(seconds, accumulate):
        recipe = changed(plan.recipe, accumulate=accumulate)
        return dataclasses.replace(plan, recipe=recipe, seconds={"matmul": seconds})

    plans = [taking(10.2, 1), taking(10.0, 8), taking(10.05, 2), taking(10.09, 2)]
    order = [plan.step_seconds for plan in ranked(plans)]
    assert order == [10.05, 10.09, 10.0, 10.2]


def test_the_best_is_explained_in_words(placed, without_compiler):
    said = text(report.Ranking(found_for(*placed)))
    assert "closed-form estimate: libtpu" in said
    for words in ("Best: mesh", "What it keeps", "What it waits for", "What limits it"):
        assert words in said
    assert "backward pass repeats" in said
    assert "slower" in said


def test_where_nothing_fits(placed, without_compiler):
    recipe, _ = placed
    small = dataclasses.replace(recipe, mesh=MeshConfig(fsdp=4), topology="v5e:2x2")
    small = changed(small, batch_size=64)
    with pytest.raises(PlanError, match=r"none of \d+ layouts fits v5e:2x2.*larger"):
        found_for(*resolve(small, None, None))


def test_a_small_model_on_few_chips(without_compiler):
    recipe = runs.recipe("data", mesh=MeshConfig(fsdp=8))
    found = found_for(*resolve(recipe, "v5e:2x4", None), num=100)
    assert MeshConfig(data=2, fsdp=2, tensor=2) in {p.recipe.mesh for p in found.plans}


@pytest.mark.plan
def test_compiled_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = runs.recipe("data", mesh=MeshConfig(fsdp=4))
    recipe = changed(recipe, compute_dtype="bfloat16")
    counted = []
    found = search(
        *resolve(recipe, "v5e:2x2", None),
        POWER,
        num_compiled=2,
        num_processes=2,
        watch=lambda *counts: counted.append(counts),
    )
    assert {plan.source for plan in found.plans} == {"compiled"}
    assert 2 <= len(found.plans) <= 3
    assert MeshConfig(fsdp=4) in {plan.recipe.mesh for plan in found.plans}
    assert counted[-1] == (len(found.plans), len(found.plans))
    assert "2 compiled" in text(report.Ranking(found)) or "3 compiled" in text(
        report.Ranking(found)
    )
