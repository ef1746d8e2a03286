"""Small programs as the compiler prints them, read."""

import pytest

from llama_jax.planning import hlo

KERNEL = """\
HloModule step, is_scheduled=true

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %kernel.1 = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[]) custom-call(%x), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
  "block": "{1}",
}
}}, backend_config={"body":"AAAA
%not = an instruction
  %inside"}
  ROOT %first = bf16[8,128]{1,0} get-tuple-element(%kernel.1), index=0
}
"""


def test_a_kernel_prints_lines_that_look_like_the_end():
    text = KERNEL.replace("%not", "not").replace("  %inside", "    %inside")
    entry = hlo.parse(text).entry
    assert [each.name for each in entry.instructions] == ["x", "kernel.1", "first"]
    kernel = entry.by_name["kernel.1"]
    assert kernel.operands == ("x",)
    assert '"block": "{1}"' in kernel.attributes
    assert entry.root.name == "first"


def test_shapes():
    kernel = hlo.parse(KERNEL.replace("%not", "not")).entry.by_name["kernel.1"]
    assert kernel.shapes == (
        hlo.Shape("bf16", (8, 128), memory_space=1),
        hlo.Shape("f32", ()),
    )
    assert kernel.num_bytes == 8 * 128 * 2 + 4


@pytest.mark.parametrize(
    ("dtype", "num_bytes"),
    [("pred", 8), ("s4", 4), ("f8e4m3fn", 8), ("u32", 32), ("f64", 64), ("token", 0)],
)
def test_bytes_of_eight(dtype, num_bytes):
    assert hlo.Shape(dtype, (2, 4)).num_bytes == num_bytes


def loop(condition, counter, *, start=0):
    """A program whose loop counts as the two say; `%limit` comes with the loop."""
    return hlo.parse(f"""\
HloModule step

%again (state: (s32[], s32[], f32[8])) -> pred[] {{
  %state = (s32[], s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %limit = s32[] get-tuple-element(%state), index=1
  %five = s32[] constant(5)
  ROOT %less = pred[] {condition}
}}

%body (state: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {{
  %state = (s32[], s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %limit = s32[] get-tuple-element(%state), index=1
  %data = f32[8]{{0}} get-tuple-element(%state), index=2
  %one = s32[] constant(1)
  %once = s32[] add(%i, %one)
  %next = s32[] {counter}
  ROOT %tuple = (s32[], s32[], f32[8]) tuple(%next, %limit, %data)
}}

ENTRY %main (data: f32[8]) -> f32[8] {{
  %data = f32[8]{{0}} parameter(0)
  %start = s32[] constant({start})
  %limit = s32[] constant(12)
  %copied = s32[] copy(%limit)
  %begin = (s32[], s32[], f32[8]) tuple(%start, %copied, %data)
  %while = (s32[], s32[], f32[8]) while(%begin), condition=%again, body=%body
  ROOT %out = f32[8]{{0}} get-tuple-element(%while), index=2
}}
""")


@pytest.mark.parametrize(
    ("condition", "counter", "start", "trips"),
    [
        ("compare(%i, %five), direction=LT", "add(%i, %one)", 0, 5),
        ("compare(%i, %five), direction=LE", "add(%i, %one)", 0, 6),
        ("compare(%i, %limit), direction=LT", "add(%i, %one)", 2, 10),
        ("compare(%i, %limit), direction=LT", "add(%once, %one)", 0, 6),
        ("compare(%five, %i), direction=LT", "subtract(%i, %one)", 8, 3),
        ("compare(%i, %five), direction=LT", "add(%i, %one)", 7, 0),
        # Neither what is computed nor what never ends can be counted.
        ("compare(%i, %five), direction=LT", "popcnt(%i)", 0, None),
        ("compare(%i, %five), direction=LT", "copy(%i)", 0, None),
    ],
)
def test_trips(condition, counter, start, trips):
    program = loop(condition, counter, start=start)
    found = program.trips(program.entry, program.entry.by_name["while"])
    assert found == trips


def test_trips_that_the_compiler_knows():
    program = loop("compare(%i, %five), direction=LT", "popcnt(%i)")
    text = 'while(%begin), body=%body, backend_config={"known_trip_count":{"n":"9"}}'
    known = hlo.parse(
        f"ENTRY %main () -> () {{\n  ROOT %while = () {text}\n}}\n"
    ).entry.root
    assert program.trips(program.entry, known) == 9


def collective(groups):
    text = f"all-gather(%x), channel_id=1, {groups}, dimensions={{0}}"
    return hlo.parse(
        f"ENTRY %main () -> () {{\n  ROOT %g = f32[8] {text}\n}}\n"
    ).entry.root


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("replica_groups={}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", (0, 2, 4, 6)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", (0, 1)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", (0, 4)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
        ("replica_groups=@strange", None),
    ],
)
def test_groups(groups, first):
    assert hlo.first_group(collective(groups), 8) == first


def test_pairs():
    permute = collective("source_target_pairs={{0,3},{1,0},{2,1},{3,2}}")
    assert hlo.permuted_pairs(permute) == [(0, 3), (1, 0), (2, 1), (3, 2)]
    assert hlo.permuted_pairs(collective("source_target_pairs={}")) == []
