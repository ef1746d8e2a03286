"""Programs written by hand, whose times one can work out by hand."""

import itertools

import numpy as np
import pytest

from llama_jax.errors import PlanError
from llama_jax.planning import hlo
from llama_jax.planning.schedule import Kernel, Placement, predict, splash_flops
from llama_jax.planning.topology import parse

V5P = parse("v5p:4x4x4")
US = 1e-6
# 4 x 16 chips: `data` along the torus' first dimension, `fsdp` over the other two.
CUBE = np.array(list(itertools.product(range(4), repeat=3)))
PLACEMENT = Placement({"data": 4, "fsdp": 16}, CUBE, np.zeros(64, int))
# One of v5p's links, both ways; 64 MiB; what a chip of 16 gets of that from others.
LINK = 2 * 90e9
BYTES = 2**26
SENT = BYTES * 15 / 16

WIDE = "bf16[512,65536]{1,0:T(8,128)(2,1)}"
PART = "bf16[32,65536]{1,0:T(8,128)(2,1)}"
FSDP = "replica_groups=[4,16]<=[64], use_global_device_ids=true"
COMPUTATIONS = f"""\
%multiply (a: bf16[8,8], b: bf16[8,8]) -> bf16[8,8] {{
  %a = bf16[8,8]{{1,0}} parameter(0)
  %b = bf16[8,8]{{1,0}} parameter(1)
  ROOT %dot = bf16[8,8]{{1,0}} convolution(%a, %b), dim_labels=bf_io->bf
}}

%begin_gather (p: bf16[32,65536]) -> bf16[512,65536] {{
  %p = {PART} parameter(0)
  %g = {WIDE} all-gather(%p), channel_id=7, {FSDP}, dimensions={{0}}
  ROOT %c = ({PART}, {WIDE}, u32[]) custom-call(%g), \
custom_call_target="AsyncCollectiveStart"
}}

%go_on (p: bf16[32,65536], a: bf16[8,8]) -> bf16[8,8] {{
  %p = {PART} parameter(0)
  %a = bf16[8,8]{{1,0}} parameter(1)
  %g = {WIDE} all-gather(%p), channel_id=7, {FSDP}, dimensions={{0}}
  ROOT %dot = bf16[8,8]{{1,0}} convolution(%a, %a), dim_labels=bf_io->bf
}}

%end_gather (p: bf16[32,65536]) -> bf16[512,65536] {{
  %p = {PART} parameter(0)
  %g = {WIDE} all-gather(%p), channel_id=7, {FSDP}, dimensions={{0}}
  ROOT %c = {WIDE} custom-call(%p, %g), custom_call_target="AsyncCollectiveDone"
}}

%offloaded (p: bf16[512,65536]) -> bf16[512,65536] {{
  %p = {WIDE} parameter(0)
  ROOT %r = {WIDE} all-reduce(%p), channel_id=9, {FSDP}, to_apply=%multiply
}}, execution_thread="sparsecore"

%all-reduce-scatter.3 (p: bf16[512,65536]) -> bf16[32,65536] {{
  %p = {WIDE} parameter(0)
  %r = {WIDE} all-reduce(%p), channel_id=8, {FSDP}, to_apply=%multiply
  %n = u32[] partition-id()
  ROOT %s = {PART} dynamic-slice(%r, %n, %n), dynamic_slice_sizes={{32,65536}}
}}
"""


def compute(name, microseconds, *, calls="", op_name="jit(step)/jvp(Llama)/mlp/mul"):
    """A line that computes for a while: v5p's clock makes 1750 cycles a microsecond."""
    kind = f"fusion(%x), kind=kOutput, calls=%{calls}" if calls else "add(%x, %x)"
    return (
        f'  %{name} = bf16[8,8]{{1,0}} {kind}, metadata={{op_name="{op_name}"}}, '
        f'backend_config={{"estimated_cycles":"{int(1750 * microseconds)}"}}'
    )


def run(
    *lines, computations=COMPUTATIONS, topology=V5P, placement=PLACEMENT, **options
):
    entry = "\n".join(
        [
            "ENTRY %main (x: bf16[8,8], wide: bf16[512,65536], part: bf16[32,65536]) "
            "-> bf16[8,8] {",
            "  %x = bf16[8,8]{1,0} parameter(0)",
            f"  %wide = {WIDE} parameter(1)",
            f"  %part = {PART} parameter(2)",
            *lines,
            "  ROOT %out = bf16[8,8]{1,0} bitcast(%x)",
            "}",
        ]
    )
    profile = predict(
        f"HloModule step, is_scheduled=true\n\n{computations}\n{entry}\n",
        topology,
        placement,
        **options,
    )
    spent = sum(profile.work.values()) + sum(profile.exposed.values())
    assert profile.step_seconds == pytest.approx(spent)
    assert sum(scope.seconds for scope in profile.scopes) == pytest.approx(
        sum(profile.work.values())
    )
    return profile


def test_kinds_of_work():
    profile = run(
        compute("product", 3, calls="multiply"),
        compute("sum", 2),
        compute("scores", 4, calls="multiply", op_name="jit(step)/jvp(Llama)/attend/d"),
    )
    assert profile.work == pytest.approx(
        {"matmul": 3 * US, "other": 2 * US, "attention": 4 * US}
    )


def test_scopes_and_passes():
    layer = "Llama.hidden/blocks/while/body"
    profile = run(
        compute("a", 1, op_name=f"jit(step)/jvp(Llama)/{layer}/attention/out/dot"),
        compute(
            "b",
            2,
            op_name=f"jit(step)/transpose(jvp(Llama))/{layer}/checkpoint/"
            "rematted_computation/mlp/mlp/dot",
        ),
        compute("c", 3, op_name=f"jit(step)/transpose(jvp(Llama))/{layer}/mlp/mlp/dot"),
        compute("d", 4, op_name="jit(step)/transpose(jvp(loss))/reduce_sum"),
        compute("e", 5, op_name="jit(step)/optimizer/mul"),
        compute("f", 6, op_name=""),
    )
    assert [
        (scope.name, scope.direction, round(scope.seconds / US))
        for scope in profile.scopes
    ] == [
        ("other", "update", 6),
        ("optimizer", "update", 5),
        ("loss", "backward", 4),
        ("mlp", "backward", 3),
        ("mlp", "recomputed", 2),
        ("out", "forward", 1),
    ]


def loop(name, trips, body):
    """A loop in a computation of its own, counting to `trips`; and the line for it."""
    return (
        f"""\
%{name}_again (state: (s32[], bf16[8,8])) -> pred[] {{
  %state = (s32[], bf16[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %n = s32[] constant({trips})
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

%{name}_body (state: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {{
  %state = (s32[], bf16[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[8,8]{{1,0}} get-tuple-element(%state), index=1
  %part = {PART} constant({{...}})
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one), backend_config={{"estimated_cycles":"0"}}
  %zero = s32[] constant(0)
{body}
  ROOT %tuple = (s32[], bf16[8,8]) tuple(%next, %x)
}}

""",
        (
            f"  %{name}_init = (s32[], bf16[8,8]) tuple(%zero, %x)\n"
            f"  %{name} = (s32[], bf16[8,8]) while(%{name}_init), "
            f"condition=%{name}_again, body=%{name}_body, "
            'metadata={op_name="jit(step)/jvp(Llama)/blocks/while"}'
        ),
    )


GATHER_BESIDE = (
    f"  %g = ({PART}, {WIDE}) all-gather-start(%part), channel_id=1, {FSDP}\n"
    + compute("beside", 100, calls="multiply")
    + f"\n  %got = {WIDE} all-gather-done(%g)"
)


def test_nested_loops_multiply():
    inner, inner_line = loop("inner", 4, compute("dot", 2, calls="multiply"))
    outer, outer_line = loop("outer", 3, inner_line + "\n" + compute("sum", 1))
    profile = run(
        "  %zero = s32[] constant(0)",
        outer_line,
        computations=COMPUTATIONS + inner + outer,
    )
    assert profile.work["matmul"] == pytest.approx(3 * 4 * 2 * US)
    assert profile.work["other"] == pytest.approx(3 * 1 * US)
    assert [(each.trips, each.direction) for each in profile.loops] == [
        (3, "forward"),
        (4, "forward"),
    ]
    assert profile.uncounted_loops == 0


def test_collectives_of_loops_multiply():
    body, line = loop("layers", 5, GATHER_BESIDE)
    profile = run("  %zero = s32[] constant(0)", line, computations=COMPUTATIONS + body)
    (gather,) = profile.collectives
    assert (gather.count, gather.num_bytes) == (5, 5 * BYTES)
    assert gather.seconds == pytest.approx(5 * SENT / (2 * LINK))
    assert gather.exposed_seconds == pytest.approx(5 * (SENT / (2 * LINK) - 100 * US))


def test_a_loop_that_cannot_be_counted_runs_once():
    body, line = loop("search", 3, compute("sum", 1))
    body = body.replace("s32[] add(%i, %one)", "s32[] popcnt(%i)")
    profile = run("  %zero = s32[] constant(0)", line, computations=COMPUTATIONS + body)
    assert profile.uncounted_loops == 1
    assert profile.step_seconds == pytest.approx(1 * US)


def test_work_hides_a_collective():
    profile = run(GATHER_BESIDE)
    (gather,) = profile.collectives
    assert (gather.kind, gather.axes, gather.network) == (
        "all-gather",
        ("fsdp",),
        "ici",
    )
    # Sixteen chips over two dimensions of the torus: a ring along each, both ways.
    assert gather.seconds == pytest.approx(SENT / (2 * LINK))
    assert gather.exposed_seconds == pytest.approx(SENT / (2 * LINK) - 100 * US)
    assert profile.communication_seconds == gather.exposed_seconds


def test_work_that_takes_longer_hides_all_of_it():
    profile = run(GATHER_BESIDE.replace('"175000"', '"1750000"'))
    assert profile.exposed["ici"] == 0
    assert profile.step_seconds == pytest.approx(1000 * US)


def test_without_a_start_nothing_is_hidden():
    profile = run(
        f"  %r = {WIDE} all-reduce(%wide), channel_id=1, {FSDP}, to_apply=%multiply",
        compute("after", 100),
    )
    assert profile.exposed["ici"] == pytest.approx(2 * SENT / (2 * LINK))


@pytest.mark.parametrize(
    ("groups", "axes", "dims", "size"),
    [
        ("replica_groups=[4,16]<=[64]", ("fsdp",), 2, 16),
        ("replica_groups=[16,4]<=[4,16]T(1,0)", ("data",), 1, 4),
        ("replica_groups={}", ("data", "fsdp"), 3, 64),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("fsdp",), 1, 4),
        ("replica_groups=mesh['data'=4,'fsdp'=16] {'data'}", ("data",), 1, 4),
    ],
)
def test_axes_of_groups(groups, axes, dims, size):
    profile = run(f"  %g = {WIDE} all-gather(%part), channel_id=1, {groups}")
    (gather,) = profile.collectives
    assert gather.axes == axes
    assert gather.seconds == pytest.approx(BYTES * (size - 1) / size / (dims * LINK))


def test_reduce_scatters():
    """One by name, whose result is a part; one made of an all-reduce and a slice."""
    alone = run(f"  %r = {PART} reduce-scatter(%wide), channel_id=1, {FSDP}")
    fused = run(f"  %r = {PART} fusion(%wide), calls=%all-reduce-scatter.3")
    for profile in (alone, fused):
        (scatter,) = profile.collectives
        assert scatter.kind == "reduce-scatter"
        assert scatter.num_bytes == BYTES
        assert scatter.exposed_seconds == pytest.approx(SENT / (2 * LINK))


def test_collectives_fused_with_work():
    """They begin in one fusion, go on beside others and end in a third."""
    profile = run(
        f"  %begin = ({PART}, {WIDE}, u32[]) fusion(%part), calls=%begin_gather",
        compute("beside", 100, calls="go_on"),
        f"  %end = {WIDE} fusion(%part), calls=%end_gather",
    )
    (gather,) = profile.collectives
    assert gather.count == 1
    assert gather.exposed_seconds == pytest.approx(SENT / (2 * LINK) - 100 * US)
    assert profile.work["matmul"] == pytest.approx(100 * US)


SPARSE_CORE = 'async_execution_thread="sparsecore", to_apply=%offloaded'


@pytest.mark.parametrize(
    "lines",
    [
        (f"  %s = ({WIDE}, {WIDE}) call-start(%wide), {SPARSE_CORE}",),
        (  # made ready early, but given its operand only later
            f"  %r = ((), (), s32[]) call-start(), {SPARSE_CORE}",
            compute("before", 50),
            f"  %s = ({WIDE}, {WIDE}) call-update(%r, %wide)",
        ),
    ],
)
def test_collectives_of_another_core_begin_with_their_operand(lines):
    profile = run(*lines, compute("beside", 100), f"  %d = {WIDE} call-done(%s)")
    (reduce,) = profile.collectives
    assert (reduce.kind, reduce.count) == ("all-reduce", 1)
    assert reduce.exposed_seconds == pytest.approx(2 * SENT / (2 * LINK) - 100 * US)


def test_neighbours_have_a_link_each_way():
    pairs = [(i, (i + 1) % 4) for i in range(4)]
    there = "".join(f"{{{a},{b}}}," for a, b in pairs).rstrip(",")
    back = "".join(f"{{{b},{a}}}," for a, b in pairs).rstrip(",")
    lines = [
        f"  %s{i} = ({WIDE}, {WIDE}, u32[], u32[]) collective-permute-start(%wide), "
        f"source_target_pairs={{{way}}}"
        for i, way in enumerate((there, back, there))
    ]
    done = [f"  %d{i} = {WIDE} collective-permute-done(%s{i})" for i in range(3)]
    profile = run(*lines, *done)
    (permute,) = profile.collectives
    assert (permute.count, permute.axes) == (3, ("fsdp",))
    assert permute.seconds == pytest.approx(3 * BYTES / 90e9)
    assert permute.exposed_seconds == pytest.approx(2 * BYTES / 90e9)


def test_host_and_copies_are_resources_of_their_own():
    host = WIDE.replace("T(8,128)(2,1)", "T(8,128)(2,1)S(5)")
    chip = PART.replace("T(8,128)(2,1)", "T(8,128)(2,1)S(1)")
    profile = run(
        f"  %out = ({host}, {WIDE}, u32[]) copy-start(%wide)",
        f"  %in = (({WIDE}), {chip}, s32[]) slice-start(%wide), slice={{[0:32]}}",
        compute("beside", 1),
        f"  %in_done = {chip} slice-done(%in)",
        f"  %out_done = {host} copy-done(%out)",
    )
    fetched = BYTES / 16 / 2.8e12
    assert profile.host_bytes == BYTES
    assert profile.exposed["dma"] == pytest.approx(max(0, fetched - 1 * US))
    assert profile.exposed["host"] == pytest.approx(BYTES / 16e9 - max(fetched, 1 * US))
    assert profile.collectives == ()


def test_slices_talk_over_the_data_centre_network():
    """Each slice runs the program for its own devices, numbered from 0."""
    square = np.array(list(itertools.product(range(2), repeat=2)))
    placement = Placement(
        {"data": 2, "fsdp": 4}, np.concatenate([square, square]), np.arange(8) // 4
    )
    transfer = (
        'frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    profile = run(
        f"  %r = {WIDE} all-reduce(%wide), replica_groups={{{{0,1,2,3}}}}",
        f"  %s = ({PART}, u32[], token[]) send(%part), channel_id=2, {transfer}",
        f"  %v = ({PART}, u32[], token[]) recv(%part), channel_id=3, {transfer}",
        compute("beside", 100),
        "  %sd = token[] send-done(%s)",
        f"  %vd = ({PART}, token[]) recv-done(%v)",
        topology=parse("v5e:2x2", slices=2),
        placement=placement,
    )
    far, near = profile.collectives
    assert (far.kind, far.axes, far.network) == ("all-reduce", ("data",), "dcn")
    assert far.seconds == pytest.approx(BYTES / 16 / 3.125e9)
    assert (near.axes, near.network) == (("fsdp",), "ici")
    beside = 100 * 1.75 / 1.5 * US  # v5e's clock
    assert profile.exposed["dcn"] == pytest.approx(far.seconds - beside)


QUERIES = "bf16[2,4,1024,128]{3,2,1,0}"
KERNEL = f"""\
  %mask = s8[1,2,2]{{2,1,0}} constant({{...}})
  %q = {QUERIES} constant({{...}})
  %splash_mha_fwd.1 = {QUERIES} custom-call(%mask, %q, %q, %q), \
custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{}}"
}}}}, metadata={{op_name="jit(step)/jvp(Llama)/attend/pallas_call"}}"""
# Two products of 2 FLOPs, over half of the square and half of its diagonal's blocks.
FORWARD = 2 * 2 * (2 * 4 * 1024 * 1024 * 128) * (1 + 512 / 1024) / 2


@pytest.mark.parametrize(("chip", "share"), [("v5p:4x4x4", 0.65), ("v6e:8x8", 0.37)])
def test_kernels_run_at_a_stated_share_of_the_peak(chip, share):
    topology = parse(chip)
    profile = run(KERNEL, topology=topology)
    seconds = FORWARD / (share * topology.chip.peak_flops)
    assert profile.work["attention"] == pytest.approx(seconds)


def test_backward_kernels():
    (queries,) = shapes_of(QUERIES)
    keys = queries

    def flops(name, *siblings):
        return splash_flops(Kernel(name, (queries, keys), siblings)) / FORWARD

    assert flops("splash_mha_dkv.1", "splash_mha_fwd.1") == 2.5
    assert flops("splash_mha_dkv.1", "splash_mha_dq.1") == 2
    assert flops("splash_mha_dq.1", "splash_mha_dkv.1") == 1.5


def test_a_kernel_of_unknown_cost():
    strange = KERNEL.replace("splash_mha_fwd", "strange")
    with pytest.raises(PlanError, match=r"strange\.1.*kernel_flops"):
        run(strange)
    profile = run(strange, kernel_flops=lambda kernel: 0.65 * 459e12)
    assert profile.work["attention"] == pytest.approx(1.0)


def shapes_of(text):
    line = f"  ROOT %x = {text} parameter(0)"
    return hlo.parse(f"ENTRY %main () -> () {{\n{line}\n}}\n").entry.root.shapes


def test_what_nobody_timed_moves_its_bytes():
    """On the chip, nothing comes from HBM; an update in place touches little."""
    profile = run(f"  %c = {WIDE} copy(%wide)")
    assert profile.work["other"] == pytest.approx(2 * BYTES / 2.8e12)
    near = WIDE.replace("(2,1)", "(2,1)S(1)")
    profile = run(f"  %c = {near} copy(%wide)")
    assert profile.work["other"] == pytest.approx(BYTES / 2.8e12)
    profile = run(f"  %u = {WIDE} dynamic-update-slice(%wide, %part)")
    assert profile.work["other"] == pytest.approx(BYTES / 16 / 2.8e12)


def test_the_timeline_of_a_layer():
    body, line = loop("layers", 5, GATHER_BESIDE)
    profile = run("  %zero = s32[] constant(0)", line, computations=COMPUTATIONS + body)
    (layer,) = profile.loops
    assert (layer.name, layer.direction, layer.trips) == ("blocks", "forward", 5)
    assert layer.seconds == pytest.approx(profile.step_seconds / 5)
    assert [(span.resource, span.label) for span in layer.spans] == [
        ("ici", "all-gather"),
        ("compute", "mlp"),
    ]
    gather, product = layer.spans
    assert (gather.start, product.start) == (0, 0)
    assert gather.end == pytest.approx(layer.seconds)
    assert product.end == pytest.approx(100 * US)
