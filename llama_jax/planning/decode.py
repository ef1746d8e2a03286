"""Planning inference: what one token of a batch costs on a slice of chips.

Each token reads all weights and the whole cache once, so their bytes over the memory's
speed bound the time from below. The program that `generate` runs is compiled for the
chips, and its predicted time stands beside that bound.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.build import ShardedLlama, build, kv_copies, params_layout
from llama_jax.config import LlamaConfig
from llama_jax.config.sampling import Greedy
from llama_jax.errors import PlanError
from llama_jax.generate.decode import DecodeState, Vocabulary, decode, prefill
from llama_jax.generate.sample import Rule
from llama_jax.model.cache import CACHE_AXES
from llama_jax.model.count import abstract_params, cache_bytes_per_token
from llama_jax.planning import hlo
from llama_jax.planning import topology as tpu
from llama_jax.planning.compile import memory_refused, uncached
from llama_jax.planning.plan import has_compiler
from llama_jax.planning.schedule import Placement, predict
from llama_jax.planning.topology import Topology
from sharding import MeshConfig, abstract_mesh, decoding_rules, make_mesh

_DTYPE = jnp.dtype("bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """One token of every row of a batch, on a slice.

    Attributes:
      config: the model.
      topology: the slice.
      mesh: the devices per axis.
      batch: rows.
      length: slots of the cache for each row.
      weight_bytes: bfloat16 weights that a chip holds.
      read_bytes: of those, that it reads for every token: where key/value heads are
        fewer than the chips that share a layer, each holds all and reads one.
      cache_bytes: keys and values that it holds and reads.
      hbm_bytes: at the fullest moment, the compiler's; None without libtpu.
      token_seconds: predicted, of the compiled loop; None without libtpu.
      copied_bytes: of the cache, that the compiled loop copies at every token; None
        without libtpu.
    """

    config: LlamaConfig
    topology: Topology
    mesh: MeshConfig
    batch: int
    length: int
    weight_bytes: int
    read_bytes: int
    cache_bytes: int
    hbm_bytes: int | None
    token_seconds: float | None
    copied_bytes: int | None

    @property
    def bound_seconds(self) -> float:
        """No token is faster: weights and cache through the memory, once."""
        moved = self.read_bytes + self.cache_bytes
        return moved / self.topology.chip.hbm_bandwidth

    @property
    def int8_bound_seconds(self) -> float:
        """The same with weights of one byte, closed form: no program has them yet."""
        moved = self.read_bytes / 2 + self.cache_bytes
        return moved / self.topology.chip.hbm_bandwidth

    @property
    def fits(self) -> bool:
        """Whether a chip holds it."""
        held = self.hbm_bytes or self.weight_bytes + self.cache_bytes
        return held <= self.topology.chip.hbm_bytes


def plan_decode(
    config: LlamaConfig,
    topology: Topology,
    *,
    batch: int,
    length: int,
    tensor: int | None = None,
) -> DecodePlan:
    """Plan writing with a model: `bound_decode`, and what the compiler makes of it."""
    held = bound_decode(config, topology, batch=batch, length=length, tensor=tensor)
    return _compiled(held) if has_compiler() and held.fits else held


def bound_decode(
    config: LlamaConfig,
    topology: Topology,
    *,
    batch: int,
    length: int,
    tensor: int | None = None,
) -> DecodePlan:
    """Plan writing with a model by arithmetic alone.

    Args:
      config: the model.
      topology: the slice.
      batch: rows.
      length: slots of the cache for each row.
      tensor: chips that share each layer; by default, as many as the model and the
        batch allow. The others hold copies, for other rows.

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
    weights, read, cache = _held(config, topology, mesh, batch, length)
    return DecodePlan(
        config=config,
        topology=topology,
        mesh=mesh,
        batch=batch,
        length=length,
        weight_bytes=weights,
        read_bytes=read,
        cache_bytes=cache,
        hbm_bytes=None,
        token_seconds=None,
        copied_bytes=None,
    )


def _mesh(
    config: LlamaConfig, topology: Topology, batch: int, tensor: int | None
) -> MeshConfig:
    """Chips that share layers; the rest divides the rows."""
    chips = topology.num_chips // topology.slices

    def shares(size: int) -> bool:
        by_model = config.num_heads, config.hidden_dim, config.vocab_size
        fit = all(number % size == 0 for number in by_model)
        return fit and chips % size == 0 and batch * size % topology.num_chips == 0

    sizes = [size for size in range(1, chips + 1) if shares(size)]
    if not sizes or tensor not in (None, *sizes):
        raise PlanError(
            f"{chips} chips with {'no' if tensor is None else tensor} "
            f"{'number' if tensor is None else 'chips'} to share a layer do not divide "
            f"{batch} rows and the model: "
            + (f"share by one of {sizes}." if sizes else "give more rows.")
        )
    size = sizes[-1] if tensor is None else tensor
    return MeshConfig(data=chips // size, fsdp=1, tensor=size, dcn_data=topology.slices)


def _held(
    config: LlamaConfig, topology: Topology, mesh: MeshConfig, batch: int, length: int
) -> tuple[int, int, int]:
    """Bytes on a chip: of weights, of those that are read for a token, of cache."""
    devices, rules = abstract_mesh(mesh, topology.num_chips), decoding_rules()
    numbers = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)),
        abstract_params(config),
        params_layout(config, devices, rules),
    )
    held = sum(jax.tree.leaves(numbers))
    copies = kv_copies(config, devices, rules)
    attention = numbers["blocks"]["attention"]
    unread = 0
    if copies > 1:
        projections = attention["key"] + attention["value"]
        unread = projections - projections // config.num_kv_heads
    rows = batch * mesh.tensor // topology.num_chips
    per_token = cache_bytes_per_token(config, dtype=_DTYPE) * copies // mesh.tensor
    width = _DTYPE.itemsize
    return held * width, (held - unread) * width, rows * length * per_token


def _compiled(held: DecodePlan) -> DecodePlan:
    mesh = make_mesh(held.mesh, tpu.devices(held.topology))
    sharded = build(held.config, mesh, decoding_rules(), dtype=_DTYPE, remat="none")
    params, state, vocabulary = _arguments(sharded, held.batch, held.length)
    with jax.set_mesh(mesh):
        lowered = decode.lower(
            sharded.model,
            params,
            state,
            Rule.of(Greedy()),
            vocabulary,
            jax.ShapeDtypeStruct((), jnp.int32, sharding=sharded.sharding()),
        )
    try:
        with uncached():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed, _ = memory_refused(error)
        return dataclasses.replace(held, hbm_bytes=needed)
    text, stats = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and stats is not None
    profile = predict(text, held.topology, Placement.of(mesh))
    # One iteration of the outermost loop, the longest, writes one token to each row.
    token = max(loop.seconds for loop in profile.loops)
    return dataclasses.replace(
        held,
        hbm_bytes=stats.peak_memory_in_bytes,
        token_seconds=token,
        copied_bytes=copied_bytes(
            hlo.parse(text),
            length=held.length,
            smallest=held.cache_bytes // 2 // held.config.num_layers,
        ),
    )


def _arguments(
    sharded: ShardedLlama, batch: int, length: int
) -> tuple[Any, DecodeState, Vocabulary]:
    """What the program is called with, as shapes on the mesh."""
    whole, split = sharded.sharding(), sharded.sharding(*CACHE_AXES)
    vocabulary = Vocabulary(sharded.config.vocab_size, eos_id=2)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, _DTYPE, sharding=sharding
        ),
        abstract_params(sharded.config),
        sharded.param_shardings,
    )
    with jax.set_mesh(sharded.mesh):
        state = jax.eval_shape(
            lambda params, ids, number, seed: prefill(
                sharded.model,
                params,
                ids,
                number,
                number,
                seed,
                Rule.of(Greedy()),
                vocabulary,
                slots=length,
            ),
            params,
            jax.ShapeDtypeStruct((batch, 1), jnp.int32),
            jax.ShapeDtypeStruct((batch,), jnp.int32),
            jax.ShapeDtypeStruct((batch, 2), jnp.uint32),
        )

    def placed(leaf: jax.ShapeDtypeStruct, where: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    on_all = jax.tree.map(lambda leaf: placed(leaf, whole), state)
    cache = jax.tree.map(lambda leaf: placed(leaf, split), state.cache)
    return params, dataclasses.replace(on_all, cache=cache), vocabulary


def copied_bytes(program: hlo.Program, *, length: int, smallest: int) -> int:
    """Bytes of keys and values that loops write once more for every token.

    Args:
      program: the compiled loop.
      length: slots of the cache, which arrays of keys and values have as a dimension.
      smallest: bytes of one layer's keys on a chip; what is smaller is something else.
    """

    def written(computation: hlo.Computation) -> int:
        total = 0
        for instruction in computation.instructions:
            if instruction.opcode == "while":
                trips = program.trips(computation, instruction) or 1
                body = program.computations[instruction.called[0]]
                total += trips * written(body)
            elif computation is not program.entry and _writes(program, instruction):
                total += sum(
                    shape.num_bytes
                    for shape in instruction.shapes
                    if shape.memory_space == 0
                    and length in shape.sizes
                    and shape.num_bytes >= smallest
                )
        return total

    return written(program.entry)


_NO_WRITING = {"parameter", "get-tuple-element", "tuple", "bitcast", "opt-barrier"}
_IN_PLACE = {"scatter", "dynamic-update-slice"}


def _writes(program: hlo.Program, instruction: hlo.Instruction) -> bool:
    """Whether an instruction fills its whole result, rather than a few places of it."""
    opcode = instruction.opcode
    if opcode == "fusion":
        opcode = program.computations[instruction.called[0]].root.opcode
    return opcode not in _NO_WRITING | _IN_PLACE and not opcode.endswith("-done")
