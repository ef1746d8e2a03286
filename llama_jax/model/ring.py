"""Attention across devices that each hold a part of every row.

Two ways, with the form of `layers.attend`. `RingAttention` passes keys and values from
device to device, and each adds what it sees to a running softmax: no device ever holds
more than two parts of them (arXiv 2310.01889). `GatheredAttention` brings all keys and
values to every device at once: one message instead of many, and a plain kernel does
the rest; cheap where few key heads serve many query heads.

Rows come in the order of `sharding/context.py`, which gives all devices equal work;
their positions travel with them. Shape suffixes as in `layers.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from llama_jax.model import tiles
from llama_jax.model.mask import Mask
from llama_jax.model.transformer import Attend
from sharding import AxisRules, axes, context, per_device

Carry = TypeVar("Carry")


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Which part of an array each device has."""

    rules: AxisRules
    mesh: jax.sharding.Mesh

    @property
    def axis(self) -> str:
        (axis,) = self.rules.mesh_axes(axes.SEQUENCE)
        return axis

    @property
    def heads(self) -> jax.P:
        """Of q, and of what comes out."""
        return self.rules.spec((axes.BATCH, axes.SEQUENCE, axes.HEADS, None))

    @property
    def kv_heads(self) -> jax.P:
        """Of k and v."""
        return self.rules.spec((axes.BATCH, axes.SEQUENCE, axes.KV_HEADS, None))

    @property
    def sums(self) -> jax.P:
        """Of the log-normaliser, [B, K, G, T]."""
        return self.rules.spec((axes.BATCH, axes.KV_HEADS, None, axes.SEQUENCE))

    def mask(self, mask: Mask) -> Mask:
        """Of a mask's arrays, as a `Mask` of specs."""
        return jax.tree.map(
            lambda x: self.rules.spec(
                (axes.BATCH if x.shape[0] > 1 else None, axes.SEQUENCE)
            ),
            mask,
        )

    def each(self, body: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
        """`body`, run by every device on its own parts."""
        return per_device(body, self.mesh, in_specs, out_specs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatheredAttention:
    """Queries of this device against the keys of all.

    Attributes:
      rules: which mesh axes split rows, positions and heads.
      mesh: the devices.
      inner: the kernel, called on each device with its rows and heads: queries of its
        two chunks, whose places `mask` has, and whole rows of keys and values, in the
        order of their positions. It may ask `jax.lax.axis_index` which device it is.
    """

    rules: AxisRules
    mesh: jax.sharding.Mesh
    inner: Attend = tiles.attend

    def __call__(
        self,
        q_BTNH: Float[Array, "B T N H"],
        k_BSKH: Float[Array, "B S K H"],
        v_BSKH: Float[Array, "B S K H"],
        mask: Mask,
    ) -> Float[Array, "B T N H"]:
        """See `layers.attend`."""
        layout = _Layout(self.rules, self.mesh)

        def local(q: Array, k: Array, v: Array, mask: Mask) -> Array:
            k, v, positions, segments = jax.tree.map(
                lambda x: context.gather(x, layout.axis),
                (k, v, mask.key_positions, mask.key_segments),
            )
            here = Mask(mask.query_positions, positions, mask.query_segments, segments)
            return self.inner(q, k, v, here)

        specs = (layout.heads, layout.kv_heads, layout.kv_heads, layout.mask(mask))
        return layout.each(local, specs, layout.heads)(q_BTNH, k_BSKH, v_BSKH, mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingAttention:
    """Keys and values go around two devices or more; queries stay.

    The backward pass goes around once more, with the gradients of keys and values
    travelling beside them, instead of keeping what the forward pass saw.

    Attributes:
      rules: which mesh axes split rows, positions and heads.
      mesh: the devices.
      tile: least positions of a tile of scores, see `tiles.py`.
    """

    rules: AxisRules
    mesh: jax.sharding.Mesh
    tile: int = tiles.TILE

    def __call__(
        self,
        q_BTNH: Float[Array, "B T N H"],
        k_BSKH: Float[Array, "B S K H"],
        v_BSKH: Float[Array, "B S K H"],
        mask: Mask,
    ) -> Float[Array, "B T N H"]:
        """See `layers.attend`."""
        assert self.mesh.shape[_Layout(self.rules, self.mesh).axis] > 1
        return _ring(self, q_BTNH, k_BSKH, v_BSKH, mask)


# What goes around: keys and values by head, their positions and segments.
_Keys = tuple[Array, Array, Array, Array | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(ring: RingAttention, q: Array, k: Array, v: Array, mask: Mask) -> Array:
    return _ring_forward(ring, q, k, v, mask)[0]


def _ring_forward(
    ring: RingAttention, q: Array, k: Array, v: Array, mask: Mask
) -> tuple[Array, Any]:
    layout = _Layout(ring.rules, ring.mesh)

    def local(q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Array]:
        q_BKGTH, keys = _by_head(q, k, v, mask)

        def visit(running: tiles.Running, keys: _Keys) -> tiles.Running:
            k, v, _, _ = keys
            return tiles.add(running, q_BKGTH, k, v, _seen(mask, keys), tile=ring.tile)

        size = jax.lax.axis_size(layout.axis)
        running = _around(layout.axis, visit, tiles.begin(q_BKGTH), keys, stops=size)
        out_BKGTH, lse_BKGT = tiles.finish(running, q.dtype)
        return tiles.ungrouped(out_BKGTH), lse_BKGT

    specs = (layout.heads, layout.kv_heads, layout.kv_heads, layout.mask(mask))
    results = layout.each(local, specs, (layout.heads, layout.sums))(q, k, v, mask)
    out, lse = (checkpoint_name(x, tiles.SAVED) for x in results)
    return out, (q, k, v, mask, out, lse)


def _ring_backward(ring: RingAttention, saved: Any, d_out: Array) -> tuple[Any, ...]:
    layout = _Layout(ring.rules, ring.mesh)

    def local(
        q: Array, k: Array, v: Array, mask: Mask, out: Array, lse: Array, d_out: Array
    ) -> tuple[Array, Array, Array]:
        q_BKGTH, keys = _by_head(q, k, v, mask)
        out_BKGTH, d_out_BKGTH = (tiles.grouped(x, k.shape[2]) for x in (out, d_out))
        inner_BKGT = tiles.inner(out_BKGTH, d_out_BKGTH)

        def gradients(keys: _Keys) -> tuple[Array, tuple[Array, Array]]:
            k, v, _, _ = keys
            dq, dk, dv = tiles.gradients(
                q_BKGTH,
                k,
                v,
                _seen(mask, keys),
                lse,
                d_out_BKGTH,
                inner_BKGT,
                tile=ring.tile,
            )
            return dq, (dk, dv)

        def visit(carry: Any, keys: _Keys) -> Any:
            dq, dkv = carry
            # These belong to the keys that were here before, and follow them.
            dkv = _pass_on(layout.axis, dkv)
            more_dq, more_dkv = gradients(keys)
            return dq + more_dq, jax.tree.map(jnp.add, dkv, more_dkv)

        others = _pass_on(layout.axis, keys)
        size = jax.lax.axis_size(layout.axis)
        dq, dkv = _around(layout.axis, visit, gradients(keys), others, stops=size - 1)
        dk, dv = _pass_on(layout.axis, dkv)  # home
        return tiles.ungrouped(dq), tiles.by_head(dk), tiles.by_head(dv)

    q, k, v, mask, *_ = saved
    grads = layout.each(
        local,
        (
            layout.heads,
            layout.kv_heads,
            layout.kv_heads,
            layout.mask(mask),
            layout.heads,
            layout.sums,
            layout.heads,
        ),
        (layout.heads, layout.kv_heads, layout.kv_heads),
    )(*saved, d_out)
    return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None


_ring.defvjp(_ring_forward, _ring_backward)


def _by_head(q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, _Keys]:
    keys = (tiles.by_head(k), tiles.by_head(v), mask.key_positions, mask.key_segments)
    return tiles.grouped(q, k.shape[2]), keys


def _seen(mask: Mask, keys: _Keys) -> Mask:
    """What this device's queries may see of the keys that are here."""
    _, _, positions, segments = keys
    return Mask(mask.query_positions, positions, mask.query_segments, segments)


def _around(
    axis: str,
    visit: Callable[[Carry, _Keys], Carry],
    carry: Carry,
    keys: _Keys,
    *,
    stops: int,
) -> Carry:
    """`carry` after visiting these keys, then those of the devices before this one."""

    def stop(both: tuple[_Keys, Carry], _: None) -> tuple[tuple[_Keys, Carry], None]:
        keys, carry = both
        # On their way already while the visit computes: neither needs the other.
        following = _pass_on(axis, keys)
        return (following, visit(carry, keys)), None

    (keys, carry), _ = jax.lax.scan(stop, (keys, carry), length=stops - 1)
    return visit(carry, keys)


def _pass_on(axis: str, tree: Any) -> Any:
    """To the next device of the ring, from the one before."""
    size = jax.lax.axis_size(axis)
    ring = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, ring), tree)
