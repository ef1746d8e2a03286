"""The arithmetic of a Llama block, as pure functions of arrays.

No parameters, no mesh, no Flax: `transformer.py` owns those. Shape suffixes, one
letter per axis in order: B batch, T query position, S key position, D model width,
N query heads, K key/value heads, G = N / K, H head width, h = H / 2, F feed-forward
width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llama_jax.model.mask import Mask

# Finite, so that a row with every key masked gives a uniform average, not NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def rms_norm(
    x: Float[Array, "*B D"], scale_D: Float[Array, " D"], *, eps: float
) -> Float[Array, "*B D"]:
    """Give x / sqrt(mean(x²) + eps) · scale, the quotient in float32.

    Source: arXiv 1910.07467.
    """
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * inverse).astype(x.dtype) * scale_D.astype(x.dtype)


def rotary_angles(
    positions_BT: Int[Array, "B T"], *, head_dim: int, theta: float
) -> Float[Array, "B T h"]:
    """The angle of each feature pair at each position (arXiv 2104.09864, eq. 15).

    Pair i turns by position · theta^(-2i / H). In float32, since bfloat16 has no 257.
    """
    inverse_h = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return positions_BT[..., None].astype(jnp.float32) * jnp.asarray(
        inverse_h, jnp.float32
    )


def rotate(
    x_BTNH: Float[Array, "B T N H"], angle_BTh: Float[Array, "B T h"]
) -> Float[Array, "B T N H"]:
    """Rotate each feature pair (i, i + h), which Meta pairs otherwise: see rope.py."""
    cos, sin = jnp.cos(angle_BTh)[:, :, None], jnp.sin(angle_BTh)[:, :, None]
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated_BTNH = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated_BTNH.astype(x_BTNH.dtype)


def attention_weights(
    q_BTNH: Float[Array, "B T N H"], k_BSKH: Float[Array, "B S K H"], mask: Mask
) -> tuple[Float[Array, "B K G T S"], Float[Array, "B K G T"]]:
    """Probabilities of each key, and the log of their normaliser, both float32.

    Query head n reads key head n // G: heads are grouped by a reshape, so no key is
    ever repeated (arXiv 2305.13245).
    """
    num_kv_heads, head_dim = k_BSKH.shape[2:]
    q_BTKGH = q_BTNH.reshape(*q_BTNH.shape[:2], num_kv_heads, -1, head_dim)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    allowed_BTS = mask.allowed()
    scores_BKGTS = jnp.where(
        allowed_BTS[:, None, None], scores_BKGTS * head_dim**-0.5, MASKED
    )
    # Not exp(scores - normaliser): beside MASKED the normaliser's log would be lost.
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    return weights_BKGTS, jax.nn.logsumexp(scores_BKGTS, axis=-1)


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / sqrt(H)) v over the keys that `mask` allows; softmax in float32.

    The signature that every attention kernel of this project has.
    """
    weights_BKGTS, _ = attention_weights(q_BTNH, k_BSKH, mask)
    out_BTKGH = jnp.einsum(
        "BKGTS,BSKH->BTKGH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH
    )
    return out_BTKGH.reshape(q_BTNH.shape)


def swiglu(
    x_BTD: Float[Array, "B T D"],
    gate_DF: Float[Array, "D F"],
    up_DF: Float[Array, "D F"],
    down_FD: Float[Array, "F D"],
) -> Float[Array, "B T D"]:
    """(silu(x gate) * (x up)) down (arXiv 2002.05202, eq. 6)."""
    gate_BTF = checkpoint_name(jnp.einsum("BTD,DF->BTF", x_BTD, gate_DF), "gate")
    up_BTF = checkpoint_name(jnp.einsum("BTD,DF->BTF", x_BTD, up_DF), "up")
    return jnp.einsum("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, down_FD)
