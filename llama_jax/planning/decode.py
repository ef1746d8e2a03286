"""Planning inference: what one token of a batch costs on a slice of chips.

Each token reads all weights and the whole cache once, so their bytes over the memory's
speed bound the time from below. The programs that `generate` runs are compiled for the
chips: the loop that writes, whose predicted time stands beside that bound, and the one
that reads a chunk of every prompt.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.build import ShardedLlama, build
from llama_jax.config import LlamaConfig
from llama_jax.config.sampling import Greedy, Sampler
from llama_jax.errors import PlanError
from llama_jax.generate import engine
from llama_jax.generate.decode import (
    Cache,
    Choice,
    DecodeState,
    begin,
    decode,
    prefill,
)
from llama_jax.generate.rows import chunk_sizes, num_rows_for
from llama_jax.generate.sample import Rule
from llama_jax.generate.weights import abstract_weights
from llama_jax.model.cache import CACHE_AXES
from llama_jax.model.decoder import Decoder, Weights
from llama_jax.planning import hlo
from llama_jax.planning import topology as tpu
from llama_jax.planning.compile import bytes_per_chip, compile_for
from llama_jax.planning.plan import has_compiler
from llama_jax.planning.schedule import Placement, predict
from llama_jax.planning.topology import Topology
from sharding import MeshConfig, abstract_mesh, decoding_rules, make_mesh

_GREEDY = Greedy()
# Tokens that may end a row: as many as `generate` compiles for.
_NUM_ENDS = 8

# What may be asked for; None is what the arithmetic is done in.
Kept = Literal["int8"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """One token of every row of a batch, and a chunk of its prompts, on a slice.

    Attributes:
      config: the model.
      topology: the slice.
      mesh: the devices per axis.
      batch: rows; programs and cache are of as many or some more, see `num_rows_for`.
      length: slots of the cache for each row.
      dtype: of the arithmetic.
      sampler: how tokens are chosen.
      weights: the type that matrices are kept in, `dtype` or int8.
      cache: likewise, of keys and values.
      weight_bytes: of weights, that a chip holds.
      read_bytes: of those, that it reads for every token: all but the embedding table,
        of which a token needs a row.
      cache_bytes: of keys and values, that it holds and reads, with their scales.
      chunk: tokens of each prompt that are read at a time, at the most.
      chunk_bytes: at the fullest moment of reading a chunk, the compiler's; None
        without libtpu.
      chunk_seconds: predicted, to read a chunk of each prompt with one block of slots
        before it; None without libtpu, or where either program does not fit.
      loop_bytes: as `chunk_bytes`, of the loop that writes.
      token_seconds: predicted, of the compiled loop, the whole cache being in use; None
        without libtpu. What is fetched ahead and what is read on the spot come through
        the same memory, but the schedule gives each the memory's whole speed: so where
        it promises less than `bound_seconds`, this is the bound.
      copied_bytes: of the cache, that the compiled loop copies at every token; None
        without libtpu.
    """

    config: LlamaConfig
    topology: Topology
    mesh: MeshConfig
    batch: int
    length: int
    dtype: str
    sampler: Sampler
    weights: str
    cache: str
    weight_bytes: int
    read_bytes: int
    cache_bytes: int
    chunk: int
    chunk_bytes: int | None = None
    chunk_seconds: float | None = None
    loop_bytes: int | None = None
    token_seconds: float | None = None
    copied_bytes: int | None = None

    @property
    def hbm_bytes(self) -> int | None:
        """At the fullest moment of both programs; None without libtpu."""
        return max(self.chunk_bytes or 0, self.loop_bytes or 0) or None

    @property
    def bound_seconds(self) -> float:
        """No token is faster: weights and cache through the memory, once."""
        moved = self.read_bytes + self.cache_bytes
        return moved / self.topology.chip.hbm_bandwidth

    @property
    def held_bytes(self) -> int:
        """Of a chip at the fullest moment, or what is sure to be held then."""
        return self.hbm_bytes or self.weight_bytes + self.cache_bytes

    @property
    def fits(self) -> bool:
        """Whether a chip holds it."""
        return self.held_bytes <= self.topology.chip.hbm_bytes


def plan_decode(
    config: LlamaConfig,
    topology: Topology,
    *,
    batch: int,
    length: int,
    tensor: int | None = None,
    weights: Kept = None,
    cache: Kept = None,
    dtype: str = "bfloat16",
    sampler: Sampler = _GREEDY,
) -> DecodePlan:
    """Plan a model's use: `bound_decode`, and what the compiler makes of it."""
    held = bound_decode(
        config,
        topology,
        batch=batch,
        length=length,
        tensor=tensor,
        weights=weights,
        cache=cache,
        dtype=dtype,
        sampler=sampler,
    )
    return _compiled(held) if has_compiler() and held.fits else held


def bound_decode(
    config: LlamaConfig,
    topology: Topology,
    *,
    batch: int,
    length: int,
    tensor: int | None = None,
    weights: Kept = None,
    cache: Kept = None,
    dtype: str = "bfloat16",
    sampler: Sampler = _GREEDY,
) -> DecodePlan:
    """Plan a model's use by arithmetic alone.

    Args:
      config: the model.
      topology: the slice.
      batch: rows.
      length: slots of the cache for each row.
      tensor: chips that share each layer; by default, as many as the model and the
        batch allow. The others hold copies, for other rows.
      weights: how matrices are kept, as `llama_jax.load` takes it.
      cache: how keys and values are kept, likewise.
      dtype: of the arithmetic, and of what is not kept otherwise.
      sampler: how tokens are chosen.

    Raises:
      PlanError: no rows, chips that do not divide so, or a cache of no slots or of
        more than the context.
      ShardingError: `tensor` does not divide the model.
    """
    if batch < 1:
        raise PlanError(f"a batch of {batch} rows: give 1 or more.")
    if not 1 <= length <= config.max_length:
        raise PlanError(
            f"a cache of {length} slots: the model's context is {config.max_length} "
            f"tokens, so give 1 to {config.max_length}."
        )
    mesh = _mesh(config, topology, batch, tensor)
    kept = {"dtype": dtype, "weights": weights or dtype, "cache": cache or dtype}
    # One device stands for every chip: shapes are all that is asked for.
    sizes = abstract_mesh(mesh, topology.num_chips)
    programs = _Programs.of(
        config,
        jax.sharding.Mesh(
            np.full(sizes.axis_sizes, jax.devices()[0]),
            sizes.axis_names,
            axis_types=sizes.axis_types,
        ),
        batch=batch,
        length=length,
        **kept,
    )
    held = bytes_per_chip(programs.weights)
    return DecodePlan(
        config=config,
        topology=topology,
        mesh=mesh,
        batch=batch,
        length=length,
        **kept,
        sampler=sampler,
        weight_bytes=held,
        read_bytes=held - bytes_per_chip(programs.weights.embed),
        cache_bytes=bytes_per_chip(programs.cache),
        chunk=chunk_sizes(length)[-1],
    )


def _mesh(
    config: LlamaConfig, topology: Topology, batch: int, tensor: int | None
) -> MeshConfig:
    """Chips that share layers; the rest divides the rows."""
    chips = topology.num_chips // topology.slices

    divided = (chips, config.num_heads, config.hidden_dim, config.vocab_size)
    sizes = [
        size
        for size in range(1, chips + 1)
        if all(number % size == 0 for number in divided)
    ]
    if tensor not in (None, *sizes):
        raise PlanError(
            f"{chips} chips, {tensor} of which share a layer, do not divide the model: "
            f"share by one of {sizes}."
        )
    filled = [size for size in sizes if batch * size % topology.num_chips == 0]
    if tensor is None and not filled:
        raise PlanError(
            f"{batch} rows do not divide over {topology.num_chips} chips, however many "
            "of these share a layer: give more rows, or say how many share (--tensor)."
        )
    size = filled[-1] if tensor is None else tensor
    return MeshConfig(data=chips // size, fsdp=1, tensor=size, dcn_data=topology.slices)


@dataclasses.dataclass(frozen=True)
class _Programs:
    """`prefill` and `decode`, and what they are called with, as shapes on a mesh."""

    sharded: ShardedLlama
    decoder: Decoder
    weights: Weights
    cache: Cache

    @classmethod
    def of(
        cls,
        config: LlamaConfig,
        mesh: jax.sharding.Mesh,
        *,
        batch: int,
        length: int,
        dtype: str,
        weights: str,
        cache: str,
    ) -> "_Programs":
        """Those of a plan; the arguments are the plan's."""
        sharded = build(config, mesh, decoding_rules(), dtype=dtype, remat="none")
        decoder = engine.decoder(sharded)
        rows = num_rows_for(sharded, batch)
        empty = jax.eval_shape(
            lambda: decoder.empty_cache(rows, length, jnp.dtype(cache))
        )
        return cls(
            sharded=sharded,
            decoder=decoder,
            weights=abstract_weights(sharded, jnp.dtype(dtype), int8=weights == "int8"),
            cache=jax.tree.map(
                lambda leaf: _placed(leaf, sharded.sharding(*CACHE_AXES[: leaf.ndim])),
                empty,
            ),
        )

    def lower_prefill(self, chunk: int) -> jax.stages.Lowered:
        """For the devices of the mesh; so many tokens of every prompt."""
        with jax.set_mesh(self.sharded.mesh):
            return prefill.lower(
                self.decoder, self.weights, self._state(), self._whole(), num_new=chunk
            )

    def lower_decode(self, sampler: Sampler) -> jax.stages.Lowered:
        """For the devices of the mesh."""
        choice = Choice(
            rule=Rule.of(sampler),
            num_pieces=self.sharded.config.vocab_size,
            ends=self._whole(_NUM_ENDS),
        )
        state = self._state()
        with jax.set_mesh(self.sharded.mesh):
            return decode.lower(
                self.decoder,
                self.weights,
                state,
                choice,
                self._whole(),
                self._whole(*state.done.shape, dtype=jnp.bool_),
            )

    def _state(self) -> DecodeState:
        batch, _, length, _ = self.cache[0].keys.shape
        with jax.set_mesh(self.sharded.mesh):
            state: DecodeState = jax.eval_shape(
                functools.partial(begin, self.decoder),
                self.cache,
                self._whole(batch, length),
                self._whole(batch),
                self._whole(batch),
                self._whole(batch, 2, dtype=jnp.uint32),
            )
        whole = self.sharded.sharding()
        state = jax.tree.map(lambda leaf: _placed(leaf, whole), state)
        return dataclasses.replace(state, cache=self.cache)

    def _whole(self, *shape: int, dtype: Any = jnp.int32) -> Any:
        """An array that every device has."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharded.sharding())


def _placed(leaf: Any, where: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _shape_on_chip(leaf: Any) -> tuple[int, ...]:
    return leaf.sharding.shard_shape(leaf.shape)


def _compiled(held: DecodePlan) -> DecodePlan:
    mesh = make_mesh(held.mesh, tpu.devices(held.topology))
    programs = _Programs.of(
        held.config,
        mesh,
        batch=held.batch,
        length=held.length,
        dtype=held.dtype,
        weights=held.weights,
        cache=held.cache,
    )
    reading = compile_for(held.topology, programs.lower_prefill(held.chunk))
    writing = compile_for(held.topology, programs.lower_decode(held.sampler))
    plan = dataclasses.replace(held, chunk_bytes=reading.peak, loop_bytes=writing.peak)
    if not (reading.text and writing.text):
        return plan
    read = predict(reading.text, held.topology, Placement.of(mesh))
    written = predict(writing.text, held.topology, Placement.of(mesh))
    # One iteration of the outermost loop, the longest, writes one token to each row.
    token = max(loop.seconds for loop in written.loops)
    keys = jax.tree.leaves(programs.cache[0])[0]
    return dataclasses.replace(
        plan,
        chunk_seconds=read.step_seconds,
        token_seconds=max(token, held.bound_seconds),
        copied_bytes=copied_bytes(
            hlo.parse(writing.text),
            slots=_slots_read(programs.decoder.least_slots, held.length),
            width=math.prod(_shape_on_chip(keys)) // held.length,
        ),
    )


def _slots_read(least: int, length: int) -> list[int]:
    """Slots of the beginnings of a cache that attention may read, see `Decoder`."""
    sizes, size = [length], min(least, -(-length // 4))
    while size < length:
        sizes.append(size)
        size *= 4
    return sizes


def copied_bytes(program: hlo.Program, *, slots: Collection[int], width: int) -> int:
    """Bytes of keys and values that loops write once more for every token.

    What goes to the chip's own memory is fetched ahead of its use, and no copy.

    Args:
      program: the compiled loop.
      slots: of the cache, or of the part of it that is read; arrays of keys and values
        have one of these numbers as a dimension.
      width: numbers that a slot of one layer's keys has on a chip, in all rows; arrays
        with fewer to a slot are something else.
    """

    def is_cache(shape: hlo.Shape) -> bool:
        numbers = math.prod(shape.sizes)
        return shape.memory_space == 0 and any(
            size in shape.sizes and numbers >= size * width for size in slots
        )

    def written(computation: hlo.Computation, in_loop: bool) -> int:
        total = 0
        for instruction in computation.instructions:
            called = [program.computations[name] for name in instruction.called]
            match instruction.opcode:
                case "while":
                    trips = program.trips(computation, instruction) or 1
                    total += trips * written(called[0], True)
                case "conditional" | "call":
                    # One branch is run: the worst, for all that is known.
                    total += max(written(branch, in_loop) for branch in called)
                case _ if in_loop:
                    total += sum(
                        shape.num_bytes
                        for shape in _filled(program, instruction)
                        if is_cache(shape)
                    )
        return total

    return written(program.entry, False)


_NO_WRITING = {"parameter", "get-tuple-element", "tuple", "bitcast", "opt-barrier"}
_IN_PLACE = {"scatter", "dynamic-update-slice"}


def _filled(program: hlo.Program, instruction: hlo.Instruction) -> Iterator[hlo.Shape]:
    """The arrays that an instruction writes as a whole, not in a few places."""
    # A copy that runs beside the program is told by its end, whose result is the
    # copy alone; its beginning names the source too.
    if not instruction.opcode.endswith(("-start", "-update")):
        opcodes = _opcodes(program, instruction)
        for shape, opcode in zip(instruction.shapes, opcodes, strict=False):
            if opcode.removesuffix("-done") not in _NO_WRITING | _IN_PLACE:
                yield shape


def _opcodes(program: hlo.Program, instruction: hlo.Instruction) -> list[str]:
    """What makes each result of an instruction; of a fusion, what does so within."""
    if instruction.opcode != "fusion":
        return [instruction.opcode] * len(instruction.shapes)
    inside = program.computations[instruction.called[0]]
    root = inside.root
    made = list[str]()
    for name in root.operands if root.opcode == "tuple" else (root.name,):
        maker = inside.by_name[name]
        while maker.opcode == "bitcast":
            maker = inside.by_name[maker.operands[0]]
        # What a fusion only passes on, it copies.
        made.append(
            "copy" if maker.opcode == "parameter" else _opcodes(program, maker)[0]
        )
    return made
