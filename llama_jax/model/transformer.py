"""Llama 2 as functional Flax modules: parameters, and what is done with them.

Arithmetic is in `layers.py`, the loop over blocks in `depth.py`. Where things live is
said with logical axis names only; a mesh, if any, is inside `constrain`. Shape
suffixes as in `layers.py`, and V vocabulary, L layers.
"""

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llama_jax.config import LlamaConfig
from llama_jax.config.model import Head
from llama_jax.model import depth, layers, mask
from sharding import axes
from sharding.axes import Tree

Attend = Callable[[Array, Array, Array, mask.Mask], Array]
Constrain = Callable[..., Array]

# Paper, section 2.2, leaves the initialisation open; this is the usual choice.
INIT = nn.initializers.normal(stddev=0.02)


def param_axes(head: Head = "unembed") -> Tree:
    """The logical axes of every parameter, as a tree of the parameters' form."""
    heads = {
        "unembed": {"kernel": (axes.EMBED, axes.VOCAB)},
        "scalar": {"kernel": (None,)},
    }
    norm = {"scale": (axes.LAYERS, None)}
    project_in = (axes.LAYERS, axes.EMBED, axes.MLP)
    return {
        "embed": {"table": (axes.VOCAB, axes.EMBED)},
        "blocks": {
            "attention_norm": norm,
            "attention": {
                "query": (axes.LAYERS, axes.EMBED, axes.HEADS, None),
                "key": (axes.LAYERS, axes.EMBED, axes.KV_HEADS, None),
                "value": (axes.LAYERS, axes.EMBED, axes.KV_HEADS, None),
                "out": (axes.LAYERS, axes.HEADS, None, axes.EMBED),
            },
            "mlp_norm": norm,
            "mlp": {
                "gate": project_in,
                "up": project_in,
                "down": (axes.LAYERS, axes.MLP, axes.EMBED),
            },
        },
        "final_norm": {"scale": (None,)},
        head: heads[head],
    }


def unconstrained(x: Array, *names: str | None) -> Array:
    """The default `constrain`: one device, nothing to say."""
    del names
    return x


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    eps: float

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The norm over D."""
        scale_D = self.param("scale", nn.initializers.ones, (x_BTD.shape[-1],))
        return layers.rms_norm(x_BTD, scale_D, eps=self.eps)


class Embed(nn.Module):
    """The table of piece embeddings, not scaled."""

    config: LlamaConfig
    constrain: Constrain
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The rows of the table that `tokens` name."""
        shape = (self.config.vocab_size, self.config.dim)
        table_VD = self.param("table", INIT, shape)
        # Gathered over `fsdp` first, as other weights are: after a lookup in a table
        # with split columns the compiler would replicate the result to re-split it.
        table_VD = self.constrain(table_VD.astype(self.dtype), axes.VOCAB, None)
        return table_VD[tokens_BT]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: LlamaConfig
    constrain: Constrain
    attend: Attend
    kv_copies: int = 1

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        angle_BTh: Float[Array, "B T h"],
        pattern: mask.Mask,
    ) -> Float[Array, "B T D"]:
        """What each position gathers."""
        c = self.config
        D, N, K, H = c.dim, c.num_heads, c.num_kv_heads, c.head_dim

        def project(name: str, num_heads: int, axis: str) -> Float[Array, "B T _ H"]:
            kernel = self.param(name, INIT, (D, num_heads, H)).astype(x_BTD.dtype)
            if axis == axes.KV_HEADS and self.kv_copies > 1:
                # Where more devices split the heads than there are: each computes the
                # one that its query heads read, and nothing else.
                kernel = jnp.repeat(kernel, self.kv_copies, axis=1)
                kernel = self.constrain(kernel, None, axis, None)
            out = jnp.einsum("BTD,DNH->BTNH", x_BTD, kernel)
            return self.constrain(out, axes.BATCH, axes.SEQUENCE, axis, None)

        with jax.named_scope("query_key_value"):
            q_BTNH = project("query", N, axes.HEADS)
            k_BTKH = project("key", K, axes.KV_HEADS)
            v_BTKH = checkpoint_name(project("value", K, axes.KV_HEADS), "value")
        with jax.named_scope("rotary"):
            q_BTNH = checkpoint_name(layers.rotate(q_BTNH, angle_BTh), "query")
            k_BTKH = checkpoint_name(layers.rotate(k_BTKH, angle_BTh), "key")
        with jax.named_scope("attend"):
            mixed_BTNH = self.attend(q_BTNH, k_BTKH, v_BTKH, pattern)
            mixed_BTNH = self.constrain(
                mixed_BTNH, axes.BATCH, axes.SEQUENCE, axes.HEADS, None
            )
            mixed_BTNH = layers.written(mixed_BTNH)
        with jax.named_scope("out"):
            out_NHD = self.param("out", INIT, (N, H, D)).astype(x_BTD.dtype)
            out_BTD = jnp.einsum("BTNH,NHD->BTD", mixed_BTNH, out_NHD)
            return layers.written(checkpoint_name(out_BTD, "out"))


class SwiGLU(nn.Module):
    """The gated feed-forward layer."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The layer, at each position alone."""
        D, F = self.config.dim, self.config.hidden_dim
        gate_DF = self.param("gate", INIT, (D, F)).astype(x_BTD.dtype)
        up_DF = self.param("up", INIT, (D, F)).astype(x_BTD.dtype)
        down_FD = self.param("down", INIT, (F, D)).astype(x_BTD.dtype)
        return layers.swiglu(x_BTD, gate_DF, up_DF, down_FD)


class Unembed(nn.Module):
    """The linear map from the residual stream to logits; not tied to `Embed`."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits, summed and kept in float32."""
        shape = (self.config.dim, self.config.vocab_size)
        kernel_DV = self.param("kernel", INIT, shape).astype(x_BTD.dtype)
        return jnp.einsum(
            "BTD,DV->BTV", x_BTD, kernel_DV, preferred_element_type=jnp.float32
        )


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    config: LlamaConfig
    constrain: Constrain
    attend: Attend
    kv_copies: int = 1

    def setup(self) -> None:
        """The four parts."""
        c = self.config
        self.attention_norm = RMSNorm(c.norm_eps)
        self.attention = Attention(c, self.constrain, self.attend, self.kv_copies)
        self.mlp_norm = RMSNorm(c.norm_eps)
        self.mlp = SwiGLU(c)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        angle_BTh: Float[Array, "B T h"],
        pattern: mask.Mask,
    ) -> Float[Array, "B T D"]:
        """The residual stream after this layer."""
        with jax.named_scope("attention"):
            normed_BTD = layers.written(self._whole(self.attention_norm(x_BTD)))
            update_BTD = self.attention(normed_BTD, angle_BTh, pattern)
            x_BTD = self._residual(x_BTD + update_BTD)
        with jax.named_scope("mlp"):
            normed_BTD = layers.written(self._whole(self.mlp_norm(x_BTD)))
            return self._residual(x_BTD + self.mlp(normed_BTD))

    def _residual(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.constrain(x_BTD, axes.BATCH, axes.RESIDUAL, None)

    def _whole(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.constrain(x_BTD, axes.BATCH, axes.SEQUENCE, None)


class Llama(nn.Module):
    """Llama 2 (arXiv 2307.09288): tokens to logits.

    Functional: `Llama(config).init(rng, tokens)` gives `{"params": ...}`, and
    `Llama(config).apply({"params": params}, tokens)` the logits. Methods are chosen
    with `apply(..., method="hidden")`. While parameters are made the blocks do not
    run, so what `init_with_output` gives beside them means nothing.

    Attributes:
      head: what the last parameters are called; the class says it.
      config: the architecture.
      constrain: pins activations to a mesh, see `sharding.constrain`.
      attend: the attention kernel, with the signature of `layers.attend`.
      dtype: what the arithmetic is done in; parameters keep their own type.
      remat: what the backward pass finds saved, see `depth.run`.
      kv_copies: devices that compute each key/value head; 1 unless more devices split
        the heads than there are. Keys, values and a cache then have K times as many.
    """

    head: ClassVar[Head] = "unembed"

    config: LlamaConfig
    constrain: Constrain = unconstrained
    attend: Attend = layers.attend
    dtype: jnp.dtype = jnp.dtype("float32")
    remat: str = "none"
    kv_copies: int = 1

    def setup(self) -> None:
        """Declare the parameters; blocks are stacked on a leading axis L."""
        c = self.config
        self.embed = Embed(c, self.constrain, self.dtype)
        self.block = Block(c, self.constrain, self.attend, self.kv_copies, parent=None)
        self.blocks = self.param("blocks", self._init_blocks)
        self.final_norm = RMSNorm(c.norm_eps)
        self.unembedding = Unembed(c, name="unembed")

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"] | None = None,
        positions_BT: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the token after each, float32.

        Args:
          tokens_BT: ids of whole rows, from position 0.
          segments_BT: which document each token belongs to, if documents that share a
            row must not see each other.
          positions_BT: the place of each token in its row, where they are in another
            order (`sharding/context.py`); of one row, if it is that of all.
        """
        return self.unembed(self.hidden(tokens_BT, segments_BT, positions_BT))

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"] | None = None,
        positions_BT: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The residual stream after the last norm; `unembed` turns it into logits."""
        pattern = mask.causal(tokens_BT.shape[1], segments_BT, positions_BT)
        c = self.config
        with jax.named_scope("embed"):
            x_BTD = self.constrain(
                self.embed(tokens_BT), axes.BATCH, axes.RESIDUAL, None
            )
        angle_BTh = layers.rotary_angles(
            pattern.query_positions, head_dim=c.head_dim, theta=c.rope_theta
        )

        def block(params: Tree, x_BTD: Array) -> Array:
            update: Any = self.block.apply(
                {"params": params}, x_BTD, angle_BTh, pattern
            )
            return update

        if not self.is_initializing():  # what makes parameters need not run them
            with jax.named_scope("blocks"), matmul_precision(self.dtype):
                x_BTD = depth.run(block, self.blocks, x_BTD, remat=self.remat)
        return self.constrain(self.final_norm(x_BTD), axes.BATCH, axes.SEQUENCE, None)

    def unembed(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits, float32, of the tokens after each position."""
        with jax.named_scope("unembed"), matmul_precision(self.dtype):
            logits_BTV = self.unembedding(x_BTD)
            return self.constrain(logits_BTV, axes.BATCH, axes.SEQUENCE, axes.VOCAB)

    def _init_blocks(self, rng: Array) -> Tree:
        c = self.config
        block = Block(c, unconstrained, layers.attend, parent=None)
        x_BTD = jnp.zeros((1, 1, c.dim))
        angle_BTh = jnp.zeros((1, 1, c.head_dim // 2))

        def init(rng: Array) -> Tree:
            pattern = mask.causal(1)
            return block.init(rng, x_BTD, angle_BTh, pattern)["params"]

        return jax.vmap(init)(jax.random.split(rng, c.num_layers))


def matmul_precision(dtype: jnp.dtype) -> contextlib.AbstractContextManager[None]:
    """float32 means float32: by default a TPU multiplies it in bfloat16 passes."""
    if dtype == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()
