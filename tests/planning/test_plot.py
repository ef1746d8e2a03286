"""The picture of a plan."""

import dataclasses

import pytest

from llama_jax.errors import PlanError
from llama_jax.planning.plot import draw
from llama_jax.planning.schedule import Loop, Profile, Scope, Span
from tests.planning.recipes import V5P_64, closed_form


def layer(direction):
    spans = (
        Span(resource="compute", start=0.0, end=1e-3, label="mlp"),
        Span(resource="ici", start=5e-4, end=1.5e-3, label="all-gather"),
    )
    return Loop(name="blocks", direction=direction, trips=32, seconds=2e-3, spans=spans)


PROFILE = Profile(
    step_seconds=1.0,
    work={"matmul": 0.8, "attention": 0.1, "other": 0.05},
    exposed={"ici": 0.05, "dcn": 0.0, "host": 0.0, "dma": 0.0},
    collectives=(),
    scopes=(
        Scope(name="mlp", direction="forward", seconds=0.3),
        Scope(name="attend", direction="forward", seconds=0.1),
    ),
    loops=(layer("forward"), layer("backward")),
    host_bytes=0.0,
    uncounted_loops=0,
)


def test_a_picture_is_written(tmp_path):
    plan = dataclasses.replace(closed_form(V5P_64), profile=PROFILE)
    path = tmp_path / "with späces.png"
    draw(plan, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_a_program_there_is_nothing_to_draw(tmp_path):
    with pytest.raises(PlanError, match="no program whose timeline"):
        draw(closed_form(V5P_64), tmp_path / "no.png")
