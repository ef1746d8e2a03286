"""What a model thinks of tokens that are given: logits and log-probabilities.

Shape suffixes: B batch, T position, t = T - 1, D model width, V vocabulary.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax.build import ShardedLlama
from llama_jax.generate.rows import padded
from llama_jax.model import Llama
from sharding.axes import Tree

# Positions whose logits exist at one time: all of them would outweigh the model.
_POSITIONS = 128


def logits(
    sharded: ShardedLlama, params: Tree, rows: Sequence[Sequence[int]]
) -> Float[np.ndarray, "B T V"]:
    """Logits of the token after each; behind the end of a row they mean nothing."""
    with jax.set_mesh(sharded.mesh):
        logits_BTV = _logits(sharded.model, params, padded(sharded, rows))
    return np.asarray(logits_BTV)[: len(rows), : max(map(len, rows))]


def token_logprobs(
    sharded: ShardedLlama, params: Tree, rows: Sequence[Sequence[int]]
) -> list[list[float]]:
    """The log-probability of each token of each row but its first."""
    with jax.set_mesh(sharded.mesh):
        logprob_Bt = _token_logprobs(sharded.model, params, padded(sharded, rows))
    return [
        logprob_t[: len(ids) - 1].tolist()
        for logprob_t, ids in zip(np.asarray(logprob_Bt), rows, strict=False)
    ]


# What leaves these programs is whole on every device, so that every host can read it.


@functools.partial(jax.jit, static_argnames="model")
def _logits(
    model: Llama, params: Tree, tokens_BT: Int[Array, "B T"]
) -> Float[Array, "B T V"]:
    logits_BTV = model.bind({"params": params})(tokens_BT)
    return model.constrain(logits_BTV, None, None, None)


@functools.partial(jax.jit, static_argnames="model")
def _token_logprobs(
    model: Llama, params: Tree, tokens_BT: Int[Array, "B T"]
) -> Float[Array, "B t"]:
    x_BTD = model.bind({"params": params}).hidden(tokens_BT)

    def logprob(position: tuple[Array, Array]) -> Float[Array, " B"]:
        x_BD, next_B = position
        logits_BTV = model.bind({"params": params}).unembed(x_BD[:, None])
        logprobs_BV = jax.nn.log_softmax(logits_BTV[:, 0])
        return jnp.take_along_axis(logprobs_BV, next_B[:, None], axis=1)[:, 0]

    by_position = (x_BTD[:, :-1].swapaxes(0, 1), tokens_BT[:, 1:].T)
    logprob_tB = jax.lax.map(logprob, by_position, batch_size=_POSITIONS)
    return model.constrain(logprob_tB.T, None, None)
