"""What training makes small, from logits or, in chunks, from what they are made of.

B batch, T position, D model width, V vocabulary. A chunk is taken from the part of the
vocabulary on each device: V = P · C · v for P parts, C chunks and v pieces in each.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.errors import ConfigError
from llama_jax.model.transformer import Constrain, unconstrained
from sharding.axes import BATCH, EMBED, SEQUENCE, VOCAB


def next_token_loss(
    logits_BTV: Float[Array, "B T V"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sum of `surprise`, in nats; and the sum of weights.

    Their quotient is the mean over tokens. Both are returned, because a mean of means
    over parts with different numbers of tokens would be another number.
    """
    surprise_BT = surprise(logits_BTV, targets_BT)
    return jnp.sum(surprise_BT * weights_BT), jnp.sum(weights_BT)


def surprise(
    logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Of each target -log softmax(logits)[target], in nats."""
    normaliser_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # A comparison instead of a gather: it stays local where V is split over devices.
    vocab_V = jnp.arange(logits_BTV.shape[-1], dtype=targets_BT.dtype)
    hit_BTV = targets_BT[..., None] == vocab_V
    return normaliser_BT - jnp.sum(jnp.where(hit_BTV, logits_BTV, 0.0), axis=-1)


def chunked_surprise(
    hidden_BTD: Float[Array, "B T D"],
    kernel_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    *,
    chunks: int,
    parts: int = 1,
    constrain: Constrain = unconstrained,
) -> Float[Array, "B T"]:
    """`surprise` of hidden @ kernel, whose logits never exist whole.

    The backward pass computes each chunk's logits again. Products are of the hidden
    states' type, sums float32, as in `Unembed`.

    Args:
      hidden_BTD: the residual stream after the last norm.
      kernel_DV: what makes logits of it.
      targets_BT: the tokens to predict.
      chunks: C, how many chunks there are.
      parts: P, how many devices share the vocabulary.
      constrain: pins arrays to a mesh, see `sharding.constrain`.

    Raises:
      ConfigError: the vocabulary does not split into `parts` times `chunks`.
    """
    num_pieces = kernel_DV.shape[1]
    if num_pieces % (parts * chunks):
        fits = [n for n in range(1, 257) if num_pieces % (parts * n) == 0]
        raise ConfigError(
            f"train.loss_chunks {chunks} does not divide the {num_pieces} pieces of "
            f"the vocabulary over {parts} devices: choose it from {fits}."
        )
    kernel_DPCv = kernel_DV.reshape(kernel_DV.shape[0], parts, chunks, -1)
    return _surprise(hidden_BTD, kernel_DPCv, targets_BT, constrain)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _surprise(
    hidden_BTD: Float[Array, "B T D"],
    kernel_DPCv: Float[Array, "D P C v"],
    targets_BT: Int[Array, "B T"],
    constrain: Constrain,
) -> Float[Array, "B T"]:
    """Give -log softmax(hidden @ kernel)[target], nats."""
    return _forward(hidden_BTD, kernel_DPCv, targets_BT, constrain)[0]


_Residuals = tuple[Array, Array, Array, Array]


def _forward(
    hidden_BTD: Array, kernel_DPCv: Array, targets_BT: Array, constrain: Constrain
) -> tuple[Array, _Residuals]:
    def add(carry: tuple[Array, Array, Array], chunk: Array):
        largest_BT, sum_BT, target_BT = carry
        logits_BTPv, hit_BTPv, _ = _chunk(
            hidden_BTD, kernel_DPCv, targets_BT, chunk, constrain
        )
        new_BT = jnp.maximum(largest_BT, jnp.max(logits_BTPv, axis=(2, 3)))
        sum_BT *= jnp.exp(largest_BT - new_BT)
        sum_BT += jnp.sum(jnp.exp(logits_BTPv - new_BT[..., None, None]), axis=(2, 3))
        target_BT += jnp.sum(jnp.where(hit_BTPv, logits_BTPv, 0.0), axis=(2, 3))
        return (new_BT, sum_BT, target_BT), None

    zeros_BT = jnp.zeros(targets_BT.shape, jnp.float32)
    carry, _ = jax.lax.scan(
        add, (zeros_BT - jnp.inf, zeros_BT, zeros_BT), _chunks(kernel_DPCv)
    )
    largest_BT, sum_BT, target_BT = carry
    normaliser_BT = largest_BT + jnp.log(sum_BT)
    residuals = hidden_BTD, kernel_DPCv, targets_BT, normaliser_BT
    return normaliser_BT - target_BT, residuals


def _backward(
    constrain: Constrain, residuals: _Residuals, grad_BT: Array
) -> tuple[Array, Array, None]:
    hidden_BTD, kernel_DPCv, targets_BT, normaliser_BT = residuals
    product = _product(hidden_BTD.dtype)

    def add(carry: tuple[Array, Array], chunk: Array):
        grad_BTD, grad_DPCv = carry
        logits_BTPv, hit_BTPv, kernel_DPv = _chunk(
            hidden_BTD, kernel_DPCv, targets_BT, chunk, constrain
        )
        chances_BTPv = jnp.exp(logits_BTPv - normaliser_BT[..., None, None])
        grad_BTPv = (chances_BTPv - hit_BTPv) * grad_BT[..., None, None]
        grad_BTPv = grad_BTPv.astype(hidden_BTD.dtype)
        grad_BTD += constrain(
            product("BTPv,DPv->BTD", grad_BTPv, kernel_DPv), BATCH, SEQUENCE, None
        )
        grad_DPv = constrain(
            product("BTD,BTPv->DPv", hidden_BTD, grad_BTPv), EMBED, VOCAB, None
        )
        grad_DPCv = jax.lax.dynamic_update_index_in_dim(grad_DPCv, grad_DPv, chunk, 2)
        return (grad_BTD, grad_DPCv), None

    zeros = (
        jnp.zeros(hidden_BTD.shape, jnp.float32),
        constrain(jnp.zeros(kernel_DPCv.shape, jnp.float32), EMBED, VOCAB, None, None),
    )
    (grad_BTD, grad_DPCv), _ = jax.lax.scan(add, zeros, _chunks(kernel_DPCv))
    return (
        grad_BTD.astype(hidden_BTD.dtype),
        grad_DPCv.astype(kernel_DPCv.dtype),
        None,
    )


_surprise.defvjp(_forward, _backward)


def _chunks(kernel_DPCv: Array) -> Array:
    return jnp.arange(kernel_DPCv.shape[2], dtype=jnp.int32)


def _chunk(
    hidden_BTD: Array,
    kernel_DPCv: Array,
    targets_BT: Array,
    chunk: Array,
    constrain: Constrain,
) -> tuple[Array, Array, Array]:
    """A chunk's logits, where among them the targets are, and its kernel."""
    P, C, v = kernel_DPCv.shape[1:]
    kernel_DPv = jax.lax.dynamic_index_in_dim(kernel_DPCv, chunk, 2, keepdims=False)
    kernel_DPv = constrain(kernel_DPv.astype(hidden_BTD.dtype), None, VOCAB, None)
    logits_BTPv = constrain(
        _product(hidden_BTD.dtype)("BTD,DPv->BTPv", hidden_BTD, kernel_DPv),
        BATCH,
        SEQUENCE,
        VOCAB,
        None,
    )
    piece_Pv = (jnp.arange(P)[:, None] * C + chunk) * v + jnp.arange(v)
    return logits_BTPv, targets_BT[..., None, None] == piece_Pv, kernel_DPv


def _product(dtype: jnp.dtype) -> Callable[..., Array]:
    """An einsum that sums in float32, and takes float32 for what it says."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return functools.partial(
        jnp.einsum, precision=precision, preferred_element_type=jnp.float32
    )
