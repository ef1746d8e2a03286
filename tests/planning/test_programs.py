"""Compiled steps are kept, and known by all that makes them."""

import dataclasses

import pytest

from llama_jax.planning import programs
from llama_jax.planning.compile import CompiledStep, Memory
from llama_jax.planning.plan import resolve
from tests.planning.recipes import V5P_64, changed

MEMORY = Memory(parameters=1, optimizer=2, activations=3, peak=6, limit=10, host=0)


@pytest.fixture
def compilations(monkeypatch, tmp_path):
    """The recipes that were compiled; nothing really is."""
    done = []

    def compile_step(recipe, topology):
        done.append(recipe)
        return CompiledStep(
            recipe=recipe,
            topology=topology,
            mesh=None,
            memory=MEMORY,
            text="HloModule ünit",
            problem="",
            seconds=60.0,
        )

    monkeypatch.setattr(programs, "compile_step", compile_step)
    monkeypatch.setattr(programs, "make_mesh", lambda mesh, devices: None)
    monkeypatch.setattr(programs.tpu, "devices", lambda topology: [])
    monkeypatch.setattr(programs.importlib.metadata, "version", lambda name: "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return done


def test_the_same_step_is_compiled_once(compilations):
    recipe, topology = resolve(V5P_64, None, None)
    first = programs.compiled(recipe, topology)
    again = programs.compiled(recipe, topology)
    assert compilations == [recipe]
    assert again == first


def test_another_recipe_or_slice_is_compiled_anew(compilations, monkeypatch):
    recipe, topology = resolve(V5P_64, None, None)
    for each in (recipe, changed(recipe, remat="full")):
        programs.compiled(each, topology)
    programs.compiled(recipe, dataclasses.replace(topology, slices=2))
    monkeypatch.setattr(programs.importlib.metadata, "version", lambda name: "2")
    programs.compiled(recipe, topology)
    assert len(compilations) == 4


def test_where_nothing_can_be_kept_it_still_compiles(
    compilations, monkeypatch, tmp_path, caplog
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    step = programs.compiled(*resolve(V5P_64, None, None))
    assert step.memory == MEMORY
    assert "is not kept" in caplog.text
