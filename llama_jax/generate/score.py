"""What a model makes of tokens that are given: logits, log-probabilities, attention.

Shape suffixes: L layers, B batch, N query heads, T position, t = T - 1, D model width,
V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from llama_jax.generate.engine import Engine
from llama_jax.generate.rows import length_bucket, num_rows_for, padded
from llama_jax.model.decoder import Decoder, Weights

# Positions whose logits exist at one time: all of them would outweigh the model.
_POSITIONS = 128


def logits(engine: Engine, rows: Sequence[Sequence[int]]) -> Float[np.ndarray, "B T V"]:
    """Logits of the token after each; behind the end of a row they mean nothing."""
    logits_BTV = _run(engine, _logits, rows)
    return np.asarray(logits_BTV)[: len(rows), : max(map(len, rows))]


def token_logprobs(engine: Engine, rows: Sequence[Sequence[int]]) -> list[list[float]]:
    """The log-probability of each token of each row but its first."""
    logprob_Bt = _run(engine, _token_logprobs, rows)
    return [
        logprob_t[: len(ids) - 1].tolist()
        for logprob_t, ids in zip(np.asarray(logprob_Bt), rows, strict=False)
    ]


def attention(engine: Engine, ids: Sequence[int]) -> Float[np.ndarray, "L N T T"]:
    """How much each position of a row attends to each, by layer and query head."""
    weights_LNTT = np.asarray(_run(engine, _attention, [ids]))
    return weights_LNTT[:, :, : len(ids), : len(ids)]


def strongest_attention(engine: Engine, ids: Sequence[int]) -> Float[np.ndarray, "T T"]:
    """The highest `attention` of all layers and heads: all of it that is read back."""
    weights_TT = np.asarray(_run(engine, _strongest_attention, [ids]))
    return weights_TT[: len(ids), : len(ids)]


def _run(
    engine: Engine,
    program: Callable[[Decoder, Weights, ArrayLike], Array],
    rows: Sequence[Sequence[int]],
) -> Array:
    length = length_bucket(max(map(len, rows)), engine.sharded.config.max_length)
    tokens = padded(rows, num_rows_for(engine.sharded, len(rows)), length)
    with jax.set_mesh(engine.sharded.mesh):
        return program(engine.decoder, engine.weights, tokens)


# What leaves these programs is whole on every device, so that every host can read it.


@functools.partial(jax.jit, static_argnames="decoder")
def _logits(
    decoder: Decoder, weights: Weights, tokens_BT: Int[Array, "B T"]
) -> Float[Array, "B T V"]:
    logits_BTV = decoder.unembed(weights, decoder.hidden(weights, tokens_BT))
    return decoder.constrain(logits_BTV, None, None, None)


@functools.partial(jax.jit, static_argnames="decoder")
def _token_logprobs(
    decoder: Decoder, weights: Weights, tokens_BT: Int[Array, "B T"]
) -> Float[Array, "B t"]:
    x_BTD = decoder.hidden(weights, tokens_BT)

    def logprob(position: tuple[Array, Array]) -> Float[Array, " B"]:
        x_BD, next_B = position
        logits_BTV = decoder.unembed(weights, x_BD[:, None])
        logprobs_BV = jax.nn.log_softmax(logits_BTV[:, 0])
        return jnp.take_along_axis(logprobs_BV, next_B[:, None], axis=1)[:, 0]

    by_position = (x_BTD[:, :-1].swapaxes(0, 1), tokens_BT[:, 1:].T)
    logprob_tB = jax.lax.map(logprob, by_position, batch_size=_POSITIONS)
    return decoder.constrain(logprob_tB.T, None, None)


@functools.partial(jax.jit, static_argnames="decoder")
def _attention(
    decoder: Decoder, weights: Weights, tokens_BT: Int[Array, "1 T"]
) -> Float[Array, "L N T T"]:
    layers = decoder.attention(weights, tokens_BT)
    weights_LNTT = jnp.concatenate([layer[:1] for layer in layers])
    return decoder.constrain(weights_LNTT, None, None, None, None)


@functools.partial(jax.jit, static_argnames="decoder")
def _strongest_attention(
    decoder: Decoder, weights: Weights, tokens_BT: Int[Array, "1 T"]
) -> Float[Array, "T T"]:
    layers = decoder.attention(weights, tokens_BT)
    of_each = (jnp.max(layer[0], axis=0) for layer in layers)
    return decoder.constrain(functools.reduce(jnp.maximum, of_each), None, None)
