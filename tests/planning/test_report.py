"""A plan, what follows from it, and how it reads."""

import dataclasses
import json
import re

import pytest
from rich.console import Console

import llama_jax
from llama_jax.errors import PlanError, RecipeError
from llama_jax.model.count import train_flops_per_token
from llama_jax.planning import report
from llama_jax.planning.plan import resolve
from sharding import MeshConfig, ShardingError
from tests import runs
from tests.planning.recipes import V5P_64, V5P_128, closed_form


def text(renderable) -> str:
    console = Console(width=150, markup=False)
    with console.capture() as capture:
        console.print(renderable, highlight=False)
    return capture.get()


def test_what_follows_from_a_step(without_compiler):
    plan = llama_jax.plan(V5P_64)
    chips, seconds = plan.topology.num_chips, plan.step_seconds
    tokens = plan.tokens_per_step * plan.recipe.train.num_steps
    assert plan.source == "closed-form estimate"
    assert plan.fits
    assert tokens == pytest.approx(2e12, rel=0.001)
    assert plan.days == pytest.approx(tokens / plan.tokens_per_second / 86_400)
    assert plan.chip_hours == pytest.approx(plan.days * 24 * chips)
    flops = plan.tokens_per_step * train_flops_per_token(plan.recipe.model, 4096)
    assert plan.mfu == pytest.approx(flops / seconds / chips / 459e12)
    assert 0.4 < plan.mfu < 0.7
    watts = plan.topology.chip.tdp_watts
    assert plan.energy_kwh == pytest.approx(plan.chip_hours * watts / 1000 * 1.1)
    assert plan.co2_tonnes == pytest.approx(plan.energy_kwh * 0.385 / 1000)


def test_topology_and_slices_can_be_others():
    recipe, topology = resolve(V5P_128, "v5p-256", 2)
    assert (topology.name, topology.num_chips) == ("v5p:4x4x8", 256)
    assert recipe.mesh.num_slices == 2
    own, _ = resolve(V5P_128, None, None)
    assert own.mesh.resolve(128) == own.mesh


def test_what_does_not_divide_is_refused():
    with pytest.raises(ShardingError, match="takes 128 devices, but there are 64"):
        resolve(V5P_128, "v5p:4x4x4", None)
    with pytest.raises(PlanError, match="name a topology"):
        resolve(runs.recipe("data"), None, None)
    with pytest.raises(RecipeError, match="does not exist"):
        resolve("configs/none.py:one", None, None)


def test_the_report_says_what_is_predicted():
    plan = closed_form(V5P_64)
    said = text(report.Report(plan))
    assert "v5p-128 counts TensorCores, 2 a chip: 64 chips" in said
    assert "closed-form estimate: libtpu" in said
    assert "pip install 'llama-jax[tpu]'" in said
    assert "It fits: " in said
    for kind in plan.memory:
        assert kind in said
    timed = [line for line in said.splitlines() if "MFU" in line or "days" in line]
    assert timed and all("redicted" in line for line in timed)
    assert "assumed" in said  # the power of a chip


def test_json_holds_every_figure():
    plan = closed_form(V5P_64)
    figures = json.loads(json.dumps(report.to_json(plan)))
    assert figures["hbm_bytes"] == sum(figures["memory"].values())
    predicted = figures["predicted"]
    assert predicted["step_seconds"] == pytest.approx(
        sum(predicted["seconds"].values())
    )
    assert predicted["collectives"][0]["axes"] == ["fsdp"]
    assert figures["cloud_name"] == "v5p-128"


def test_what_does_not_fit_gets_a_remedy_that_does():
    """The remedy named first, taken, fits by the same arithmetic."""
    plan = closed_form(V5P_64, remat="none", batch_size=1024, accumulate=1)
    assert not plan.fits
    over = plan.hbm_bytes - plan.hbm_limit
    assert f"{over / 2**30:.2f} too many" in report.verdict(plan)
    advice = report.remedies(plan)
    named = re.findall(r"--train.remat (\w+)", advice)
    assert named
    assert closed_form(V5P_64, remat=named[0], batch_size=1024, accumulate=1).fits


def test_a_state_divided_further_is_a_remedy():
    plan = closed_form(V5P_128)
    recipe = dataclasses.replace(plan.recipe, mesh=MeshConfig(data=16, fsdp=8))
    copied = report.estimated(recipe, plan.topology, plan.power)
    assert not copied.fits
    assert "--mesh.data 1 --mesh.fsdp 128" in report.remedies(copied)


@pytest.mark.plan
def test_a_compiled_plan(tmp_path, monkeypatch):
    """Kinds of memory and of time add up; the program is there to be looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = runs.recipe("data", mesh=MeshConfig(fsdp=4))
    plan = llama_jax.plan(recipe, "v5e-4")
    assert (plan.source, plan.fits) == ("compiled", True)
    assert plan.step_seconds == pytest.approx(plan.profile.step_seconds)
    assert plan.program.startswith("HloModule")
    assert plan.hbm_bytes < 1e8
    said = text(report.Report(plan))
    assert "Memory per chip (the compiler's)" in said
    assert llama_jax.plan(recipe, "v5e-4").program == plan.program
