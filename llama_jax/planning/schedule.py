"""From a scheduled program to a predicted step time.

The compiler has put every instruction in its place and estimated its cycles. Running
through the program with a clock gives a step's time; what goes over a network, to the
host or through a DMA engine runs beside it, and costs only as long as the program
waits for it. Everything here is predicted; nothing is measured.

Not known to the compiler, and so assumed: networks reach their published bandwidth,
with collectives in rings over all torus dimensions that their devices span; a kernel
of Pallas runs at a fixed share of the chip's peak (`KERNEL_EFFICIENCY`).
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, TypeVar, get_args

from llama_jax.errors import PlanError
from llama_jax.planning import hlo
from llama_jax.planning.network import (
    HOST_BANDWIDTH,
    CollectiveKey,
    Network,
    Placement,
    Resource,
    Transfer,
    collective_kind,
)
from llama_jax.planning.topology import Chip, Topology

Work = Literal["matmul", "attention", "other"]
Pass = Literal["forward", "recomputed", "backward", "update"]

# Share of peak FLOPs that attention kernels reach, by chip.
KERNEL_EFFICIENCY = {"v6e": 0.37}
USUAL_KERNEL_EFFICIENCY = 0.65
# The phases of a step, named with `jax.named_scope` or by Flax modules.
_SCOPES = frozenset(
    "embed blocks attention_norm attention query_key_value rotary attend out mlp_norm "
    "mlp final_norm unembed loss optimizer".split()
)
# Instructions that only name things.
_FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast partition-id replica-id "
    "after-all opt-barrier send-done".split()
)
_COPY_STARTS = frozenset(
    "copy-start slice-start dynamic-slice-start dynamic-update-slice-start".split()
)
_HOST_MEMORY = 5
# Side of the blocks in which `splash_flops` counts; those that the diagonal cuts are
# computed as a whole.
_SPLASH_BLOCK = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind over the same mesh axes, of one step, one chip.

    Attributes:
      kind: all-gather, reduce-scatter, all-reduce, all-to-all, collective-permute.
      axes: of the mesh, that its groups span.
      network: "ici" within a slice, "dcn" across slices.
      count: how many.
      num_bytes: of the whole arrays, before they are split or after they are joined.
      seconds: predicted, of the network.
      exposed_seconds: predicted, for which the chip waits.
    """

    kind: str
    axes: tuple[str, ...]
    network: Resource
    count: int
    num_bytes: float
    seconds: float
    exposed_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope:
    """Predicted seconds of computing in one phase of the model, within one pass.

    Attributes:
      name: the innermost `jax.named_scope` or module: mlp, attend, loss, optimizer.
      direction: "recomputed" is the part of the backward pass that repeats the
        forward one, "update" what comes after it.
      seconds: of a step.
    """

    name: str
    direction: Pass
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """Something that occupies the chip or a network for a while.

    Attributes:
      resource: "compute", or what runs beside it.
      start: seconds from the beginning of the iteration.
      end: likewise.
      label: what it is.
    """

    resource: str
    start: float
    end: float
    label: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """One loop of the program; the layers of a model are one or two.

    Attributes:
      name: where it comes from.
      direction: the pass that it belongs to.
      trips: iterations.
      seconds: predicted, of one iteration.
      spans: the timeline of one iteration.
    """

    name: str
    direction: Pass
    trips: int
    seconds: float
    spans: tuple[Span, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """A step, predicted. The seconds of `work` and of `exposed` add up to the step's.

    Attributes:
      step_seconds: of the whole.
      work: seconds of computing, by kind.
      exposed: seconds of waiting, by what is waited for: "ici" and "dcn" are the
        networks, "host" its memory, "dma" copies within the chip.
      collectives: the longest first.
      scopes: the longest first; they add up to the work.
      loops: the longest first.
      host_bytes: moved to and from the host's memory.
      uncounted_loops: loops whose trips are not a matter of counting; taken as 1.
    """

    step_seconds: float
    work: Mapping[Work, float]
    exposed: Mapping[Resource, float]
    collectives: tuple[Collective, ...]
    scopes: tuple[Scope, ...]
    loops: tuple[Loop, ...]
    host_bytes: float
    uncounted_loops: int

    @property
    def communication_seconds(self) -> float:
        """Exposed communication: waiting for the networks."""
        return self.exposed["ici"] + self.exposed["dcn"]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One call of a Pallas kernel.

    Attributes:
      name: of the instruction.
      operands: shapes of what it reads, on one chip.
      siblings: names of all kernels of the program.
    """

    name: str
    operands: tuple[hlo.Shape, ...]
    siblings: tuple[str, ...]


def splash_flops(kernel: Kernel) -> float:
    """FLOPs of JAX's splash attention, causal, in blocks of 512 along the diagonal.

    The forward pass has two matrix products over half of the square; the backward one
    five in one kernel, or four and three in two.

    Raises:
      PlanError: another kernel.
    """
    products = 0
    if "dq" in kernel.name:
        products = 3
    elif "dkv" in kernel.name:
        products = 4 if any("dq" in name for name in kernel.siblings) else 5
    elif "fwd" in kernel.name:
        products = 2
    arrays = [  # queries, keys; what comes before says where the mask has blocks
        shape.sizes
        for shape in kernel.operands
        if len(shape.sizes) >= 3 and "f" in shape.dtype
    ]
    if not products or len(arrays) < 2:
        raise PlanError(
            f"the program has a kernel {kernel.name!r} whose FLOPs are not known here: "
            "give predict a kernel_flops that counts it."
        )
    *heads, num_queries, width = arrays[0]
    num_keys = math.prod(arrays[1][-2:]) // width
    causal = (1 + _SPLASH_BLOCK / num_keys) / 2
    return 2 * products * math.prod(heads) * num_queries * num_keys * width * causal


def predict(
    text: str,
    topology: Topology,
    placement: Placement,
    *,
    kernel_flops: Callable[[Kernel], float] = splash_flops,
) -> Profile:
    """What a compiled program's schedule promises.

    Args:
      text: the program, as the compiler gives it.
      topology: compiled for.
      placement: of the mesh that it was compiled for.
      kernel_flops: counts those of a Pallas kernel, which the compiler cannot.

    Raises:
      PlanError: a kernel that `kernel_flops` does not know.
    """
    program = hlo.parse(text)
    run = _Run(program, topology.chip, Network(topology, placement), kernel_flops)
    total = run.through(program.entry, origin="")
    return Profile(
        step_seconds=total.seconds,
        work={kind: total.work[kind] for kind in get_args(Work)},
        exposed={resource: total.exposed[resource] for resource in get_args(Resource)},
        collectives=_longest_first(
            Collective(kind=kind, axes=axes, network=network, **vars(row))
            for (kind, axes, network), row in total.collectives.items()
        ),
        scopes=_longest_first(
            Scope(name=name, direction=direction, seconds=seconds)
            for (name, direction), seconds in total.scopes.items()
        ),
        loops=tuple(sorted(total.loops, key=lambda loop: -loop.trips * loop.seconds)),
        host_bytes=total.host_bytes,
        uncounted_loops=total.uncounted_loops,
    )


_Timed = TypeVar("_Timed", Collective, Scope)


def _longest_first(parts: Iterable[_Timed]) -> tuple[_Timed, ...]:
    return tuple(sorted(parts, key=lambda part: -part.seconds))


@dataclasses.dataclass
class _Row:
    count: int = 0
    num_bytes: float = 0.0
    seconds: float = 0.0
    exposed_seconds: float = 0.0


class _Stretch:
    """What running a part of the program once comes to; and the clock of doing so."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.work = collections.defaultdict[Work, float](float)
        self.exposed = collections.defaultdict[Resource, float](float)
        self.scopes = collections.defaultdict[tuple[str, Pass], float](float)
        self.collectives = collections.defaultdict[CollectiveKey, _Row](_Row)
        self.loops = list[Loop]()
        self.spans = list[Span]()
        self.host_bytes = 0.0
        self.uncounted_loops = 0
        self._free_at = collections.defaultdict[str, float](float)  # by lane
        self._pending: dict[str, tuple[float, Transfer]] = {}

    def compute(self, seconds: float, work: Work, scope: tuple[str, Pass]) -> None:
        """The chip is busy."""
        self._occupy("compute", self.seconds, seconds, scope[0])
        self.seconds += seconds
        self.work[work] += seconds
        self.scopes[scope] += seconds

    def begin(self, token: str, transfer: Transfer) -> None:
        """Something begins beside it, as soon as its lane is free."""
        start = max(self.seconds, self._free_at[transfer.lane])
        self._free_at[transfer.lane] = start + transfer.seconds
        self._pending[token] = (start + transfer.seconds, transfer)
        self._occupy(transfer.lane, start, transfer.seconds, transfer.label)
        if transfer.resource == "host":
            self.host_bytes += transfer.num_bytes
        if transfer.key is not None:
            row = self.collectives[transfer.key]
            row.count += 1
            row.num_bytes += transfer.num_bytes
            row.seconds += transfer.seconds

    def rename(self, token: str, new: str) -> None:
        """What is waited for gets another name."""
        if token in self._pending:
            self._pending[new] = self._pending.pop(token)

    def wait(self, token: str) -> None:
        """Go on when it is done; what began in an earlier iteration is."""
        if token not in self._pending:
            return
        end, transfer = self._pending.pop(token)
        exposed = max(0.0, end - self.seconds)
        self.seconds += exposed
        self.exposed[transfer.resource] += exposed
        if transfer.key is not None:
            self.collectives[transfer.key].exposed_seconds += exposed

    def add(self, part: "_Stretch", times: int, label: str) -> None:
        """Another part is run, several times over."""
        self._occupy("compute", self.seconds, times * part.seconds, label)
        self.seconds += times * part.seconds
        for kind, seconds in part.work.items():
            self.work[kind] += times * seconds
        for resource, seconds in part.exposed.items():
            self.exposed[resource] += times * seconds
        for scope, seconds in part.scopes.items():
            self.scopes[scope] += times * seconds
        for key, row in part.collectives.items():
            own = self.collectives[key]
            own.count += times * row.count
            own.num_bytes += times * row.num_bytes
            own.seconds += times * row.seconds
            own.exposed_seconds += times * row.exposed_seconds
        self.loops += part.loops
        self.host_bytes += times * part.host_bytes
        self.uncounted_loops += part.uncounted_loops

    def _occupy(self, resource: str, start: float, seconds: float, label: str) -> None:
        if seconds > 0:
            self.spans.append(
                Span(resource=resource, start=start, end=start + seconds, label=label)
            )


class _Run:
    """Goes through a program, instruction by instruction."""

    def __init__(
        self,
        program: hlo.Program,
        chip: Chip,
        network: Network,
        kernel_flops: Callable[[Kernel], float],
    ) -> None:
        self._program = program
        self._chip = chip
        self._network = network
        self._kernel_flops = kernel_flops
        efficiency = KERNEL_EFFICIENCY.get(chip.name, USUAL_KERNEL_EFFICIENCY)
        self._kernel_speed = efficiency * chip.peak_flops
        self._kernels = tuple(
            instruction.name
            for computation in program.computations.values()
            for instruction in computation.instructions
            if _is_kernel(instruction)
        )

    def through(self, computation: hlo.Computation, *, origin: str) -> _Stretch:
        """Run a computation once.

        Args:
          computation: to run.
          origin: the `op_name` of what calls it.
        """
        clock = _Stretch()
        for instruction in computation.instructions:
            self._issue(clock, computation, instruction, origin)
        return clock

    def _issue(
        self,
        clock: _Stretch,
        computation: hlo.Computation,
        instruction: hlo.Instruction,
        origin: str,
    ) -> None:
        name, opcode = instruction.name, instruction.opcode
        # What the compiler adds has a name without a path, or none.
        op_name = instruction.op_name if "/" in instruction.op_name else origin
        if opcode in _FREE:
            return
        if opcode == "while":
            self._loop(clock, computation, instruction, op_name)
        elif opcode in ("call", "conditional"):
            branches = [
                self.through(self._program.computations[called], origin=op_name)
                for called in instruction.called
            ]
            longest = max(branches, key=lambda branch: branch.seconds)
            clock.add(longest, 1, _scope(op_name)[0])
        elif opcode.endswith("-update"):
            clock.rename(instruction.operands[0], name)
            self._on_another_core(clock, computation, instruction)
        elif opcode.endswith("-done"):
            clock.wait(instruction.operands[0])
        elif opcode == "send":
            clock.begin(
                _rendezvous(instruction), self._network.across_slices(instruction)
            )
        elif opcode == "recv":
            clock.rename(_rendezvous(instruction), name)
        elif opcode in _COPY_STARTS:
            clock.begin(name, self._copy(instruction))
        elif collective_kind(instruction):
            clock.begin(name, self._network.transfer(instruction))
            if not opcode.endswith("-start"):
                clock.wait(name)
        elif opcode.endswith("-start"):
            self._on_another_core(clock, computation, instruction)
        elif opcode == "fusion" and instruction.cycles is None:
            self._fused_collectives(clock, computation, instruction, op_name)
        elif opcode != "custom-call" or _is_kernel(instruction):
            self._compute(clock, computation, instruction, op_name)

    def _loop(
        self,
        clock: _Stretch,
        computation: hlo.Computation,
        loop: hlo.Instruction,
        op_name: str,
    ) -> None:
        trips = self._program.trips(computation, loop)
        if trips is None:
            trips, clock.uncounted_loops = 1, clock.uncounted_loops + 1
        body = self._program.computations[loop.called[0]]
        iteration = self.through(body, origin=op_name)
        name, direction = _scope(op_name)
        clock.add(iteration, trips, name)
        clock.loops.append(
            Loop(
                name=name,
                direction=direction,
                trips=trips,
                seconds=iteration.seconds,
                spans=tuple(iteration.spans),
            )
        )

    def _on_another_core(
        self,
        clock: _Stretch,
        computation: hlo.Computation,
        instruction: hlo.Instruction,
    ) -> None:
        """A computation begins there, once it is given what it works on.

        That is by its start, or, where this only readies the core, by its update.
        """
        start = instruction
        if instruction.opcode.endswith("-update"):
            start = computation.by_name[instruction.operands[0]]
        readies_only = not computation.by_name.keys() & set(start.operands)
        if readies_only == (start is not instruction):
            for inner in self._collectives_inside(start):
                clock.begin(instruction.name, self._network.transfer(inner))

    def _fused_collectives(
        self,
        clock: _Stretch,
        computation: hlo.Computation,
        fusion: hlo.Instruction,
        op_name: str,
    ) -> None:
        """A fusion that begins, ends or is a collective; or that moves data only."""
        inside = self._collectives_inside(fusion)
        if not inside:
            self._compute(clock, computation, fusion, op_name)
            return
        targets = {
            inner.find(r'custom_call_target="(\w+)"')
            for inner in self._program.inside(fusion)
        }
        # An all-reduce of which each device keeps a part is a reduce-scatter.
        kind = "reduce-scatter" if "all-reduce-scatter" in fusion.called[0] else ""
        for inner in inside:
            channel = inner.find(r"channel_id=(\d+)") or inner.name
            if "AsyncCollectiveDone" not in targets:
                clock.begin(channel, self._network.transfer(inner, kind=kind))
            if "AsyncCollectiveStart" not in targets:
                clock.wait(channel)

    def _collectives_inside(
        self, instruction: hlo.Instruction
    ) -> list[hlo.Instruction]:
        return [
            inner
            for inner in self._program.inside(instruction)
            if collective_kind(inner)
        ]

    def _compute(
        self,
        clock: _Stretch,
        computation: hlo.Computation,
        instruction: hlo.Instruction,
        op_name: str,
    ) -> None:
        operands = [
            shape
            for name in instruction.operands
            if name in computation.by_name
            for shape in computation.by_name[name].shapes
        ]
        scope = _scope(op_name)
        if _is_kernel(instruction):
            kernel = Kernel(instruction.name, tuple(operands), self._kernels)
            seconds = self._kernel_flops(kernel) / self._kernel_speed
        elif instruction.cycles is not None:
            seconds = instruction.cycles / self._chip.clock_hz
        else:
            moved = [s for s in (*instruction.shapes, *operands) if s.memory_space == 0]
            if self._in_place(instruction):
                moved = [s for s in moved if s not in instruction.shapes]
            seconds = sum(s.num_bytes for s in moved) / self._chip.hbm_bandwidth
        work: Work = "other"
        if _is_kernel(instruction) or scope[0] == "attend":
            work = "attention"
        elif _multiplies(instruction) or any(
            _multiplies(inner) for inner in self._program.inside(instruction)
        ):
            work = "matmul"
        clock.compute(seconds, work, scope)

    def _in_place(self, instruction: hlo.Instruction) -> bool:
        """Whether it changes a few places of an array where that is."""
        if instruction.opcode == "fusion":
            instruction = self._program.computations[instruction.called[0]].root
        return instruction.opcode in ("scatter", "dynamic-update-slice")

    def _copy(self, start: hlo.Instruction) -> Transfer:
        shapes = start.shapes
        if start.opcode == "dynamic-update-slice-start":
            moved = shapes[1].num_bytes
        elif start.opcode == "copy-start":
            moved = max(shape.num_bytes for shape in shapes)
        else:  # what is read from, the slice, the context
            moved = shapes[-2].num_bytes
        host = any(shape.memory_space == _HOST_MEMORY for shape in shapes)
        return Transfer(
            resource="host" if host else "dma",
            lane="host" if host else "dma",
            num_bytes=moved,
            seconds=moved / (HOST_BANDWIDTH if host else self._chip.hbm_bandwidth),
            label="copy",
        )


def _rendezvous(transfer: hlo.Instruction) -> str:
    """What the two halves of a transfer between slices have in common."""
    return transfer.find(r'rendezvous="([^"]*)"') or transfer.name


def _is_kernel(instruction: hlo.Instruction) -> bool:
    return 'custom_call_target="tpu_custom_call"' in instruction.attributes


def _multiplies(instruction: hlo.Instruction) -> bool:
    return instruction.opcode in ("dot", "convolution")


def _scope(op_name: str) -> tuple[str, Pass]:
    """The phase of the model and the pass that an `op_name` tells."""
    known = [word for word in re.findall(r"\w+", op_name) if word in _SCOPES]
    name = known[-1] if known else "other"
    if "rematted_computation" in op_name:
        return name, "recomputed"
    if "transpose(" in op_name:
        return name, "backward"
    if "jvp(" in op_name or name not in ("optimizer", "other"):
        return name, "forward"
    return name, "update"
