"""Attention in tiles: the splash kernel that JAX ships, behind `layers.attend`'s form.

Scores never leave the chip's fast memory, tiles above the diagonal are never visited,
and a key head serves its group of query heads without a copy (arXiv 2205.14135,
2305.13245). A kernel is opaque to the compiler's partitioner, so it runs on each
device's part: rows over `batch`, heads over `heads`. Shape suffixes as in `layers.py`.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_mask,
)
from jaxtyping import Array, Float

from llama_jax.errors import ConfigError
from llama_jax.model import tiles
from llama_jax.model.mask import Mask
from sharding import AxisRules, axes, context, per_device

# What `jax.checkpoint` knows the kernel's result and its log-sum-exp by.
SAVED = "attention"

# The narrowest tile: one row of the vector unit's lanes.
_LANES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Positions per tile of queries and of keys; they change speed, not results.

    Attributes:
      query: of the forward kernel.
      key: of the forward kernel; loaded at once.
      key_compute: of those, multiplied at once.
      query_back: of the backward kernel.
      key_back: of the backward kernel; it writes dq once per such tile.
      key_compute_back: of those, multiplied at once.
    """

    query: int = 1024
    key: int = 1024
    key_compute: int = 512
    query_back: int = 1024
    key_back: int = 1024
    key_compute_back: int = 512

    def within(self, length: int) -> "Blocks":
        """The same, no tile longer than the row.

        Raises:
          ConfigError: the row is not made of whole tiles.
        """
        fitted = self._at_most(length)
        for tile in dataclasses.astuple(fitted):
            if not _is_whole(tile, length):
                raise ConfigError(
                    f"sequences of {length} positions do not divide into the "
                    f"attention kernel's tiles of {tile}: use a multiple of {tile}, "
                    'or attention "dot".'
                )
        return fitted

    def divide(self, length: int) -> bool:
        """Whether a row is made of whole tiles, none longer than it."""
        fitted = dataclasses.astuple(self._at_most(length))
        return all(_is_whole(tile, length) for tile in fitted)

    def _at_most(self, length: int) -> "Blocks":
        ours = dataclasses.asdict(self).items()
        return Blocks(**{name: min(tile, length) for name, tile in ours})


def _is_whole(tile: int, length: int) -> bool:
    return length % tile == 0 and tile % _LANES == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashAttention:
    """`layers.attend` for whole rows in order: causal, within segments if any.

    Attributes:
      mesh: the devices, or None where there is one.
      rules: which mesh axes split rows and heads.
      blocks: tiles.
      interpret: run the kernel's program on any device, slowly, as tests do.
    """

    mesh: jax.sharding.Mesh | None
    rules: AxisRules | None
    blocks: Blocks = Blocks()
    interpret: bool = False

    def __call__(
        self,
        q_BTNH: Float[Array, "B T N H"],
        k_BSKH: Float[Array, "B S K H"],
        v_BSKH: Float[Array, "B S K H"],
        mask: Mask,
    ) -> Float[Array, "B T N H"]:
        """See `layers.attend`; `mask`'s positions must be 0 ... T - 1 of each row."""
        assert q_BTNH.shape[1] == k_BSKH.shape[1] == mask.query_positions.shape[1]
        local = functools.partial(
            _local, blocks=self.blocks.within(q_BTNH.shape[1]), interpret=self.interpret
        )
        segments = (mask.query_segments, mask.key_segments)
        if self.mesh is None or self.rules is None:
            return local(q_BTNH, k_BSKH, v_BSKH, segments)
        queries = self.rules.spec((axes.BATCH, None, axes.HEADS, None))
        keys = self.rules.spec((axes.BATCH, None, axes.KV_HEADS, None))
        rows = self.rules.spec((axes.BATCH, None))
        split = per_device(
            local, self.mesh, (queries, keys, keys, (rows, rows)), queries
        )
        return split(q_BTNH, k_BSKH, v_BSKH, segments)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashOrTiles:
    """`layers.attend` for whole rows of any length.

    Attributes:
      flash: the kernel, for rows that are made of its tiles; `tiles.attend` does the
        others.
    """

    flash: FlashAttention

    def __call__(
        self,
        q_BTNH: Float[Array, "B T N H"],
        k_BSKH: Float[Array, "B S K H"],
        v_BSKH: Float[Array, "B S K H"],
        mask: Mask,
    ) -> Float[Array, "B T N H"]:
        """See `FlashAttention`."""
        whole = self.flash.blocks.divide(q_BTNH.shape[1])
        attend = self.flash if whole else tiles.attend
        return attend(q_BTNH, k_BSKH, v_BSKH, mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashPart:
    """The kernel inside of `ring.GatheredAttention`: a part of each row's queries.

    Attributes:
      axis: the mesh axis that splits rows, in the order of `sharding/context.py`.
      blocks: tiles.
      interpret: as of `FlashAttention`.
    """

    axis: str
    blocks: Blocks = Blocks()
    interpret: bool = False

    def __call__(
        self,
        q_BTNH: Float[Array, "B T N H"],
        k_BSKH: Float[Array, "B S K H"],
        v_BSKH: Float[Array, "B S K H"],
        mask: Mask,
    ) -> Float[Array, "B T N H"]:
        """See `layers.attend`; T of the S positions, this device's of the order."""
        return _local(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            (mask.query_segments, mask.key_segments),
            blocks=self.blocks.within(q_BTNH.shape[1]),
            interpret=self.interpret,
            axis=self.axis,
        )


def _local(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    segments: tuple[Array | None, Array | None],
    *,
    blocks: Blocks,
    interpret: bool,
    axis: str | None = None,
) -> Float[Array, "B T N H"]:
    """One device's rows and heads, and its queries if `axis` splits them."""
    _, T, N, H = q_BTNH.shape
    S = k_BSKH.shape[1]
    kernel: Any = _kernel(S, N, blocks, interpret, num_parts=S // T)
    if axis is not None:
        kernel = _part(kernel, axis)
    # The kernel multiplies as it finds: the scale goes into the queries.
    q_BNTH = (q_BTNH * H**-0.5).swapaxes(1, 2)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    query_segments, key_segments = segments
    if query_segments is None or key_segments is None:
        out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH)
    else:
        ids = splash.SegmentIds(query_segments, key_segments)
        out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, ids)
    return out_BNTH.swapaxes(1, 2)


def _kernel(
    length: int, num_heads: int, blocks: Blocks, interpret: bool, *, num_parts: int
) -> splash.SplashAttentionKernel:
    causal = splash_mask.CausalMask((length, length))
    causal.q_sequence = context.placement(length, num_parts)
    return splash.make_splash_mha(
        splash_mask.MultiHeadMask([causal] * num_heads),
        block_sizes=splash.BlockSizes(
            block_q=blocks.query,
            block_kv=blocks.key,
            block_kv_compute=blocks.key_compute,
            block_q_dkv=blocks.query_back,
            block_kv_dkv=blocks.key_back,
            block_kv_dkv_compute=blocks.key_compute_back,
            use_fused_bwd_kernel=True,  # dq beside dk and dv, from one read of scores
        ),
        head_shards=1,
        q_seq_shards=num_parts,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )


def _part(kernel: Any, axis: str) -> Any:
    """A kernel's plan of tiles, of which each device follows its own queries' part."""
    index, num_parts = jax.lax.axis_index(axis), jax.lax.axis_size(axis)

    def mine(plan: Array) -> Array:
        dim = 1 if plan.ndim == 3 else 0  # [heads, queries, keys], or queries alone
        size = plan.shape[dim] // num_parts
        return jax.lax.dynamic_slice_in_dim(plan, index * size, size, dim)

    return jax.tree.map(mine, kernel)
