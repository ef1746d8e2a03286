"""Planning how the answers of PPO are read: memory and time of each model's pass.

The programs are those of a run, and while one of them runs all models stay where they
are. What it needs beside them is the compiler's; without libtpu nothing is said of it.
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
from llama_jax.finetune.reward import build_reward, make_scores, rows_at_once
from llama_jax.finetune.rollout import make_logprobs
from llama_jax.generate.rows import length_bucket, num_rows_for
from llama_jax.model.count import abstract_params
from llama_jax.planning import topology as tpu
from llama_jax.planning.compile import bytes_per_chip, compile_for
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
    return tuple(_compiled(reads, topology, mesh) for reads in passes(recipe, mesh))


class Pass(NamedTuple):
    """A program that reads, before it is compiled.

    Attributes:
      what: see `Reading`.
      step: takes models, then ids.
      models: parameters, as shapes.
      ids: of a call, likewise.
      calls: for all answers of an iteration.
    """

    what: str
    step: jax.stages.Wrapped
    models: tuple[Tree, ...]
    ids: tuple[jax.ShapeDtypeStruct, ...]
    calls: int

    def lower(self) -> jax.stages.Lowered:
        """Inside `jax.set_mesh`, for the devices of that."""
        return self.step.lower(*self.models, *self.ids)


def passes(recipe: PpoRecipe, mesh: jax.sharding.Mesh) -> Iterator[Pass]:
    """Those of an iteration, each once."""
    policy = build_for(recipe, mesh)
    critic = build_critic(recipe.model, policy)
    reward = build_reward(recipe.model, mesh, dtype=recipe.train.compute_dtype)
    prompts, length = recipe.ppo.prompts, recipe.data.sequence_length

    tokens_BT = _ids(recipe.train.batch_size, length, place=batch_sharding(policy))
    yield Pass(
        what="log-probabilities, by policy and reference",
        step=_wrapped(make_logprobs(policy)),
        models=(_params(policy, "float32"), _params(policy, policy.model.dtype)),
        ids=(tokens_BT,),
        calls=recipe.iteration_steps,
    )
    yield Pass(
        what="values, by the critic",
        step=_wrapped(make_values(critic)),
        models=(_params(critic, "float32"),),
        ids=(tokens_BT,),
        calls=recipe.iteration_steps,
    )
    rows = num_rows_for(reward, min(prompts, rows_at_once(reward)))
    longest = length_bucket(length, recipe.model.max_length)
    whole = reward.sharding()
    yield Pass(
        what="scores, by two reward models",
        step=_wrapped(make_scores(reward)),
        models=(_params(reward, reward.model.dtype),),
        ids=(_ids(rows, longest, place=whole), _ids(rows, place=whole)),
        calls=2 * -(-prompts // rows),
    )


def _wrapped(step: Callable[..., Any]) -> jax.stages.Wrapped:
    assert isinstance(step, jax.stages.Wrapped)
    return step


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


def _compiled(reads: Pass, topology: Topology, mesh: jax.sharding.Mesh) -> Reading:
    with jax.set_mesh(mesh):
        lowered = reads.lower()
    program = compile_for(topology, lowered)
    seconds = None
    if program.text:
        once = predict(program.text, topology, Placement.of(mesh)).step_seconds
        seconds = reads.calls * once
    return Reading(
        what=reads.what,
        working_bytes=program.peak - bytes_per_chip(reads.models),
        seconds=seconds,
    )
