"""Planning inference: the bound by memory, and what is found in a compiled loop."""

import dataclasses

import pytest

from llama_jax.config import LlamaConfig
from llama_jax.errors import PlanError
from llama_jax.planning import hlo, report
from llama_jax.planning.decode import copied_bytes, plan_decode
from llama_jax.planning.topology import parse
from tests.planning.test_report import text

LARGE = LlamaConfig.llama2_70b()


@pytest.mark.parametrize(
    ("topology", "milliseconds", "int8"),
    [("v5e:4x4", 12.5, 7.1), ("v5p-8", 13.2, 7.1)],
)
def test_the_bound_of_70b(without_compiler, topology, milliseconds, int8):
    """138 GB of weights and 10.7 GB of cache; 16 chips keep each cache head twice."""
    plan = plan_decode(LARGE, parse(topology), batch=8, length=4096)
    chips = plan.topology.num_chips
    assert plan.mesh.tensor == chips
    assert plan.read_bytes == pytest.approx(137.95e9 / chips, rel=0.03)
    # With more chips than key/value heads, each holds their weights whole.
    whole = 2 * 80 * 8192 * 8 * 128 * 2 * (1 - 1 / 8) if chips > 8 else 0
    assert plan.weight_bytes == plan.read_bytes + whole
    copies = max(chips // 8, 1)
    assert plan.cache_bytes == 80 * 8 * 4096 * 8 * 128 * 2 * 2 * copies // chips
    assert 1e3 * plan.bound_seconds == pytest.approx(milliseconds, rel=0.02)
    assert 1e3 * plan.int8_bound_seconds == pytest.approx(int8, rel=0.15)
    assert plan.token_seconds is None
    assert plan.fits


def test_chips_beyond_what_a_layer_can_use_take_other_rows(without_compiler):
    shared = plan_decode(LARGE, parse("v5p:4x4x8"), batch=8, length=1024)
    assert (shared.mesh.tensor, shared.mesh.data) == (64, 2)
    chosen = plan_decode(LARGE, parse("v5p:4x4x8"), batch=16, length=1024, tensor=8)
    assert (chosen.mesh.tensor, chosen.mesh.data) == (8, 16)
    assert chosen.read_bytes > 7 * shared.read_bytes


def test_impossible_requests(without_compiler):
    with pytest.raises(PlanError, match="context is 4096 tokens"):
        plan_decode(LARGE, parse("v5e:4x4"), batch=8, length=5000)
    with pytest.raises(PlanError, match=r"share by one of \[2, 4, 8, 16\]"):
        plan_decode(LARGE, parse("v5e:4x4"), batch=8, length=64, tensor=3)
    with pytest.raises(PlanError, match="give more rows"):
        plan_decode(LARGE, parse("v5e:16x16"), batch=3, length=64)


def test_the_report_names_what_is_closed_form(without_compiler):
    said = text(
        report.DecodeReport(plan_decode(LARGE, parse("v5p-8"), batch=8, length=4096))
    )
    assert "int8 weights (closed form, no program)" in said
    assert "It fits, by closed form: libtpu" in said
    assert "13." in said
    small = plan_decode(LARGE, parse("v5e:2x2"), batch=8, length=4096)
    assert not small.fits
    assert "Let more chips share each layer" in report.decode_verdict(small)


LOOP = """HloModule decode
%body (p: (s32[], bf16[2,4,64,2,16])) -> (s32[], bf16[2,4,64,2,16]) {
  %p = (s32[], bf16[2,4,64,2,16]{4,3,2,1,0}) parameter(0)
  %keys = bf16[2,4,64,2,16]{4,3,2,1,0} get-tuple-element(%p), index=1
  %layer = bf16[4,64,2,16]{3,2,1,0} dynamic-slice(%keys), dynamic_slice_sizes={}
  %copied = bf16[4,64,2,16]{3,2,1,0:S(1)} copy(%layer)
  %scores = f32[4,64,2]{2,1,0} fusion(%layer), kind=kLoop, calls=%score
  %written = bf16[2,4,64,2,16]{4,3,2,1,0} fusion(%keys), kind=kLoop, calls=%put
  ROOT %t = (s32[], bf16[2,4,64,2,16]{4,3,2,1,0}) tuple(%p, %written)
}

%score (q: bf16[4,64,2,16]) -> f32[4,64,2] {
  %q = bf16[4,64,2,16]{3,2,1,0} parameter(0)
  ROOT %r = f32[4,64,2]{2,1,0} reduce(%q)
}

%put (q: bf16[2,4,64,2,16]) -> bf16[2,4,64,2,16] {
  %q = bf16[2,4,64,2,16]{4,3,2,1,0} parameter(0)
  ROOT %s = bf16[2,4,64,2,16]{4,3,2,1,0} scatter(%q), to_apply=%score
}

%again (p: (s32[], bf16[2,4,64,2,16])) -> pred[] {
  %p = (s32[], bf16[2,4,64,2,16]{4,3,2,1,0}) parameter(0)
  ROOT %yes = pred[] custom-call(%p)
}

ENTRY %main (a: bf16[2,4,64,2,16]) -> bf16[2,4,64,2,16] {
  %a = bf16[2,4,64,2,16]{4,3,2,1,0} parameter(0)
  %once = bf16[2,4,64,2,16]{4,3,2,1,0} copy(%a)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[2,4,64,2,16]{4,3,2,1,0}) tuple(%zero, %once)
  %w = (s32[], bf16[2,4,64,2,16]{4,3,2,1,0}) while(%start), condition=%again, \
body=%body, backend_config={"known_trip_count":{"n":"2"}}
  ROOT %out = bf16[2,4,64,2,16]{4,3,2,1,0} get-tuple-element(%w), index=1
}
"""


def test_copies_of_the_cache_are_found():
    """Slices of both layers; not what is written in place, or before the loop."""
    layer = 4 * 64 * 2 * 16 * 2
    found = copied_bytes(hlo.parse(LOOP), length=64, smallest=layer)
    assert found == 2 * layer
    clean = LOOP.replace("dynamic-slice(%keys)", "bitcast(%keys)")
    assert copied_bytes(hlo.parse(clean), length=64, smallest=layer) == 0


@pytest.mark.plan
def test_the_compiled_loop():
    """It copies no cache, and is no faster than memory allows."""
    model = dataclasses.replace(
        LlamaConfig.tiny(), dim=1024, hidden_dim=2048, num_layers=4, max_length=2048
    )
    plan = plan_decode(model, parse("v5e:2x2"), batch=8, length=2048)
    assert plan.fits
    assert plan.copied_bytes == 0
    assert plan.token_seconds > plan.bound_seconds
    assert plan.weight_bytes + plan.cache_bytes < plan.hbm_bytes < 2e9
    assert "The compiled loop does not copy the cache" in report.decode_verdict(plan)
