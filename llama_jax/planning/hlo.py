"""The text of a compiled program, read: computations of instructions, in order.

Only what a schedule needs is understood: shapes, operands, the calls between
computations, how often loops run, and which devices a collective joins. The rest of
an instruction stays text.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
# How a line can begin. A kernel's payload goes on over lines that begin otherwise, some
# of them with braces.
_BEGINNING = re.compile(r"  (ROOT )?%|%|ENTRY |\}($|, execution_thread=)")
_INSTRUCTION = re.compile(
    r"  (?P<root>ROOT )?%(?P<name>\S+) = (?P<type>.*?) (?P<opcode>[a-z][a-z0-9-]*)"
    r"\((?P<operands>[^()]*)\)(?P<attributes>.*)",
    re.DOTALL,
)
_COMPUTATION = re.compile(r"(ENTRY )?%(\S+) \(.*\) -> .*\{")
_CALLS = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation)=%([^\s,}]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# Loops that run longer than this are taken to end for another reason than a count.
_MOST_TRIPS = 5_000


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array.

    Attributes:
      dtype: as the program writes it: bf16, f32, s32.
      sizes: of its dimensions.
      memory_space: 0 is HBM, 5 the host's memory; all others are on the chip.
    """

    dtype: str
    sizes: tuple[int, ...]
    memory_space: int = 0

    @property
    def num_bytes(self) -> int:
        """Of the values alone, without padding."""
        return math.prod(self.sizes) * _bits(self.dtype) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      name: unique within its computation.
      opcode: what is done.
      shapes: of the result; several for a tuple, flattened.
      operands: names of instructions; or the literal of a constant, the number of a
        parameter.
      attributes: the rest of the line.
      is_root: whether its result is the computation's.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def num_bytes(self) -> int:
        """Of the whole result."""
        return sum(shape.num_bytes for shape in self.shapes)

    @functools.cached_property
    def cycles(self) -> int | None:
        """What the compiler estimates that it takes; None where it does not."""
        found = self.find(r'"estimated_cycles":"(\d+)"')
        return None if found is None else int(found)

    @functools.cached_property
    def op_name(self) -> str:
        """Where in the Python program it comes from; "" if nobody knows."""
        return self.find(r'op_name="([^"]*)"') or ""

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs, a loop's condition left out."""
        names = _CALLS.findall(self.attributes)
        for branches in _BRANCHES.findall(self.attributes):
            names += [name.strip().lstrip("%") for name in branches.split(",")]
        return tuple(names)

    def find(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the program; instructions in the order in which they are issued."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """The instructions, to be looked up."""
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose result the computation returns."""
        return next(i for i in reversed(self.instructions) if i.is_root)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: by name.
      entry: the one that is run.
    """

    computations: dict[str, Computation]
    entry: Computation

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """All instructions of what an instruction runs, however deep."""
        for name in instruction.called:
            for inner in self.computations[name].instructions:
                yield inner
                yield from self.inside(inner)

    def trips(self, caller: Computation, loop: Instruction) -> int | None:
        """How often a `while` runs its body, if that is a matter of counting."""
        known = loop.find(r"known_trip_count[^\d]*(\d+)")
        if known is not None:
            return int(known)
        condition = loop.find(r"condition=%([^\s,]+)")
        assert condition is not None and len(loop.called) == 1, loop.name
        return _count(self, caller, loop.operands[0], condition, body=loop.called[0])


def parse(text: str) -> Program:
    """Read the text of a compiled program."""
    computations: dict[str, Computation] = {}
    entry, name, instructions = "", "", list[Instruction]()
    for line in _whole_lines(text):
        header = _COMPUTATION.match(line)
        if header:
            name, instructions = header[2], list[Instruction]()
            entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, tuple(instructions))
        elif found := _INSTRUCTION.match(line):
            instructions.append(_instruction(found))
    return Program(computations, computations[entry])


def first_group(instruction: Instruction, num_devices: int) -> tuple[int, ...] | None:
    """The devices that one collective joins, of the first of its groups.

    The program writes groups in one of three ways: as lists, as an array that is
    reshaped and transposed, or as axes of a mesh.

    Args:
      instruction: a collective other than a permutation.
      num_devices: all there are, which is what no groups at all mean.

    Returns:
      None for a form that is not known.
    """
    text = instruction.attributes
    listed = re.search(r"replica_groups=\{(?:\{([\d,]*)\})?", text)
    if listed:
        return _numbers(listed[1]) if listed[1] else tuple(range(num_devices))
    array = re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
    )
    if array:
        ids = np.arange(math.prod(_numbers(array[3]))).reshape(_numbers(array[3]))
        if array[4]:
            ids = ids.transpose(_numbers(array[4]))
        return tuple(map(int, ids.reshape(int(array[1]), int(array[2]))[0]))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text)
    if mesh:
        sizes = {
            name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh[1])
        }
        return _group_of_axes(sizes, mesh[2])
    return None


def permuted_pairs(instruction: Instruction) -> list[tuple[int, int]]:
    """Who sends to whom in a collective-permute."""
    pairs = instruction.find(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}") or ""
    return [
        (int(source), int(target))
        for source, target in re.findall(r"\{(\d+),(\d+)\}", pairs)
    ]


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, each with those that continue it."""
    whole = ""
    for line in text.splitlines():
        if _BEGINNING.match(line):
            yield whole
            whole = line
        else:
            whole += "\n" + line
    yield whole


def _instruction(found: re.Match[str]) -> Instruction:
    operands = tuple(re.findall(r"%([^\s,]+)", found["operands"]))
    return Instruction(
        name=found["name"],
        opcode=found["opcode"],
        shapes=tuple(
            Shape(dtype, _numbers(sizes), _memory_space(layout))
            for dtype, sizes, layout in _SHAPE.findall(found["type"])
        ),
        operands=operands or (found["operands"],),
        attributes=found["attributes"],
        is_root=found["root"] is not None,
    )


def _memory_space(layout: str) -> int:
    space = re.search(r"S\((\d+)\)", layout)
    return int(space[1]) if space else 0


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    width = re.match(r"[a-z]+(\d+)", dtype)
    return int(width[1]) if width else 0


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def _group_of_axes(sizes: dict[str, int], axes: str) -> tuple[int, ...]:
    """The devices along some axes of a mesh; an axis may be a part: 'a':(before)size.

    An axis of which a part is meant splits into three: before, the part, after.
    """
    parts = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes)
    }
    shape, chosen = list[int](), list[slice | int]()
    for name, size in sizes.items():
        before, part = parts.get(name, (size, 1))
        shape += [before, part, size // before // part]
        chosen += [0, slice(None), 0]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return tuple(map(int, ids[tuple(chosen)].ravel()))


# What an instruction gives, as far as counting needs it: an integer, the elements of a
# tuple by their index, or None for anything else.
_Value = int | Callable[[int], "_Value"] | None


def _count(
    program: Program, caller: Computation, start: str, condition: str, *, body: str
) -> int | None:
    """Run a loop's counter, and nothing else of it."""
    again, step = program.computations[condition], program.computations[body]
    state = _evaluate(program, caller, start, ())
    for trips in range(_MOST_TRIPS):
        going_on = _evaluate(program, again, again.root.name, (state,))
        if not isinstance(going_on, int):
            return None
        if not going_on:
            return trips
        state = _evaluate(program, step, step.root.name, (state,))
    return None


def _evaluate(
    program: Program, computation: Computation, name: str, arguments: tuple[_Value, ...]
) -> _Value:
    instruction = computation.by_name[name]

    def value(operand: str) -> _Value:
        return _evaluate(program, computation, operand, arguments)

    match instruction.opcode:
        case "constant":
            return _literal(instruction.operands[0])
        case "parameter":
            number = int(instruction.operands[0])
            return arguments[number] if number < len(arguments) else None
        case "tuple":
            return functools.cache(lambda index: value(instruction.operands[index]))
        case "get-tuple-element":
            elements = value(instruction.operands[0])
            index = instruction.find(r"index=(\d+)")
            assert index is not None, instruction.name
            return elements(int(index)) if callable(elements) else None
        case "copy" | "bitcast" | "convert" | "opt-barrier":
            return value(instruction.operands[0])
        case "fusion" | "call":
            inner = program.computations[instruction.called[0]]
            given = tuple(map(value, instruction.operands))
            return _evaluate(program, inner, inner.root.name, given)
        case "add" | "subtract" | "multiply" | "compare":
            left, right = map(value, instruction.operands)
            if isinstance(left, int) and isinstance(right, int):
                how = instruction.find(r"direction=(\w+)") or instruction.opcode
                return int(_ARITHMETIC[how](left, right))
            return None
        case _:
            return None


_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def _literal(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d+", text) else None
