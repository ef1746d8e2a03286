"""Planning how the answers of PPO are read: memory and time of each model's pass.

The programs are those of a run, and all models lie beside each. What they need beyond
those is the compiler's; nothing is guessed where libtpu is missing.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.build import ShardedLlama, build_for
from llama_jax.config.recipe import PpoRecipe
from llama_jax.finetune.experience import make_values
from llama_jax.finetune.ppo import build_critic
from llama_jax.finetune.reward import build_reward, last_scores, rows_at_once
from llama_jax.finetune.rollout import make_logprobs
from llama_jax.generate.rows import length_bucket, num_rows_for
from llama_jax.model.count import abstract_params
from llama_jax.planning import topology as tpu
from llama_jax.planning.compile import bytes_per_chip, memory_refused, uncached
from llama_jax.planning.schedule import Placement, predict
from llama_jax.planning.topology import Topology
from llama_jax.train.step import batch_sharding
from sharding import make_mesh
from sharding.axes import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """A pass over all answers of an iteration, all as long as may be.

    Attributes:
      what: what is read off, and by whom.
      working_bytes: of a chip at the fullest moment, beside all models.
      seconds: predicted; None where there is no program, as it does not fit.
    """

    what: str
    working_bytes: int
    seconds: float | None


def plan_reading(recipe: PpoRecipe, topology: Topology) -> tuple[Reading, ...]:
    """Compile what reads the answers, models planned to be of the policy's sizes.

    Args:
      recipe: whose mesh has as many devices as the topology has chips.
      topology: the slice.

    Raises:
      PlanError: libtpu is missing or fails.
      ShardingError: mesh, model and topology do not divide.
    """
    mesh = make_mesh(recipe.mesh, tpu.devices(topology))
    return tuple(
        _compiled(program, topology, mesh) for program in reading_programs(recipe, mesh)
    )


class Program(NamedTuple):
    """What reads, before it is compiled.

    Attributes:
      what: see `Reading`.
      step: `jax.jit` of it.
      arguments: of a call, as shapes; those that are not are static.
      calls: for all answers of an iteration.
    """

    what: str
    step: Callable[..., Any]
    arguments: tuple[Any, ...]
    calls: int

    @property
    def argument_bytes(self) -> int:
        """Of a chip, among which are the models that read."""
        leaves = jax.tree.leaves(self.arguments)
        return bytes_per_chip([x for x in leaves if hasattr(x, "sharding")])

    def lower(self) -> jax.stages.Lowered:
        """Inside `jax.set_mesh`, for the devices of that."""
        assert isinstance(self.step, jax.stages.Wrapped)
        return self.step.lower(*self.arguments)


def reading_programs(recipe: PpoRecipe, mesh: jax.sharding.Mesh) -> Iterator[Program]:
    """Those of an iteration, each once."""
    policy = build_for(recipe, mesh)
    critic = build_critic(recipe.model, policy)
    reward = build_reward(recipe.model, mesh, dtype=recipe.train.compute_dtype)
    prompts, length = recipe.ppo.prompts, recipe.data.sequence_length

    tokens_BT = _ids(recipe.train.batch_size, length, place=batch_sharding(policy))
    trained, frozen = (
        _params(policy, dtype) for dtype in ("float32", policy.model.dtype)
    )
    yield Program(
        what="log-probabilities, by policy and reference",
        step=make_logprobs(policy),
        arguments=(trained, frozen, tokens_BT),
        calls=recipe.iteration_steps,
    )
    yield Program(
        what="values, by the critic",
        step=make_values(critic),
        arguments=(_params(critic, "float32"), tokens_BT),
        calls=recipe.iteration_steps,
    )
    rows = num_rows_for(reward, min(prompts, rows_at_once(reward)))
    longest = length_bucket(length, recipe.model.max_length)
    whole = reward.sharding()
    yield Program(
        what="scores, by two reward models",
        step=last_scores,
        arguments=(
            reward.model,
            _params(reward, reward.model.dtype),
            _ids(rows, longest, place=whole),
            _ids(rows, place=whole),
        ),
        calls=2 * -(-prompts // rows),
    )


def _params(sharded: ShardedLlama, dtype: Any) -> Tree:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(
            leaf.shape, jnp.dtype(dtype), sharding=place
        ),
        abstract_params(sharded.config, sharded.head),
        sharded.param_shardings,
    )


def _ids(*shape: int, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)


def _compiled(program: Program, topology: Topology, mesh: jax.sharding.Mesh) -> Reading:
    with jax.set_mesh(mesh):
        lowered = program.lower()
    try:
        with uncached():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        peak, seconds = memory_refused(error)[0], None
    else:
        text, stats = compiled.as_text(), compiled.memory_analysis()
        assert text is not None and stats is not None
        peak = stats.peak_memory_in_bytes
        seconds = predict(text, topology, Placement.of(mesh)).step_seconds
    return Reading(
        what=program.what,
        working_bytes=peak - program.argument_bytes,
        seconds=seconds and program.calls * seconds,
    )
