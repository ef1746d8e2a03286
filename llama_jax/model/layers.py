"""The arithmetic of a Llama block, as pure functions of arrays.

No parameters, no mesh, no Flax: `transformer.py` owns those. Shape suffixes, one
letter per axis in order: B batch, T query position, S key position, D model width,
N query heads, K key/value heads, G = N / K, H head width, h = H / 2, F feed-forward
width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llama_jax.model.mask import Mask

# Finite, so that a row with every key masked gives a uniform average, not NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def written(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """`x`, and its gradient, written to memory before anything reads it.

    Left alone, the TPU compiler does elementwise work inside the matrix product beside
    it, again for every tile; between products it costs less (docs/adr/0008).
    """
    return jax.lax.optimization_barrier(x)


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
    H = x_BTNH.shape[-1]
    cos, sin = jnp.cos(angle_BTh)[:, :, None], jnp.sin(angle_BTh)[:, :, None]
    cos_BT1H = jnp.concatenate([cos, cos], axis=-1)
    sin_BT1H = jnp.concatenate([-sin, sin], axis=-1)
    # Halves change places in a product with a permutation, which is exact and runs in
    # the matrix unit; as a split and a join it would be a shuffle of half registers.
    swap_HH = jnp.roll(jnp.eye(H, dtype=x_BTNH.dtype), H // 2, axis=0)
    swapped_BTNH = jnp.einsum(
        "BTNH,HI->BTNI", x_BTNH, swap_HH, preferred_element_type=jnp.float32
    )
    rotated_BTNH = x_BTNH.astype(jnp.float32) * cos_BT1H + swapped_BTNH * sin_BT1H
    return rotated_BTNH.astype(x_BTNH.dtype)


def attention_weights(
    q_BTNH: Float[Array, "B T N H"], k_BSKH: Float[Array, "B S K H"], mask: Mask
) -> tuple[Float[Array, "B K G T S"], Float[Array, "B K G T"]]:
    """Probabilities of each key, and the log of their normaliser, both float32.

    Query head n reads key head n // G: heads are grouped by a reshape, so no key is
    ever repeated (arXiv 2305.13245).
    """
    head_dim = q_BTNH.shape[-1]
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS",
        _grouped(q_BTNH, k_BSKH),
        k_BSKH,
        preferred_element_type=jnp.float32,
    )
    allowed_BTS = mask.allowed()
    scores_BKGTS = jnp.where(
        allowed_BTS[:, None, None], scores_BKGTS * head_dim**-0.5, MASKED
    )
    # Not exp(scores - normaliser): beside MASKED the normaliser's log would be lost.
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    return weights_BKGTS, jax.nn.logsumexp(scores_BKGTS, axis=-1)


def _grouped(x_BTNH: Array, k_BSKH: Array) -> Array:
    """Query heads by the key head they read: [B, T, K, G, H]."""
    return x_BTNH.reshape(*x_BTNH.shape[:2], k_BSKH.shape[2], -1, x_BTNH.shape[-1])


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / sqrt(H)) v over the keys that `mask` allows; softmax in float32.

    The signature that every attention kernel of this project has. Its backward pass
    makes the probabilities again, instead of keeping those of every layer.
    """
    return checkpoint_name(_attend(q_BTNH, k_BSKH, v_BSKH, mask), "attention")


@jax.custom_vjp
def _attend(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: Mask) -> Array:
    return _attend_forward(q_BTNH, k_BSKH, v_BSKH, mask)[0]


_AttendResiduals = tuple[Array, Array, Array, Mask, Array, Array]


def _attend_forward(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: Mask
) -> tuple[Array, _AttendResiduals]:
    weights_BKGTS, normaliser_BKGT = attention_weights(q_BTNH, k_BSKH, mask)
    out_BTKGH = jnp.einsum(
        "BKGTS,BSKH->BTKGH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH
    )
    out_BTNH = out_BTKGH.reshape(q_BTNH.shape)
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, mask, out_BTNH, normaliser_BKGT)


def _attend_backward(
    residuals: _AttendResiduals, grad_BTNH: Array
) -> tuple[Array, Array, Array, None]:
    """The gradient of softmax by its row sums, grad · out (arXiv 2205.14135, B.2)."""
    q_BTNH, k_BSKH, v_BSKH, mask, out_BTNH, normaliser_BKGT = residuals
    product = functools.partial(
        jnp.einsum,
        precision=_precision(q_BTNH.dtype),
        preferred_element_type=jnp.float32,
    )
    scale = q_BTNH.shape[-1] ** -0.5
    q_BTKGH, grad_BTKGH = _grouped(q_BTNH, k_BSKH), _grouped(grad_BTNH, k_BSKH)
    scores_BKGTS = scale * product("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH)
    weights_BKGTS = jnp.where(
        mask.allowed()[:, None, None],
        jnp.exp(scores_BKGTS - normaliser_BKGT[..., None]),
        0.0,
    )
    row_BTKG = jnp.sum(
        (grad_BTNH.astype(jnp.float32) * out_BTNH).reshape(q_BTKGH.shape), axis=-1
    )
    grad_BKGTS = product("BTKGH,BSKH->BKGTS", grad_BTKGH, v_BSKH)
    grad_BKGTS -= jnp.moveaxis(row_BTKG, 1, -1)[..., None]
    grad_BKGTS = (scale * weights_BKGTS * grad_BKGTS).astype(q_BTNH.dtype)
    weights_BKGTS = weights_BKGTS.astype(v_BSKH.dtype)
    q_grad = product("BKGTS,BSKH->BTKGH", grad_BKGTS, k_BSKH).reshape(q_BTNH.shape)
    k_grad = product("BTKGH,BKGTS->BSKH", q_BTKGH, grad_BKGTS)
    v_grad = product("BTKGH,BKGTS->BSKH", grad_BTKGH, weights_BKGTS)
    return (
        q_grad.astype(q_BTNH.dtype),
        k_grad.astype(k_BSKH.dtype),
        v_grad.astype(v_BSKH.dtype),
        None,
    )


_attend.defvjp(_attend_forward, _attend_backward)


def _precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 means float32, in a backward pass too: see `transformer.py`."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


@jax.custom_vjp
def project(
    x_BTD: Float[Array, "B T D"], kernel_DF: Float[Array, "D F"]
) -> Float[Array, "B T F"]:
    """Give x kernel, and take the kernel's gradient as xᵀ g.

    JAX takes it as (gᵀ x)ᵀ, and the CPU compiler then computes g a second time, with
    all the elementwise work that leads to it, column by column.
    """
    return jnp.einsum("BTD,DF->BTF", x_BTD, kernel_DF)


def _project_forward(x_BTD: Array, kernel_DF: Array) -> tuple[Array, tuple[Array, ...]]:
    return project(x_BTD, kernel_DF), (x_BTD, kernel_DF)


def _project_backward(
    residuals: tuple[Array, ...], grad_BTF: Array
) -> tuple[Array, Array]:
    x_BTD, kernel_DF = residuals
    product = functools.partial(jnp.einsum, precision=_precision(x_BTD.dtype))
    return (
        product("BTF,DF->BTD", grad_BTF, kernel_DF),
        product("BTD,BTF->DF", x_BTD, grad_BTF),
    )


project.defvjp(_project_forward, _project_backward)


def swiglu(
    x_BTD: Float[Array, "B T D"],
    gate_DF: Float[Array, "D F"],
    up_DF: Float[Array, "D F"],
    down_FD: Float[Array, "F D"],
) -> Float[Array, "B T D"]:
    """(silu(x gate) * (x up)) down (arXiv 2002.05202, eq. 6)."""
    gate_BTF = checkpoint_name(project(x_BTD, gate_DF), "gate")
    up_BTF = checkpoint_name(project(x_BTD, up_DF), "up")
    gate_BTF, up_BTF = written(gate_BTF), written(up_BTF)
    inner_BTF = written(jax.nn.silu(gate_BTF) * up_BTF)
    return jnp.einsum("BTF,FD->BTD", inner_BTF, down_FD)
