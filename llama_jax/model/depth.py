"""Through the depth: one compiled block, scanned over stacked parameters.

What is recomputed in the backward pass is chosen by name here; the parameters are the
same tree whatever the choice.
"""

from collections.abc import Callable
from typing import Any, TypeVar, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from llama_jax.config.train import Remat
from llama_jax.errors import ConfigError
from sharding.axes import Tree

Carry = TypeVar("Carry")

# Names given with `checkpoint_name` in layers.py and transformer.py.
_PROJECTIONS = ("query", "key", "value", "attention", "out", "gate", "up")


def run(
    block: Callable[[Tree, Carry, Int[Array, ""]], Carry],
    stacked: Tree,
    carry: Carry,
    *,
    remat: Remat,
) -> Carry:
    """`carry` after every block, from first to last.

    Args:
      block: `block(params, carry, layer)`, one layer.
      stacked: parameters of all layers, stacked on their first axis.
      carry: what flows through the depth: the residual stream, and a cache if any.
      remat: what the backward pass finds saved: "none" recomputes nothing;
        "projections" keeps every matrix product but the feed-forward's last;
        "attention" only what attention gives; "full" only the residual stream.
    """
    num_layers = jax.tree.leaves(stacked)[0].shape[0]

    def body(carry: Carry, layer: tuple[Tree, Array]) -> tuple[Carry, None]:
        params, index = layer
        return block(params, carry, index), None

    layers = (stacked, jnp.arange(num_layers, dtype=jnp.int32))
    return jax.lax.scan(_rematerialised(body, remat), carry, layers)[0]


def _rematerialised(body: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    if remat == "none":
        return body
    save = jax.checkpoint_policies
    policies = {
        "projections": save.save_only_these_names(*_PROJECTIONS),
        "attention": save.save_only_these_names("attention"),
        "full": save.nothing_saveable,
    }
    if remat not in policies:
        raise ConfigError(f"remat {remat!r} is unknown: use {get_args(Remat)}.")
    # Within a scan no optimisation can undo the recomputation, so none is forbidden.
    return jax.checkpoint(body, policy=policies[remat], prevent_cse=False)
