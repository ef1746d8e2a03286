"""A recipe's real training step, compiled for a pod that is not there.

The step is the one that `train` runs; only its arguments are shapes instead of arrays,
so nothing is ever computed or held. What the compiler says of memory is a fact, and so
is the program it schedules; `schedule.py` predicts from that how long it takes.
"""

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from llama_jax.build import ShardedLlama, build_for
from llama_jax.config.recipe import TrainingRecipe
from llama_jax.data.batch import AnyBatch
from llama_jax.errors import PlanError
from llama_jax.finetune.stages import empty_batch, kind_of
from llama_jax.planning import topology as tpu
from llama_jax.planning.topology import Topology
from llama_jax.train.layout import check_layout
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.state import abstract_state
from llama_jax.train.step import batch_sharding, make_train_step
from sharding import make_mesh

_GIB = 2**30
# How the compiler words it, by version: "(24.50G) exceeds available HBM (15.75G)", or
# "Used 24.50G of 15.75G hbm".
_REFUSAL = re.compile(
    r"(?:Used |\()([\d.]+)([KMGT])\)? (?:of|exceeds available HBM \() ?([\d.]+)([KMGT])"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one chip while a step runs, as the compiler has laid them out.

    Attributes:
      parameters: weights.
      optimizer: the moments and counts.
      activations: the peak less parameters and optimizer: saved activations, gradients
        and all else that lives within a step.
      peak: the most that is held at once.
      limit: what the chip has.
      host: what is moved to the host's memory.
    """

    parameters: int
    optimizer: int
    activations: int
    peak: int
    limit: int
    host: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """What the compiler made of a recipe.

    Attributes:
      recipe: whose step it is.
      topology: compiled for.
      mesh: the topology's devices, as the recipe lays them out.
      memory: of each chip.
      text: the scheduled program; "" where it does not fit, as there is none then.
      problem: what the compiler said if it does not fit, else "".
      seconds: that tracing and compiling took.
    """

    recipe: TrainingRecipe
    topology: Topology
    mesh: jax.sharding.Mesh
    memory: Memory
    text: str
    problem: str
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the program can run on these chips."""
        return not self.problem


def compile_step(
    recipe: TrainingRecipe,
    topology: Topology,
    *,
    compiler_options: Mapping[str, str | bool] | None = None,
) -> CompiledStep:
    """Compile one training step.

    Args:
      recipe: whose mesh must have as many devices as the topology has chips.
      topology: the slices.
      compiler_options: the compiler's own, on top of its defaults.

    Raises:
      PlanError: libtpu is missing or fails.
      ShardingError: mesh, model, batch and topology do not divide.
    """
    began = time.monotonic()
    check_layout(dataclasses.replace(recipe, topology=topology.name))
    mesh = make_mesh(recipe.mesh, tpu.devices(topology))
    sharded = build_for(recipe, mesh)
    optimizer = make_optimizer(recipe.optimizer, recipe.train.num_steps)
    step = make_train_step(
        sharded,
        optimizer,
        make_schedule(recipe.optimizer, recipe.train.num_steps),
        accumulate=recipe.train.accumulate,
        spike_norm=recipe.train.spike_norm,
        objective=kind_of(recipe).stage.objective(recipe),
    )
    assert isinstance(step, jax.stages.Wrapped)
    state = abstract_state(sharded, optimizer)
    with jax.set_mesh(mesh):
        lowered = step.lower(state, abstract_batch(recipe, sharded))
    parameters = bytes_per_chip(state.params)
    moments = bytes_per_chip(state.opt_state)
    program = compile_for(topology, lowered, compiler_options)
    problem = (
        ""
        if program.text
        else (
            f"a step needs {program.peak / _GIB:.2f} GiB per chip, and the "
            f"{program.limit / _GIB:.2f} GiB of {topology.chip.name} are less"
        )
    )
    return CompiledStep(
        recipe=recipe,
        topology=topology,
        mesh=mesh,
        memory=Memory(
            parameters=parameters,
            optimizer=moments,
            activations=program.peak - parameters - moments,
            peak=program.peak,
            limit=program.limit,
            host=program.host,
        ),
        text=program.text,
        problem=problem,
        seconds=time.monotonic() - began,
    )


def abstract_batch(recipe: TrainingRecipe, sharded: ShardedLlama) -> AnyBatch:
    """What a step of a recipe reads, as shapes that know their layout."""
    rows = batch_sharding(sharded)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows),
        empty_batch(recipe),
    )


class Program(NamedTuple):
    """What the compiler made of a program.

    Attributes:
      text: as it is scheduled; "" where it does not fit, as there is none then.
      peak: bytes of a chip at the fullest moment.
      limit: bytes that a chip has.
      host: bytes that are moved to the host's memory.
    """

    text: str
    peak: int
    limit: int
    host: int


def compile_for(
    topology: Topology,
    lowered: jax.stages.Lowered,
    options: Mapping[str, str | bool] | None = None,
) -> Program:
    """Compile a program that was lowered for a topology's devices.

    Args:
      topology: the slices.
      lowered: the program.
      options: the compiler's own, on top of its defaults.

    Raises:
      PlanError: the compiler fails for another reason than memory.
    """
    try:
        with uncached():
            compiled = lowered.compile(compiler_options=dict(options or {}))
    except jax.errors.JaxRuntimeError as error:
        needed, limit = memory_refused(error)
        return Program("", needed, limit, host=0)
    text, stats = compiled.as_text(), compiled.memory_analysis()
    assert text and stats is not None
    return Program(
        text,
        stats.peak_memory_in_bytes,
        topology.chip.hbm_bytes,
        stats.host_temp_size_in_bytes,
    )


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Compile without leaving the program in JAX's cache.

    It would never be of use: without a TPU, JAX cannot read it again.
    """
    setting = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, setting)
    jax.config.update(setting, math.inf)
    try:
        yield
    finally:
        jax.config.update(setting, before)


def memory_refused(error: jax.errors.JaxRuntimeError) -> tuple[int, int]:
    """Bytes that a program needs and that there are, from the compiler's refusal."""
    said = _REFUSAL.search(str(error))
    if said is None:
        raise PlanError(
            f"the TPU compiler failed: {str(error).strip()} If libtpu is not the one "
            "that this JAX asks for, install that: pip install 'llama-jax[tpu]'."
        ) from error
    needed, needed_unit, there, there_unit = said.groups()
    limit = int(float(there) * _UNITS[there_unit])
    # Two decimals may be the same, and the refusal stands.
    return max(int(float(needed) * _UNITS[needed_unit]), limit + 1), limit


def bytes_per_chip(tree: Any) -> int:
    """Of arrays or shapes that know their layout."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
