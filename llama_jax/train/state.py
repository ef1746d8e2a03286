"""Everything that a training step changes, as one pytree."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama_jax.build import ShardedLlama
from llama_jax.model.count import abstract_params
from sharding.axes import Tree

# An array; or its shape, or its layout, where the state is a tree of those.
Leaf = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters, optimizer and counts.

    Attributes:
      step: int32, steps done, skipped ones included.
      num_skipped: int32, steps whose update was not applied.
      params: float32 tree.
      opt_state: the optimizer's, shaped like the parameters twice over.
    """

    step: Leaf
    num_skipped: Leaf
    params: Tree
    opt_state: optax.OptState


def fresh_state(
    sharded: ShardedLlama,
    optimizer: optax.GradientTransformation,
    params: Tree,
) -> TrainState:
    """Step 0 with these parameters; the optimizer's arrays are born sharded."""
    with jax.set_mesh(sharded.mesh):
        make = jax.jit(
            lambda params: TrainState(
                jnp.int32(0), jnp.int32(0), params, optimizer.init(params)
            ),
            out_shardings=state_shardings(sharded, optimizer),
            donate_argnums=0,
        )
        return make(params)


def abstract_state(
    sharded: ShardedLlama, optimizer: optax.GradientTransformation
) -> TrainState:
    """Shapes, types and shardings of the state, without memory."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        _shapes(sharded, optimizer),
        state_shardings(sharded, optimizer),
    )


def to_items(state: TrainState) -> dict[str, Tree]:
    """The state in the two parts that a checkpoint keeps apart."""
    return {
        "params": state.params,
        "optimizer": {
            "step": state.step,
            "num_skipped": state.num_skipped,
            "opt_state": state.opt_state,
        },
    }


def from_items(items: Mapping[str, Tree]) -> TrainState:
    """The inverse of `to_items`."""
    return TrainState(params=items["params"], **items["optimizer"])


def state_shardings(
    sharded: ShardedLlama, optimizer: optax.GradientTransformation
) -> TrainState:
    """The layout of the state: the optimizer's moments lie as their parameters do."""
    everywhere = sharded.sharding()
    shapes = _shapes(sharded, optimizer)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer.init,
        lambda _, sharding: sharding,
        shapes.opt_state,
        sharded.param_shardings,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, everywhere, sharded.param_shardings, opt_state)


def _shapes(
    sharded: ShardedLlama, optimizer: optax.GradientTransformation
) -> TrainState:
    params = abstract_params(sharded.config, sharded.head)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(count, count, params, jax.eval_shape(optimizer.init, params))
