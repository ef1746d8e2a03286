"""Planning PPO's passes over answers: those that read them, and the critic's steps.

The programs are those of a run, and while one of them runs all models stay where they
are. What it needs beside them is the compiler's; without libtpu nothing is said of it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.build import ShardedLlama, build_for
from llama_jax.config.recipe import PpoRecipe
from llama_jax.finetune.ppo import build_critic, critic_optimizer_config, make_programs
from llama_jax.finetune.reward import build_reward, make_scores, rows_at_once
from llama_jax.generate.rows import length_bucket, num_rows_for
from llama_jax.model.count import abstract_params
from llama_jax.planning import topology as tpu
from llama_jax.planning.compile import abstract_batch, bytes_per_chip, compile_for
from llama_jax.planning.schedule import Placement, predict
from llama_jax.planning.topology import Topology
from llama_jax.train.optimizer import make_optimizer
from llama_jax.train.state import abstract_state
from llama_jax.train.step import batch_sharding
from sharding import make_mesh
from sharding.axes import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassPlan:
    """A pass over all answers of an iteration, all as long as may be.

    Attributes:
      what: is done, and by which model.
      working_bytes: of a chip at the fullest moment, beside all models and optimizers.
      seconds: predicted; None where there is no program, as it does not fit.
    """

    what: str
    working_bytes: int
    seconds: float | None


class Pass(NamedTuple):
    """A program that goes over answers, before it is compiled.

    Attributes:
      what: see `PassPlan`.
      step: takes what is kept, then what is read.
      kept: models, or one with its optimizer, as shapes.
      read: of a call, likewise.
      calls: for all answers of an iteration.
    """

    what: str
    step: jax.stages.Wrapped
    kept: tuple[Any, ...]
    read: tuple[Any, ...]
    calls: int

    def lower(self) -> jax.stages.Lowered:
        """Inside `jax.set_mesh`, for the devices of that."""
        return self.step.lower(*self.kept, *self.read)


class Passes(NamedTuple):
    """Those of an iteration beside the policy's steps, models of the policy's sizes.

    Attributes:
      logprobs: policy and reference read them.
      values: the critic reads them.
      scores: both reward models read them.
      critic: learns from them.
    """

    logprobs: Pass
    values: Pass
    scores: Pass
    critic: Pass


def passes(recipe: PpoRecipe, mesh: jax.sharding.Mesh) -> Passes:
    """The programs that a run of the recipe compiles on this mesh."""
    policy = build_for(recipe, mesh)
    critic = build_critic(recipe.model, policy)
    reward = build_reward(recipe.model, mesh, dtype=recipe.train.compute_dtype)
    programs = make_programs(recipe, policy, critic)
    prompts, length = recipe.ppo.prompts, recipe.data.sequence_length
    tokens_BT = _ids(recipe.train.batch_size, length, place=batch_sharding(policy))
    rows = num_rows_for(reward, min(prompts, rows_at_once(reward)))
    longest = length_bucket(length, recipe.model.max_length)
    whole = reward.sharding()
    optimizer = make_optimizer(critic_optimizer_config(recipe), recipe.train.num_steps)
    return Passes(
        logprobs=Pass(
            what="log-probabilities, by policy and reference",
            step=_wrapped(programs.logprobs),
            kept=(_params(policy, "float32"), _params(policy, policy.model.dtype)),
            read=(tokens_BT,),
            calls=recipe.iteration_steps,
        ),
        values=Pass(
            what="values, by the critic",
            step=_wrapped(programs.values),
            kept=(_params(critic, "float32"),),
            read=(tokens_BT,),
            calls=recipe.iteration_steps,
        ),
        scores=Pass(
            what="scores, by two reward models",
            step=_wrapped(make_scores(reward)),
            kept=(_params(reward, reward.model.dtype),),
            read=(_ids(rows, longest, place=whole), _ids(rows, place=whole)),
            calls=2 * -(-prompts // rows),
        ),
        critic=Pass(
            what="the critic's steps",
            step=_wrapped(programs.critic_step),
            kept=(abstract_state(critic, optimizer),),
            read=(abstract_batch(recipe, critic),),
            calls=recipe.iteration_steps,
        ),
    )


def plan_passes(recipe: PpoRecipe, topology: Topology) -> tuple[PassPlan, ...]:
    """Compile what goes over answers beside the policy's steps, as `Passes` has it.

    Args:
      recipe: whose mesh has as many devices as the topology has chips.
      topology: the slice.

    Raises:
      PlanError: libtpu is missing or fails.
      ShardingError: mesh, model and topology do not divide.
    """
    mesh = make_mesh(recipe.mesh, tpu.devices(topology))
    return tuple(_compiled(each, topology, mesh) for each in passes(recipe, mesh))


def _compiled(each: Pass, topology: Topology, mesh: jax.sharding.Mesh) -> PassPlan:
    with jax.set_mesh(mesh):
        lowered = each.lower()
    program = compile_for(topology, lowered)
    seconds = None
    if program.text:
        once = predict(program.text, topology, Placement.of(mesh)).step_seconds
        seconds = each.calls * once
    return PassPlan(
        what=each.what,
        working_bytes=program.peak - bytes_per_chip(each.kept),
        seconds=seconds,
    )


def _wrapped(step: Any) -> jax.stages.Wrapped:
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
