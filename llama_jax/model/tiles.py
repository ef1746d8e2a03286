"""Attention tile by tile: what is in memory is one tile of scores, never T x S.

The softmax is kept running: each tile of keys adds to a weighted sum, and rescales it
when a larger score comes (arXiv 1805.02867, 2205.14135). The backward pass computes a
tile's probabilities again from the log of the normaliser. Tiles in which nothing is
allowed are skipped. Any device runs this; TPUs have a kernel of their own for whole
rows (`flash.py`), and `ring.py` takes from here what one device does at each step.
Shape suffixes as in `layers.py`, heads before positions, and t, s: positions in a tile.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llama_jax.model.int8 import Numbers, Quantized
from llama_jax.model.layers import MASKED
from llama_jax.model.mask import Mask

# What `jax.checkpoint` knows the result and its log-normaliser by.
SAVED = "attention"

# Least positions in a tile of queries or keys.
TILE = 512


class Running(NamedTuple):
    """A softmax over keys that are still coming, float32.

    Attributes:
      out_BKGTH: sum of exp(score - peak) times value.
      total_BKGT: sum of exp(score - peak).
      peak_BKGT: the largest score so far.
    """

    out_BKGTH: Float[Array, "B K G T H"]
    total_BKGT: Float[Array, "B K G T"]
    peak_BKGT: Float[Array, "B K G T"]


# The place, and the document if any, of each query or key.
_Where = tuple[Int[Array, "B T"], Int[Array, "B T"] | None]


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    *,
    tile: int = TILE,
) -> Float[Array, "B T N H"]:
    """`layers.attend`, in tiles of at least `tile` positions.

    Every query must be allowed a key, as itself.
    """
    k_BKSH, v_BKSH = by_head(k_BSKH), by_head(v_BSKH)
    q_BKGTH = grouped(q_BTNH, k_BKSH.shape[1])
    return ungrouped(_attend(tile, q_BKGTH, k_BKSH, v_BKSH, mask))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tile: int, q: Array, k: Array, v: Array, mask: Mask) -> Array:
    return _attend_forward(tile, q, k, v, mask)[0]


def _attend_forward(
    tile: int, q: Array, k: Array, v: Array, mask: Mask
) -> tuple[Array, Any]:
    running = add(begin(q), q, k, v, mask, tile=tile)
    out, lse = (checkpoint_name(x, SAVED) for x in finish(running, q.dtype))
    return out, (q, k, v, mask, out, lse)


def _attend_backward(tile: int, saved: Any, d_out: Array) -> tuple[Any, ...]:
    q, k, v, mask, out, lse = saved
    grads = gradients(q, k, v, mask, lse, d_out, inner(out, d_out), tile=tile)
    return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None


_attend.defvjp(_attend_forward, _attend_backward)


def by_head(x_BSKH: Float[Array, "B S K H"]) -> Float[Array, "B K S H"]:
    """Heads before positions, and back."""
    return x_BSKH.swapaxes(1, 2)


def grouped(
    q_BTNH: Float[Array, "B T N H"], num_kv_heads: int
) -> Float[Array, "B K G T H"]:
    """Query heads by the key head that they read."""
    B, T, _, H = q_BTNH.shape
    return q_BTNH.reshape(B, T, num_kv_heads, -1, H).transpose(0, 2, 3, 1, 4)


def ungrouped(out_BKGTH: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    """What `grouped` took apart."""
    B, _, _, T, H = out_BKGTH.shape
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, -1, H)


def begin(q_BKGTH: Float[Array, "B K G T H"]) -> Running:
    """Before any key."""
    out_BKGTH = jnp.zeros_like(q_BKGTH, jnp.float32)
    total_BKGT = out_BKGTH[..., 0]
    return Running(out_BKGTH, total_BKGT, jnp.full_like(total_BKGT, MASKED))


def add(
    running: Running,
    q_BKGTH: Float[Array, "B K G T H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    mask: Mask,
    *,
    tile: int,
) -> Running:
    """With S more keys."""
    keys = _tiles((k_BKSH, v_BKSH), tile), _rows(_key_side(mask), tile)

    def queries(_: None, part: tuple[Running, Array, _Where]) -> tuple[None, Running]:
        running, q, at = part

        def more(running: Running, keys: tuple[Any, _Where]) -> tuple[Running, None]:
            (k, v), key_at = keys
            here = _mask(at, key_at)
            return jax.lax.cond(
                here.may_allow(),
                lambda: add_tile(running, q, k, v, here),
                lambda: running,
            ), None

        return None, jax.lax.scan(more, running, keys)[0]

    parts = (
        Running(
            _tiles(running.out_BKGTH, tile),
            *(_tiles(x, tile, dim=-1) for x in (running.total_BKGT, running.peak_BKGT)),
        ),
        _tiles(q_BKGTH, tile),
        _rows(_query_side(mask), tile),
    )
    _, done = jax.lax.scan(queries, None, parts)
    return Running(
        _joined(done.out_BKGTH),
        _joined(done.total_BKGT, dim=-1),
        _joined(done.peak_BKGT, dim=-1),
    )


def finish(
    running: Running, dtype: jnp.dtype
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T"]]:
    """After the last key: the mean of values, and the log of the normaliser."""
    out_BKGTH = running.out_BKGTH / running.total_BKGT[..., None]
    return out_BKGTH.astype(dtype), running.peak_BKGT + jnp.log(running.total_BKGT)


def inner(out: Float[Array, "*B H"], d_out: Float[Array, "*B H"]) -> Float[Array, "*B"]:
    """Of the result and its gradient: what each score's gradient is measured from."""
    return jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)


def gradients(
    q_BKGTH: Float[Array, "B K G T H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    mask: Mask,
    lse_BKGT: Float[Array, "B K G T"],
    d_out_BKGTH: Float[Array, "B K G T H"],
    inner_BKGT: Float[Array, "B K G T"],
    *,
    tile: int,
) -> tuple[Array, Array, Array]:
    """What these S keys contribute to the gradients of q, k and v, float32.

    Args:
      q_BKGTH: as in the forward pass, with `k_BKSH`, `v_BKSH` and `mask`.
      k_BKSH: keys; these may be some of those that the softmax was over.
      v_BKSH: their values.
      mask: which of them each query saw.
      lse_BKGT: the log-normaliser over all keys.
      d_out_BKGTH: the gradient of the result.
      inner_BKGT: `inner` of result and gradient.
      tile: least positions in a tile.
    """
    keys = _tiles((k_BKSH, v_BKSH), tile), _rows(_key_side(mask), tile)

    def queries(dkv: Any, part: tuple[Any, ...]) -> tuple[Any, Array]:
        q, lse, d_out, inner, at = part

        def more(dq: Array, key_part: tuple[Any, ...]) -> tuple[Array, Any]:
            ((k, v), key_at), (dk, dv) = key_part
            here = _mask(at, key_at)

            def work() -> tuple[Array, tuple[Array, Array]]:
                to_q, to_k, to_v = _tile_gradients(q, k, v, here, lse, d_out, inner)
                return dq + to_q, (dk + to_k, dv + to_v)

            return jax.lax.cond(here.may_allow(), work, lambda: (dq, (dk, dv)))

        zero = jnp.zeros_like(q, jnp.float32)
        dq, dkv = jax.lax.scan(more, zero, (keys, dkv))
        return dkv, dq

    parts = (
        _tiles(q_BKGTH, tile),
        _tiles(lse_BKGT, tile, dim=-1),
        _tiles(d_out_BKGTH, tile),
        _tiles(inner_BKGT, tile, dim=-1),
        _rows(_query_side(mask), tile),
    )
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), keys[0])
    (dk, dv), dq = jax.lax.scan(queries, zeros, parts)
    return _joined(dq), _joined(dk), _joined(dv)


def scores(
    q_BKGtH: Float[Array, "B K G t H"], k_BKsH: Numbers, mask: Mask
) -> Float[Array, "B K G t s"]:
    """Give q kᵀ / sqrt(H), float32, where `mask` allows it, else MASKED."""
    scale = q_BKGtH.shape[-1] ** -0.5
    if isinstance(k_BKsH, Quantized):
        scale, k_BKsH = scale * k_BKsH.scale[:, :, None, None], k_BKsH.values
    scores = _multiply_rows("BKRH,BKsH->BKRs", q_BKGtH, k_BKsH.astype(q_BKGtH.dtype))
    return jnp.where(mask.allowed()[:, None, None], scores * scale, MASKED)


def add_tile(
    running: Running,
    q: Float[Array, "B K G t H"],
    k: Numbers,
    v: Numbers,
    mask: Mask,
) -> Running:
    """With the keys of one tile more, [B, K, s, H]."""
    out, total, peak = running
    new = scores(q, k, mask)
    new_peak = jnp.maximum(peak, jnp.max(new, axis=-1))
    # A query that has seen only what is masked has a sum of nonsense, whose peak is
    # MASKED; the first key that it may see scales it by exp(MASKED - ...) = 0.
    weights = jnp.exp(new - new_peak[..., None])
    keep = jnp.exp(peak - new_peak)
    total = total * keep + jnp.sum(weights, axis=-1)
    if isinstance(v, Quantized):
        weights, v = weights * v.scale[:, :, None, None], v.values.astype(q.dtype)
    more = _multiply_rows("BKRs,BKsH->BKRH", weights.astype(v.dtype), v)
    return Running(out * keep[..., None] + more, total, new_peak)


def _tile_gradients(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    lse: Array,
    d_out: Array,
    inner: Array,
) -> tuple[Array, Array, Array]:
    weights = jnp.exp(scores(q, k, mask) - lse[..., None])
    dv = _multiply("BKGts,BKGtH->BKsH", weights.astype(d_out.dtype), d_out)
    d_weights = _multiply("BKGtH,BKsH->BKGts", d_out, v)
    d_scores = weights * (d_weights - inner[..., None]) * q.shape[-1] ** -0.5
    d_scores = d_scores.astype(q.dtype)
    dq = _multiply("BKGts,BKsH->BKGtH", d_scores, k)
    dk = _multiply("BKGts,BKGtH->BKsH", d_scores, q)
    return dq, dk, dv


def _multiply_rows(equation: str, a_BKGtx: Array, b: Array) -> Array:
    """`_multiply`, with the queries that read a key head as one axis, R = G t.

    With two, compilers bring `b` into another order first, which is a copy.
    """
    B, K, G, t, _ = a_BKGtx.shape
    product = _multiply(equation, a_BKGtx.reshape(B, K, G * t, -1), b)
    return product.reshape(B, K, G, t, -1)


def _multiply(equation: str, a: Array, b: Array) -> Array:
    """A product summed in float32; float32 factors whole, see `transformer.py`."""
    # Said here, because a backward pass is traced outside of the forward's context.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(
        equation, a, b, precision=precision, preferred_element_type=jnp.float32
    )


def _query_side(mask: Mask) -> _Where:
    return mask.query_positions, mask.query_segments


def _key_side(mask: Mask) -> _Where:
    return mask.key_positions, mask.key_segments


def _mask(queries: _Where, keys: _Where) -> Mask:
    return Mask(queries[0], keys[0], queries[1], keys[1])


def _rows(where: _Where, tile: int) -> Any:
    return _tiles(where, tile, dim=-1)


def _tiles(tree: Any, tile: int, *, dim: int = -2) -> Any:
    """Arrays cut along their positions, with the tiles on a new first axis."""

    def cut(x: Array) -> Array:
        at = x.ndim + dim
        size = _tile_size(x.shape[at], tile)
        parts = x.reshape(*x.shape[:at], -1, size, *x.shape[at + 1 :])
        return jnp.moveaxis(parts, at, 0)

    return jax.tree.map(cut, tree)


def _joined(tiles: Array, *, dim: int = -2) -> Array:
    """What `_tiles` cut."""
    at = tiles.ndim + dim - 1
    parts = jnp.moveaxis(tiles, 0, at)
    return parts.reshape(*parts.shape[:at], -1, *parts.shape[at + 2 :])


def _tile_size(length: int, least: int) -> int:
    """The smallest divisor of `length` that is at least `least`, or all of it."""
    # Rather too much memory, for an odd length, than tiles of one position.
    return next((n for n in range(least, length) if length % n == 0), length)
