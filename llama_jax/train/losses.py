"""What training makes small. B batch, T position, V vocabulary."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def next_token_loss(
    logits_BTV: Float[Array, "B T V"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sum of -log softmax(logits)[target], in nats; and the sum of weights.

    Their quotient is the mean over tokens. Both are returned, because a mean of means
    over parts with different numbers of tokens would be another number.
    """
    normaliser_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # A comparison instead of a gather: it stays local where V is split over devices.
    vocab_V = jnp.arange(logits_BTV.shape[-1], dtype=targets_BT.dtype)
    hit_BTV = targets_BT[..., None] == vocab_V
    target_BT = jnp.sum(jnp.where(hit_BTV, logits_BTV, 0.0), axis=-1)
    return jnp.sum((normaliser_BT - target_BT) * weights_BT), jnp.sum(weights_BT)
