"""Through the depth: one compiled block, scanned over stacked parameters.

What is recomputed in the backward pass is chosen by name here; the parameters are the
same tree whatever the choice.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from llama_jax.config.train import Remat, remat_pieces
from llama_jax.errors import ConfigError
from sharding.axes import Tree

Carry = TypeVar("Carry")

# Names given with `checkpoint_name` in layers.py, transformer.py and flash.py.
_ATTENTION_BLOCK = ("query", "key", "value", "attention", "out")
_PROJECTIONS = (*_ATTENTION_BLOCK, "gate", "up")


def run(
    block: Callable[[Tree, Carry], Carry],
    stacked: Tree,
    carry: Carry,
    *,
    remat: str,
) -> Carry:
    """`carry` after every block, from first to last.

    Args:
      block: `block(params, carry)`, one layer.
      stacked: parameters of all layers, stacked on their first axis.
      carry: what flows through the depth: the residual stream.
      remat: what the backward pass finds saved: "none" recomputes nothing;
        "projections" keeps every matrix product but the feed-forward's last;
        "attention_block" those of attention alone; "attention" only what the kernel
        gives; "full" only the residual stream; "offload" is "attention_block", kept
        in the host's memory. "projections:30,full" changes after 30 layers.

    Raises:
      ConfigError: `remat` names more layers than there are.
    """
    num_layers = jax.tree.leaves(stacked)[0].shape[0]

    def body(carry: Carry, params: Tree) -> tuple[Carry, None]:
        return block(params, carry), None

    start = 0
    for policy, stop in _stops(remat, num_layers):
        # One scan for all layers takes the parameters as they are, without a slice.
        part = stacked
        if (start, stop) != (0, num_layers):
            part = jax.tree.map(
                lambda leaf, a=start, b=stop: jax.lax.slice_in_dim(leaf, a, b), stacked
            )
        carry = jax.lax.scan(_rematerialised(body, policy), carry, part)[0]
        start = stop
    return carry


def _stops(remat: str, num_layers: int) -> list[tuple[Remat, int]]:
    """Each policy, and the layer before which it ends."""
    stops: list[tuple[Remat, int]] = []
    start = 0
    for policy, count in remat_pieces(remat):
        stop = num_layers if count is None else start + count
        if stop > num_layers or stop == start:
            raise ConfigError(
                f"remat {remat!r} names {start + (count or 0)} layers before its last "
                f"policy, and the model has {num_layers}: leave it at least one."
            )
        stops.append((policy, stop))
        start = stop
    return stops


def _rematerialised(body: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    if remat == "none":
        return body
    save = jax.checkpoint_policies
    policies: dict[Remat, Callable[..., Any]] = {
        "projections": save.save_only_these_names(*_PROJECTIONS),
        "attention_block": save.save_only_these_names(*_ATTENTION_BLOCK),
        "attention": save.save_only_these_names("attention"),
        "full": save.nothing_saveable,
        "offload": save.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(_ATTENTION_BLOCK),
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
    # Within a scan no optimisation can undo the recomputation, so none is forbidden.
    return jax.checkpoint(body, policy=policies[remat], prevent_cse=False)
