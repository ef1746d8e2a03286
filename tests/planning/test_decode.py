"""Planning inference: the bound by memory, and what is found in a compiled loop."""

import dataclasses
import json

import jax
import pytest

from llama_jax.cli import main
from llama_jax.config import LlamaConfig
from llama_jax.errors import PlanError
from llama_jax.model.count import num_matmul_params
from llama_jax.planning import decode, hlo, report
from llama_jax.planning.compile import Program
from llama_jax.planning.decode import copied_bytes, plan_decode
from llama_jax.planning.topology import parse
from tests.planning.recipes import V5P_128
from tests.planning.test_report import text

LARGE = LlamaConfig.llama2_70b()


@pytest.mark.parametrize(
    ("topology", "kept", "milliseconds"),
    [
        ("v5e:4x4", {}, 12.47),
        ("v5e:4x4", {"weights": "int8"}, 7.07),
        ("v5e:4x4", {"weights": "int8", "cache": "int8"}, 6.27),
        ("v5p-8", {}, 13.23),
        ("v5p-8", {"weights": "int8"}, 7.10),
        ("v5p-8", {"weights": "int8", "cache": "int8"}, 6.63),
    ],
)
def test_the_bound_of_70b(without_compiler, topology, kept, milliseconds):
    """138 GB of weights and 10.7 GB of cache; 16 chips keep each cache head twice."""
    plan = plan_decode(LARGE, parse(topology), batch=8, length=4096, **kept)
    chips = plan.topology.num_chips
    assert plan.mesh.tensor == chips
    copies = max(chips // 8, 1)
    # Of each key/value head that two chips keep, the weights are there twice.
    matrices = num_matmul_params(LARGE) + (copies - 1) * 80 * 2 * 8192 * 8 * 128
    itemsize = 1 if "weights" in kept else 2
    # Norms are whole on every chip, and of int8 there are scales.
    assert plan.read_bytes == pytest.approx(matrices * itemsize / chips, rel=0.005)
    assert plan.weight_bytes == plan.read_bytes + 2 * 32000 * 8192 // chips
    heads = 80 * 8 * 4096 * 8 * 2 * copies // chips
    per_head = 128 + 4 if "cache" in kept else 2 * 128
    assert plan.cache_bytes == heads * per_head
    assert 1e3 * plan.bound_seconds == pytest.approx(milliseconds, abs=0.005)
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
    with pytest.raises(PlanError, match=r"share by one of \[1, 2, 4, 8, 16\]"):
        plan_decode(LARGE, parse("v5e:4x4"), batch=8, length=64, tensor=3)
    with pytest.raises(PlanError, match="give more rows"):
        plan_decode(LARGE, parse("v5e:16x16"), batch=3, length=64)


def test_the_report_names_types_and_what_is_closed_form(without_compiler):
    plan = plan_decode(LARGE, parse("v5p-8"), batch=8, length=4096, weights="int8")
    said = text(report.DecodeReport(plan))
    assert "weights, int8" in said
    assert "cache, bfloat16" in said
    assert "bound by HBM (closed form)  7.10" in said
    assert "It fits, by closed form: libtpu" in said
    figures = report.decode_to_json(plan)
    assert (figures["weights"], figures["cache"]) == ("int8", "bfloat16")
    assert figures["predicted"]["token_seconds"] is None
    assert figures["predicted"]["chunk_seconds"] is None
    assert figures["chunk"] == 512
    read = dataclasses.replace(plan, chunk_seconds=0.4)  # 8 rows of 512 tokens
    assert "of its prompt, 512 read at a time  0.78    10,240" in text(
        report.DecodeReport(read)
    )


def test_programs_are_of_as_many_rows_as_a_run_compiles(without_compiler):
    """160 rows in 8 groups are 20 in each, for which a run compiles 24."""
    plan = plan_decode(
        LlamaConfig.llama2_7b(), parse("v5e:8x8"), batch=160, length=4096, tensor=8
    )
    assert plan.batch == 160
    assert plan.cache_bytes == 24 * 2 * 32 * 32 * 128 * 2 * 4096 // 8
    padded = plan_decode(LARGE, parse("v5e:4x4"), batch=3, length=64, tensor=4)
    assert padded.mesh.data == 4  # and one of the groups writes nothing that counts


def test_arithmetic_of_another_type(without_compiler):
    half = plan_decode(LARGE, parse("v5p-8"), batch=8, length=4096)
    whole = plan_decode(LARGE, parse("v5p-8"), batch=8, length=4096, dtype="float32")
    assert whole.cache_bytes == 2 * half.cache_bytes
    assert whole.weights == whole.cache == "float32"


@pytest.mark.parametrize("refused", ["prefill", "decode"])
def test_one_of_the_programs_does_not_fit(monkeypatch, refused):
    """The compiler's limit decides, and is a little less than what a chip has."""
    monkeypatch.setattr(decode, "has_compiler", lambda: True)
    monkeypatch.setattr(decode.tpu, "devices", lambda _: jax.devices()[:4])
    peaks = iter([3, 5])

    def compiled(topology, lowered) -> Program:
        is_refused = f"jit_{refused}" in lowered.as_text()[:200]
        text = "" if is_refused else "HloModule"
        return Program(text, next(peaks), topology.chip.hbm_bytes, host=0)

    monkeypatch.setattr(decode, "compile_for", compiled)
    plan = plan_decode(LlamaConfig.tiny(), parse("v5e:2x2"), batch=8, length=64)
    assert (plan.chunk_bytes, plan.loop_bytes, plan.hbm_bytes) == (3, 5, 5)
    assert plan.token_seconds is None and plan.chunk_seconds is None


def test_a_short_cache_is_read_at_once(without_compiler):
    assert plan_decode(LARGE, parse("v5p-8"), batch=8, length=100).chunk == 100


def test_the_command(without_compiler, capsys):
    """Types as `llama_jax.load` takes them; of training, they change nothing."""
    argv = ["plan", V5P_128, "--topology", "v5e:4x4", "--weights", "int8"]
    assert main([*argv, "--cache", "int8", "--decode", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["weights"], figures["cache"]) == ("int8", "int8")
    assert figures["predicted"]["bound_seconds"] == pytest.approx(6.27e-3, rel=0.01)
    assert main([*argv, "--length", "64"]) == 1
    assert "--length and --weights: this is for inference" in capsys.readouterr().err


def test_what_does_not_fit_gets_remedies_that_are_left(without_compiler):
    large = plan_decode(LARGE, parse("v5e:2x2"), batch=8, length=4096)
    assert not large.fits
    advice = report.decode_verdict(large)
    assert "--weights int8 and --cache int8, fewer rows" in advice
    smaller = plan_decode(
        LARGE, parse("v5e:2x2"), batch=8, length=4096, weights="int8", cache="int8"
    )
    assert not smaller.fits
    assert "or use fewer rows" in report.decode_verdict(smaller)


# One layer's keys on a chip: 4 rows, 1 head, 64 slots, 16 numbers wide.
LOOP = """HloModule decode
%body (p: (s32[], bf16[4,1,64,16])) -> (s32[], bf16[4,1,64,16]) {
  %p = (s32[], bf16[4,1,64,16]{3,2,1,0}) parameter(0)
  %step = s32[] get-tuple-element(%p), index=0
  %keys = bf16[4,1,64,16]{3,2,1,0} get-tuple-element(%p), index=1
  %seen = bf16[4,1,64,16]{3,2,1,0} OPERATION(%keys)
  %written = bf16[4,1,64,16]{3,2,1,0} fusion(%seen), kind=kLoop, calls=%put
  %read = bf16[4,1,16]{2,1,0} conditional(%step, %written, %written), \
branch_computations={%some, %all}
  ROOT %t = (s32[], bf16[4,1,64,16]{3,2,1,0}) tuple(%step, %written)
}

%some (q: bf16[4,1,64,16]) -> bf16[4,1,16] {
  %q = bf16[4,1,64,16]{3,2,1,0} parameter(0)
  %first = bf16[4,1,32,16]{3,2,1,0} PREFIX(%q), slice={[0:4], [0:1], [0:32], [0:16]}
  ROOT %mixed = bf16[4,1,16]{2,1,0} fusion(%first), kind=kOutput, calls=%score
}

%all (q: bf16[4,1,64,16]) -> bf16[4,1,16] {
  %q = bf16[4,1,64,16]{3,2,1,0} parameter(0)
  %begun = (bf16[4,1,64,16]{3,2,1,0:S(1)}, bf16[4,1,64,16]{3,2,1,0}, u32[]{:S(2)}) \
copy-start(%q)
  %ahead = bf16[4,1,64,16]{3,2,1,0:S(1)} copy-done(%begun)
  ROOT %mixed = bf16[4,1,16]{2,1,0} fusion(%ahead), kind=kOutput, calls=%score
}

%score (q: bf16[4,1,64,16]) -> bf16[4,1,16] {
  %q = bf16[4,1,64,16]{3,2,1,0} parameter(0)
  ROOT %r = bf16[4,1,16]{2,1,0} reduce(%q)
}

%put (q: bf16[4,1,64,16]) -> bf16[4,1,64,16] {
  %q = bf16[4,1,64,16]{3,2,1,0} parameter(0)
  %rows = bf16[4,64,16]{2,1,0} bitcast(%q)
  %s = bf16[4,64,16]{2,1,0} scatter(%rows), to_apply=%score
  ROOT %b = bf16[4,1,64,16]{3,2,1,0} bitcast(%s)
}

%both (q: bf16[4,1,64,16]) -> (f32[4], bf16[4,1,64,16]) {
  %q = bf16[4,1,64,16]{3,2,1,0} parameter(0)
  %sum = f32[4]{0} reduce(%q)
  %turned = bf16[4,1,64,16]{3,1,2,0} transpose(%q)
  ROOT %t = (f32[4]{0}, bf16[4,1,64,16]{3,1,2,0}) tuple(%sum, %turned)
}

%again (p: (s32[], bf16[4,1,64,16])) -> pred[] {
  %p = (s32[], bf16[4,1,64,16]{3,2,1,0}) parameter(0)
  ROOT %yes = pred[] custom-call(%p)
}

ENTRY %main (a: bf16[4,1,64,16]) -> bf16[4,1,64,16] {
  %a = bf16[4,1,64,16]{3,2,1,0} parameter(0)
  %once = bf16[4,1,64,16]{3,2,1,0} copy(%a)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[4,1,64,16]{3,2,1,0}) tuple(%zero, %once)
  %w = (s32[], bf16[4,1,64,16]{3,2,1,0}) while(%start), condition=%again, body=%body
  ROOT %out = bf16[4,1,64,16]{3,2,1,0} get-tuple-element(%w), index=1
}
"""
LAYER = 4 * 64 * 16 * 2


@pytest.mark.parametrize(
    ("operation", "prefix", "copied"),
    [
        ("bitcast", "bitcast", 0),
        ("copy", "bitcast", LAYER),
        # A branch that takes half of the slots out, before it reads them.
        ("bitcast", "slice", LAYER // 2),
        ("copy", "slice", LAYER + LAYER // 2),
    ],
)
def test_copies_of_the_cache_are_found(operation, prefix, copied):
    """Not what is written in place, fetched ahead of its use, or before the loop."""
    program = LOOP.replace("OPERATION", operation).replace("PREFIX", prefix)
    assert copied_bytes(hlo.parse(program), slots=[32, 64], width=4 * 16) == copied


def test_copies_that_run_beside_the_loop_are_found():
    """Once: the beginning of such a copy names its source too."""
    beside = LOOP.replace(
        "%seen = bf16[4,1,64,16]{3,2,1,0} OPERATION(%keys)",
        "%going = (bf16[4,1,64,16]{3,2,1,0}, bf16[4,1,64,16]{3,2,1,0}, u32[]{:S(2)}) "
        "copy-start(%keys)\n"
        "  %seen = bf16[4,1,64,16]{3,2,1,0} copy-done(%going)",
    ).replace("PREFIX", "bitcast")
    assert copied_bytes(hlo.parse(beside), slots=[32, 64], width=4 * 16) == LAYER


def test_copies_beside_other_results_of_a_fusion_are_found():
    both = LOOP.replace(
        "%seen = bf16[4,1,64,16]{3,2,1,0} OPERATION(%keys)",
        "%pair = (f32[4]{0}, bf16[4,1,64,16]{3,1,2,0}) fusion(%keys), kind=kLoop, "
        "calls=%both\n"
        "  %seen = bf16[4,1,64,16]{3,1,2,0} get-tuple-element(%pair), index=1",
    ).replace("PREFIX", "bitcast")
    assert copied_bytes(hlo.parse(both), slots=[32, 64], width=4 * 16) == LAYER


@pytest.mark.plan
@pytest.mark.parametrize("kept", [{}, {"weights": "int8", "cache": "int8"}])
def test_the_compiled_loop(kept):
    """It copies no cache, and is no faster than memory allows."""
    model = dataclasses.replace(
        LlamaConfig.tiny(), dim=1024, hidden_dim=2048, num_layers=4, max_length=2048
    )
    plan = plan_decode(model, parse("v5e:2x2"), batch=8, length=2048, **kept)
    assert plan.fits
    assert plan.copied_bytes == 0
    assert plan.token_seconds > plan.bound_seconds
    assert plan.weight_bytes + plan.cache_bytes < plan.hbm_bytes < 2e9
    assert "The compiled loop does not copy the cache" in report.decode_verdict(plan)


@pytest.mark.plan
@pytest.mark.parametrize(("weights", "most"), [(None, 1.5), ("int8", 1.7)])
def test_70b_waits_for_memory(weights, most):
    """16 chips, 8 rows, the whole context: near the bound, and without copies."""
    plan = plan_decode(LARGE, parse("v5e:4x4"), batch=8, length=4096, weights=weights)
    assert plan.fits
    assert plan.copied_bytes == 0
    assert plan.bound_seconds <= plan.token_seconds < most * plan.bound_seconds


@pytest.mark.plan
@pytest.mark.parametrize(
    ("model", "slice_", "most"),
    [(LlamaConfig.llama2_7b(), "v5e:2x4", 1.5), (LARGE, "v5p:2x2x1", 2.0)],
    ids=["7b", "70b"],
)
def test_chips_with_several_heads_wait_for_memory(model, slice_, most):
    """Heads of a chip share the slots' layout; single queries are no slow products."""
    plan = plan_decode(model, parse(slice_), batch=8, length=4096)
    assert plan.fits
    assert plan.copied_bytes == 0
    assert plan.bound_seconds <= plan.token_seconds < most * plan.bound_seconds


@pytest.mark.plan
def test_reading_prompts_waits_for_products():
    """7B on 8 chips, 8 rows of 512 tokens; a layer's chips share products alone."""
    model = LlamaConfig.llama2_7b()
    plan = plan_decode(model, parse("v5e:2x4"), batch=8, length=4096)
    # The unembedding, and the last layer's feed-forward, read one token of each row.
    of_chunk = model.num_layers * model.dim * (4 * model.dim + 3 * model.hidden_dim)
    of_chunk -= model.dim * (model.dim + 3 * model.hidden_dim)
    chips = plan.topology.num_chips * plan.topology.chip.peak_flops
    least = 2 * of_chunk * 8 * 512 / chips
    assert least < plan.chunk_seconds < 4 * least
    assert (
        plan.weight_bytes + plan.cache_bytes < plan.chunk_bytes < 1.1 * plan.loop_bytes
    )
