"""The model as generation runs it: from a cache, a few positions at a time.

The arithmetic is that of `transformer.py`, from the same `layers.py`. What differs is
the form of the weights, because decoding waits for them and for nothing else: every
matrix is an array of its own, which compilers read while they still compute the layer
before, and lies by rows of outputs, which CPUs multiply fastest and int8 gives one
scale each. Shape suffixes as in `layers.py`, and V vocabulary, I and O the inputs and
outputs of a matrix, R rows of a batch times positions.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.config import LlamaConfig
from llama_jax.model import layers, tiles
from llama_jax.model.cache import KVCache
from llama_jax.model.int8 import Numbers, Quantized
from llama_jax.model.mask import Mask
from llama_jax.model.transformer import Constrain, matmul_precision, unconstrained
from sharding import axes
from sharding.axes import AxisNames

# Rows of a batch, times positions, up to which a CPU's products wait for memory; and up
# to which int8 weights are not widened first.
_FEW = 64
_FEW_FOR_INT8 = 8
# Queries that attend at a time at the least, and tiles of them at the most: fewer read
# fewer keys that come after them, and take longer to compile.
_LEAST_QUERIES = 256
_MOST_TILES = 4
# Queries of a key head that a TPU multiplies in its matrix unit, which is several times
# as fast as a product row by row; fewer are filled up.
_ROWS = 8
# Slots before a chunk that it attends to at a time.
_SLOTS_AT_A_TIME = 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """The weights of one block.

    Attributes:
      attention_norm: [D].
      query_key_value: [(K, G + 2, H), D]: of each key/value head the G queries that
        read it, its key and its value. K counts copies, see `Llama.kv_copies`.
      out: [D, (K, G, H)].
      mlp_norm: [D].
      gate_up: [(P, 2, F / P), D]: of each of P parts of the feed-forward width its
        gates and its ups. P counts devices, see `Decoder.mlp_parts`.
      down: [D, F].
    """

    attention_norm: Array
    query_key_value: Numbers
    out: Numbers
    mlp_norm: Array
    gate_up: Numbers
    down: Numbers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """All weights, in the form that `Decoder` takes.

    Attributes:
      embed: [V, D].
      layers: from first to last.
      final_norm: [D].
      unembed: [V, D].
    """

    embed: Array
    layers: tuple[Layer, ...]
    final_norm: Array
    unembed: Numbers


# Logical axes of each of a layer's weights; of a scale, without the last.
LAYER_AXES: Mapping[str, AxisNames] = {
    "attention_norm": (None,),
    "query_key_value": (axes.KV_HEADS, axes.EMBED),
    "out": (axes.EMBED, axes.KV_HEADS),
    "mlp_norm": (None,),
    "gate_up": (axes.MLP, axes.EMBED),
    "down": (axes.EMBED, axes.MLP),
}


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Functional: tokens and a cache to the residual stream, and that to logits.

    Attributes:
      config: the architecture.
      constrain: pins activations to a mesh, see `sharding.constrain`.
      dtype: what the arithmetic is done in.
      kv_copies: devices that keep each key/value head, see `Llama.kv_copies`.
      mlp_parts: devices that share the feed-forward width, each of which then has the
        gates that go with its ups.
      least_slots: slots of the cache that attention reads at the least: these (or a
        quarter of all, if that is less), or four times as many, and so on, as far as
        the longest row reaches.
    """

    config: LlamaConfig
    constrain: Constrain = unconstrained
    dtype: jnp.dtype = jnp.dtype("float32")
    kv_copies: int = 1
    mlp_parts: int = 1
    least_slots: int = 256

    def empty_cache(
        self, batch: int, slots: int, dtype: jnp.dtype
    ) -> tuple[KVCache, ...]:
        """Room for `batch` rows of `slots` positions in each layer."""
        cache = functools.partial(
            KVCache.empty,
            self.config,
            batch=batch,
            slots=slots,
            dtype=dtype,
            kv_copies=self.kv_copies,
        )
        return tuple(cache() for _ in range(self.config.num_layers))

    def extend(
        self,
        weights: Weights,
        tokens_BT: Int[Array, "B T"],
        cache: tuple[KVCache, ...],
        start: Int[Array, ""] | Int[Array, " B"],
        *,
        wanted_B: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[KVCache, ...]]:
        """The residual stream after the last norm, and the cache with T more positions.

        Args:
          weights: of the model.
          tokens_BT: ids at positions start ... start + T - 1.
          cache: of each layer, with all positions before.
          start: the first new position, of all rows; or, where T is 1, of each. The
            cache must have slots for all of them.
          wanted_B: of each row the one of its T positions whose residual stream is
            wanted, which then is [B, 1, D]; None wants all.
        """
        num_new = tokens_BT.shape[1]
        new_BT = _positions(start, num_new)

        def attend(
            q: Array, k: Array, v: Array, positions_BT: Array, before: KVCache
        ) -> tuple[Array, KVCache]:
            with jax.named_scope("cache"):
                after = before.write(start, k, v)
            if num_new == 1:
                return self._attend_cached(q, after, positions_BT), after
            running = self._attend_before(q, after, start)
            mask = Mask(positions_BT, new_BT)
            return _attend_causally(running, q, before.rounded(k, v), mask), after

        return self._through(weights, tokens_BT, new_BT, attend, cache, wanted_B)

    def hidden(
        self, weights: Weights, tokens_BT: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """The residual stream after the last norm, of whole rows."""

        def attend(
            q: Array, k: Array, v: Array, positions_BT: Array, _: None
        ) -> tuple[Array, None]:
            mask = Mask(positions_BT, positions_BT)
            return _attend_causally(tiles.begin(q), q, KVCache(k, v), mask), None

        positions_BT = _positions(jnp.int32(0), tokens_BT.shape[1])
        return self._through(weights, tokens_BT, positions_BT, attend)[0]

    def attention(
        self, weights: Weights, tokens_BT: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B N T T"], ...]:
        """Of each layer, how much each position attends to each, by query head."""
        B, T = tokens_BT.shape

        def attend(
            q: Array, k: Array, v: Array, positions_BT: Array, _: None
        ) -> tuple[Array, Array]:
            mask = Mask(positions_BT, positions_BT)
            weights_BKGTT = jax.nn.softmax(tiles.scores(q, k, mask))
            mixed = _attend_causally(tiles.begin(q), q, KVCache(k, v), mask)
            return mixed, weights_BKGTT.reshape(B, -1, T, T)

        positions_BT = _positions(jnp.int32(0), T)
        return self._through(weights, tokens_BT, positions_BT, attend)[1]

    def unembed(
        self, weights: Weights, x_BTD: Float[Array, "B T D"]
    ) -> Float[Array, "B T V"]:
        """Logits, float32, of the tokens after each position."""
        with jax.named_scope("unembed"), matmul_precision(self.dtype):
            logits_BTV = multiply(weights.unembed, x_BTD, dtype=jnp.float32)
            return self.constrain(logits_BTV, axes.BATCH, axes.SEQUENCE, axes.VOCAB)

    def _through(
        self,
        weights: Weights,
        tokens_BT: Array,
        positions_BT: Array,
        attend: Callable[[Array, Array, Array, Array, Any], tuple[Array, Any]],
        cache: tuple[KVCache, ...] | None = None,
        wanted_B: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
        """All layers, and what `attend` gives of each beside what it mixes."""
        c = self.config
        with jax.named_scope("embed"):
            table_VD = self.constrain(weights.embed, axes.VOCAB, None)
            x_BTD = self._residual(table_VD[tokens_BT].astype(self.dtype))
        angle_BTh = layers.rotary_angles(
            positions_BT, head_dim=c.head_dim, theta=c.rope_theta
        )

        # Layers are alike: JAX traces one, and lowers it, for all of them.
        @jax.jit
        def block(
            layer: Layer, x_BTD: Array, before: KVCache | None, wanted_B: Array | None
        ) -> tuple[Array, Any]:
            with jax.named_scope("attention"):
                q, k, v = self._query_key_value(layer, x_BTD, angle_BTh)
                at_BT = positions_BT
                if wanted_B is not None:
                    q, x_BTD = _taken(q, wanted_B, 3), _taken(x_BTD, wanted_B, 1)
                    at_BT = _taken(positions_BT, wanted_B, 1)
                with jax.named_scope("attend"):
                    mixed_BKGTH, of_layer = attend(q, k, v, at_BT, before)
                x_BTD = self._residual(x_BTD + self._out(layer, mixed_BKGTH))
            with jax.named_scope("mlp"):
                return self._residual(x_BTD + self._swiglu(layer, x_BTD)), of_layer

        of_layers: list[Any] = []
        with matmul_precision(self.dtype):
            for number, layer in enumerate(weights.layers):
                # Of what is not wanted, only keys and values are read by anyone.
                is_last = number == c.num_layers - 1
                x_BTD, of_layer = block(
                    layer,
                    x_BTD,
                    None if cache is None else cache[number],
                    wanted_B if is_last else None,
                )
                of_layers.append(of_layer)
        x_BTD = layers.rms_norm(x_BTD, weights.final_norm, eps=c.norm_eps)
        return x_BTD, tuple(of_layers)

    def _query_key_value(
        self, layer: Layer, x_BTD: Array, angle_BTh: Array
    ) -> tuple[Array, Array, Array]:
        """Of each key/value head: its queries, its key, its value."""
        c = self.config
        B, T, _ = x_BTD.shape
        K, H = c.num_kv_heads * self.kv_copies, c.head_dim
        normed_BTD = layers.rms_norm(x_BTD, layer.attention_norm, eps=c.norm_eps)
        with jax.named_scope("query_key_value"):
            all_BTKAH = multiply(layer.query_key_value, normed_BTD).reshape(
                B, T, K, -1, H
            )
            all_BTKAH = self.constrain(
                all_BTKAH, axes.BATCH, axes.SEQUENCE, axes.KV_HEADS, None, None
            )
        with jax.named_scope("rotary"):
            turned = all_BTKAH[..., :-1, :]
            turned = layers.rotate(turned.reshape(B, T, -1, H), angle_BTh)
            turned_BKATH = turned.reshape(B, T, K, -1, H).transpose(0, 2, 3, 1, 4)
        q_BKGTH, k_BKTH = turned_BKATH[:, :, :-1], turned_BKATH[:, :, -1]
        return q_BKGTH, k_BKTH, all_BTKAH[..., -1, :].swapaxes(1, 2)

    def _attend_cached(
        self, q_BKGTH: Array, cache: KVCache, positions_BT: Array
    ) -> Array:
        """Attention to the slots up to each position; what is behind holds nothing."""
        sizes = self._sizes(cache.num_slots)
        reach = jnp.max(positions_BT) + 1
        size = jnp.sum(reach > jnp.asarray(sizes[:-1]))

        def attend(q_BKGTH: Array, cache: KVCache, num_slots: int) -> Array:
            part = cache.first(num_slots)
            slots_1s = jnp.arange(num_slots, dtype=jnp.int32)[None]
            return _attend(
                q_BKGTH, part.keys, part.values, Mask(positions_BT, slots_1s)
            )

        def attend_some(q_BKGTH: Array) -> Array:
            branches = [functools.partial(attend, num_slots=n) for n in sizes]
            return jax.lax.switch(size, branches, q_BKGTH, cache)

        def attend_in_rows(q_BKGTH: Array) -> Array:
            _, _, G, T, _ = q_BKGTH.shape
            rows = -(-_ROWS // G)
            if rows <= T:
                return attend_some(q_BKGTH)
            widths = [(0, 0), (0, 0), (0, 0), (0, rows - T), (0, 0)]
            mixed = attend_some(jnp.pad(q_BKGTH, widths))
            return jax.lax.optimization_barrier(mixed)[:, :, :, :T]

        return jax.lax.platform_dependent(
            q_BKGTH, cpu=attend_some, default=attend_in_rows
        )

    def _attend_before(
        self, q_BKGTH: Array, cache: KVCache, start: Array
    ) -> tiles.Running:
        """Attention to the slots before `start`, with all that are there after it."""
        num_slots = cache.num_slots
        size = min(_SLOTS_AT_A_TIME, num_slots)

        def more(number: Array, running: tiles.Running) -> tiles.Running:
            first = jnp.minimum(number * size, num_slots - size)
            part = cache.part(first, size)
            slots_s = first + jnp.arange(size, dtype=jnp.int32)
            # The last block may begin within the one before, and sees that no more.
            slots_s = jnp.where(slots_s < number * size, start, slots_s)
            mask = Mask(jnp.reshape(start - 1, (1, 1)), slots_s[None])
            return tiles.add_tile(running, q_BKGTH, part.keys, part.values, mask)

        num_blocks = (start + size - 1) // size
        return jax.lax.fori_loop(0, num_blocks, more, tiles.begin(q_BKGTH))

    def _sizes(self, num_slots: int) -> list[int]:
        """Parts of a cache that programs can read: the first slots, ..., all of them.

        A loop over blocks would read less, but compilers copy what a loop may change. A
        CPU's compiler does so too where there is no choice; so there is one.
        """
        return _fourfold(min(self.least_slots, -(-num_slots // 4)), num_slots)

    def _out(self, layer: Layer, mixed_BKGTH: Array) -> Array:
        B, T = mixed_BKGTH.shape[0], mixed_BKGTH.shape[3]
        with jax.named_scope("out"):
            mixed = mixed_BKGTH.transpose(0, 3, 1, 2, 4)
            mixed = self.constrain(
                mixed, axes.BATCH, axes.SEQUENCE, axes.KV_HEADS, None, None
            )
            return multiply(layer.out, mixed.reshape(B, T, -1))

    def _swiglu(self, layer: Layer, x_BTD: Array) -> Array:
        normed_BTD = layers.rms_norm(x_BTD, layer.mlp_norm, eps=self.config.norm_eps)
        B, T, _ = x_BTD.shape
        both = multiply(layer.gate_up, normed_BTD).reshape(B, T, self.mlp_parts, 2, -1)
        inner_BTF = (jax.nn.silu(both[..., 0, :]) * both[..., 1, :]).reshape(B, T, -1)
        inner_BTF = self.constrain(inner_BTF, axes.BATCH, axes.SEQUENCE, axes.MLP)
        return multiply(layer.down, inner_BTF)

    def _residual(self, x_BTD: Array) -> Array:
        return self.constrain(x_BTD, axes.BATCH, axes.RESIDUAL, None)


def _positions(start: Array, num_new: int) -> Int[Array, "B T"]:
    """Of T new tokens in each row, or in one for all."""
    return jnp.reshape(start, (-1, 1)) + jnp.arange(num_new, dtype=jnp.int32)


def _taken(x: Array, place_B: Array, axis: int) -> Array:
    """Of each row one place on an axis, which stays."""
    place = jnp.expand_dims(place_B, tuple(range(1, x.ndim)))
    return jnp.take_along_axis(x, place, axis=axis)


def _attend(q_BKGTH: Array, keys: Numbers, values: Numbers, mask: Mask) -> Array:
    running = tiles.add_tile(tiles.begin(q_BKGTH), q_BKGTH, keys, values, mask)
    return tiles.finish(running, q_BKGTH.dtype)[0]


def _attend_causally(
    running: tiles.Running, q_BKGTH: Array, own: KVCache, mask: Mask
) -> Array:
    """Attention to what came before, and of new positions to each other.

    Tile by tile of queries, none of which reads keys that come after all of its own.

    Args:
      running: with what came before.
      q_BKGTH: queries of all the positions; or one query, of any of them.
      own: their keys and values.
      mask: over those.
    """
    num_queries, num_after = q_BKGTH.shape[3], own.num_slots - q_BKGTH.shape[3]
    size = max(_LEAST_QUERIES, -(-num_queries // _MOST_TILES))
    mixed: list[Array] = []
    for first in range(0, num_queries, size):
        stop = min(first + size, num_queries)
        some = functools.partial(
            jax.lax.slice_in_dim, start_index=first, limit_index=stop, axis=3
        )
        part, q = jax.tree.map(some, (running, q_BKGTH))
        seen = own.first(stop + num_after)
        here = Mask(
            mask.query_positions[:, first:stop],
            mask.key_positions[:, : seen.num_slots],
        )
        part = tiles.add_tile(part, q, seen.keys, seen.values, here)
        mixed.append(tiles.finish(part, q.dtype)[0])
    return jnp.concatenate(mixed, axis=3)


def _fourfold(least: int, most: int) -> list[int]:
    """From `least`, each four times the one before, to `most`."""
    sizes = [min(least, most)]
    while sizes[-1] < most:
        sizes.append(min(4 * sizes[-1], most))
    return sizes


def multiply(
    rows_OI: Numbers, x_BTI: Float[Array, "B T I"], *, dtype: jnp.dtype | None = None
) -> Float[Array, "B T O"]:
    """Give x rowsᵀ, in the type of x if no other is wanted."""
    B, T, _ = x_BTI.shape
    x_RI = x_BTI.reshape(B * T, -1)
    y_RO = jax.lax.platform_dependent(
        rows_OI, x_RI, cpu=_multiply_on_cpu, default=_multiply
    )
    return y_RO.astype(dtype or x_BTI.dtype).reshape(B, T, -1)


def _multiply(rows_OI: Numbers, x_RI: Array) -> Array:
    rows = rows_OI.values if isinstance(rows_OI, Quantized) else rows_OI
    y_RO = jnp.einsum(
        "RI,OI->RO", x_RI, rows.astype(x_RI.dtype), preferred_element_type=jnp.float32
    )
    return y_RO * rows_OI.scale if isinstance(rows_OI, Quantized) else y_RO


def _multiply_on_cpu(rows_OI: Numbers, x_RI: Array) -> Array:
    """The same, in the forms that XLA's CPU compiler has fast code for.

    Elsewhere it reads weights at a fraction of the memory's speed: with few rows of x,
    weights have to be the left factor, int8 has to meet int8; with one, bfloat16 a sum.
    """
    num_rows = len(x_RI)
    x_RI = x_RI.astype(jnp.float32)
    if isinstance(rows_OI, Quantized):
        if num_rows <= _FEW_FOR_INT8:
            return _multiply_int8(rows_OI, x_RI)
        wide_OI = jax.lax.optimization_barrier(rows_OI.values.astype(jnp.float32))
        return _multiply_on_cpu(wide_OI, x_RI) * rows_OI.scale
    if rows_OI.dtype != jnp.float32:
        if num_rows == 1:
            return jnp.sum(rows_OI.astype(jnp.float32) * x_RI, axis=-1)[None]
        rows_OI = jax.lax.optimization_barrier(rows_OI.astype(jnp.float32))
    if num_rows <= _FEW:
        # Without the barrier the transposition moves into the product.
        return jax.lax.optimization_barrier(jnp.einsum("OI,RI->OR", rows_OI, x_RI)).T
    return jnp.einsum("RI,OI->RO", x_RI, rows_OI)


def _multiply_int8(rows_OI: Quantized, x_RI: Array) -> Array:
    """Products of whole numbers: x in two parts of 8 bits, so that it keeps 15."""
    coarse = Quantized.of(x_RI)
    rest = Quantized.of(x_RI - coarse.widened(x_RI.dtype))
    parts = jnp.concatenate([coarse.values, rest.values])
    y_PO = jax.lax.dot_general(
        parts,
        rows_OI.values,
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.int32,
    ).astype(jnp.float32)
    coarse_RO, rest_RO = jnp.split(y_PO, 2)
    y_RO = coarse_RO * coarse.scale[:, None] + rest_RO * rest.scale[:, None]
    return y_RO * rows_OI.scale
