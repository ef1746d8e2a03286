"""One training step: pure, compiled once, with every layout pinned.

Gradients whose layout is left to inference can lose their split over `fsdp`, and then
each device holds them whole; so they are constrained, and the state's layout is fixed
on the way in and on the way out.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from llama_jax.build import ShardedLlama
from llama_jax.data.batch import AnyBatch
from llama_jax.train.compiler import compiler_options
from llama_jax.train.objective import NextToken, Objective
from llama_jax.train.state import TrainState, state_shardings
from sharding import axes, per_device
from sharding.axes import Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Measured:
    """What a step tells, all scalars on the device.

    Attributes:
      loss: mean over what the batch teaches, nats.
      grad_norm: global norm of the gradient, before clipping.
      learning_rate: of this step.
      num_targets: the tokens that are predicted, or the comparisons; of a weighted
        batch, the sum of its weights.
      applied: whether the update was good, and so was made.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    num_targets: Float[Array, ""]
    applied: Bool[Array, ""]


_NEXT_TOKEN = NextToken()

TrainStep = Callable[[TrainState, AnyBatch], tuple[TrainState, Measured]]
EvalStep = Callable[[Tree, AnyBatch], Mapping[str, Array]]


def batch_sharding(sharded: ShardedLlama) -> jax.sharding.NamedSharding:
    """The layout of a batch: rows split, and positions if the rules say so."""
    return sharded.sharding(axes.BATCH, axes.SEQUENCE)


def make_train_step(
    sharded: ShardedLlama,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulate: int,
    spike_norm: float | None,
    objective: Objective = _NEXT_TOKEN,
) -> TrainStep:
    """The compiled step. It consumes the state it is given (donation).

    Args:
      sharded: the model on its mesh.
      optimizer: from `make_optimizer`.
      schedule: the learning rate it uses, for the record.
      accumulate: parts of the batch that are worked off one after the other.
      spike_norm: gradient norm above which an update is not applied; one that is not
        finite never is.
      objective: what is made small.
    """

    def step(state: TrainState, batch: AnyBatch) -> tuple[TrainState, Measured]:
        loss_sum, weight_sum, grads = _loss_and_grads(
            sharded, objective, state.params, batch, accumulate
        )
        with jax.named_scope("optimizer"):
            # All tokens masked gives loss 0 and no gradient, not 0 / 0.
            scale = 1.0 / jnp.maximum(weight_sum, 1.0)
            loss = loss_sum * scale
            grads = jax.tree.map(lambda g: g * scale, grads)
            grad_norm = optax.tree.norm(grads)
            good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            if spike_norm is not None:
                good &= grad_norm <= spike_norm
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(good, new, old),
                (params, opt_state),
                (state.params, state.opt_state),
            )
        measured = Measured(
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=jnp.float32(schedule(state.step - state.num_skipped)),
            num_targets=weight_sum,
            applied=good,
        )
        state = TrainState(
            step=state.step + 1,
            num_skipped=state.num_skipped + (1 - good.astype(jnp.int32)),
            params=params,
            opt_state=opt_state,
        )
        return state, measured

    layout = state_shardings(sharded, optimizer)
    return jax.jit(
        step,
        in_shardings=(layout, batch_sharding(sharded)),
        out_shardings=(layout, sharded.sharding()),
        donate_argnums=0,
        compiler_options=compiler_options(sharded.mesh),
    )


def make_eval_step(
    sharded: ShardedLlama, objective: Objective = _NEXT_TOKEN
) -> EvalStep:
    """Compiled: what the objective measures of one batch, sums all of them."""
    return jax.jit(
        lambda params, batch: objective.measure(sharded, params, batch),
        in_shardings=(sharded.param_shardings, batch_sharding(sharded)),
        out_shardings=sharded.sharding(),
        compiler_options=compiler_options(sharded.mesh),
    )


# Summed loss, summed weights, and the gradient of the summed loss.
_Sums = tuple[Array, Array, Tree]


def _loss_and_grads(
    sharded: ShardedLlama,
    objective: Objective,
    params: Tree,
    batch: AnyBatch,
    accumulate: int,
) -> _Sums:
    """The sums over the whole batch.

    Each replica works through its own rows, part by part, and only then are the sums
    of replicas added: over the slow network between slices gradients go once a step.
    Within a replica the compiler splits the work, and scatters each part's gradients.
    """

    def replica(params: Tree, batch: AnyBatch) -> _Sums:
        sums = _accumulated(sharded, objective, params, batch, accumulate)
        return jax.lax.psum(sums, axes.DATA)

    if sharded.mesh.shape[axes.DATA] == 1:
        return _accumulated(sharded, objective, params, batch, accumulate)
    whole, rows = jax.P(), jax.P(axes.DATA)
    specs = (jax.tree.map(lambda _: whole, params), jax.tree.map(lambda _: rows, batch))
    out = (whole, whole, specs[0])
    return per_device(replica, sharded.mesh, specs, out, axes=(axes.DATA,))(
        params, batch
    )


def _accumulated(
    sharded: ShardedLlama,
    objective: Objective,
    params: Tree,
    batch: AnyBatch,
    accumulate: int,
) -> _Sums:
    specs = jax.tree.map(lambda sharding: sharding.spec, sharded.param_shardings)

    def part(params: Tree, batch: AnyBatch) -> _Sums:
        (loss_sum, weight_sum), grads = jax.value_and_grad(
            lambda params: objective.loss(sharded, params, batch), has_aux=True
        )(params)
        return loss_sum, weight_sum, jax.lax.with_sharding_constraint(grads, specs)

    if accumulate == 1:
        return part(params, batch)

    def add(total: _Sums, batch: AnyBatch) -> tuple[_Sums, None]:
        return jax.tree.map(jnp.add, total, part(params, batch)), None

    zeros = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zeros, _split(batch, accumulate))[0]


def _split(batch: AnyBatch, parts: int) -> AnyBatch:
    """[B, T] arrays as [parts, B / parts, T], row by row in turn.

    Taking every `parts`-th row leaves each row on the device where it is.
    """
    return jax.tree.map(
        lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )
