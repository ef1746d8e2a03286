"""Whether two checkpoints are the same model, found out without the converter.

Digests say that what was written is what was read. They cannot say that it was read
rightly: a permutation forgotten on the way in and on the way out hides. So the logits
of both ends are compared too, each computed from its own files in their own layout:
Meta's shard by shard, with sums over shards and pairs of neighbours that turn; Hugging
Face's with pairs half a head apart; Orbax's with x @ kernel. Nothing of `names.py`,
`rope.py` or `layout.py` is used here.

In float32 on the host, a block of one matrix at a time, so that a 70B needs little
memory.
Shape suffixes: T position, D model width, N query heads, K key/value heads, H head
width, h = H / 2.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.params import ParamsCheckpoint
from llama_jax.config import LlamaConfig
from llama_jax.conversion.files import Tensor
from llama_jax.conversion.manifest import Checkpoint
from llama_jax.conversion.stored import TensorCheckpoint

# Between logits of equal weights, relative to the largest of them, or to 1.
LOGITS_TOLERANCE = 1e-4
_NUM_TOKENS = 16
# Of a matrix at once: what stays in the processor's cache as float32.
_BLOCK_VALUES = 2**19

_META = {
    "embed": "tok_embeddings.weight",
    "attention_norm": "layers.{}.attention_norm.weight",
    "query": "layers.{}.attention.wq.weight",
    "key": "layers.{}.attention.wk.weight",
    "value": "layers.{}.attention.wv.weight",
    "out": "layers.{}.attention.wo.weight",
    "mlp_norm": "layers.{}.ffn_norm.weight",
    "gate": "layers.{}.feed_forward.w1.weight",
    "up": "layers.{}.feed_forward.w3.weight",
    "down": "layers.{}.feed_forward.w2.weight",
    "final_norm": "norm.weight",
    "unembed": "output.weight",
}
_HF = {
    "embed": "model.embed_tokens.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    "query": "model.layers.{}.self_attn.q_proj.weight",
    "key": "model.layers.{}.self_attn.k_proj.weight",
    "value": "model.layers.{}.self_attn.v_proj.weight",
    "out": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "unembed": "lm_head.weight",
}
_ORBAX = {
    "embed": "embed/table",
    "attention_norm": "blocks/attention_norm/scale",
    "query": "blocks/attention/query",
    "key": "blocks/attention/key",
    "value": "blocks/attention/value",
    "out": "blocks/attention/out",
    "mlp_norm": "blocks/mlp_norm/scale",
    "gate": "blocks/mlp/gate",
    "up": "blocks/mlp/up",
    "down": "blocks/mlp/down",
    "final_norm": "final_norm/scale",
    "unembed": "unembed/kernel",
}


class _Weights(Protocol):
    """The weights of a checkpoint, as its own layout uses them."""

    @property
    def interleaved(self) -> bool:
        """Whether the features that turn together are neighbours."""
        ...

    def embed(self, tokens: Sequence[int]) -> np.ndarray:
        """Rows of the embedding, [T, D]."""
        ...

    def vector(self, name: str, layer: int) -> np.ndarray:
        """The scale of a norm, [D]."""
        ...

    def into(self, x: np.ndarray, name: str, layer: int) -> np.ndarray:
        """A product whose outputs the shards divide, [T, out]."""
        ...

    def back(self, x: np.ndarray, name: str, layer: int) -> np.ndarray:
        """A product whose inputs the shards divide, [T, D]."""
        ...


@dataclasses.dataclass(frozen=True)
class _TensorFiles:
    """Meta's or Hugging Face's tensors; matrices are [out, in]."""

    shards: Sequence[Mapping[str, Tensor]]
    names: Mapping[str, str]
    interleaved: bool
    dtype: jnp.dtype

    def embed(self, tokens: Sequence[int]) -> np.ndarray:
        tables = [shard[self.names["embed"]] for shard in self.shards]
        rows = [
            np.concatenate([self._float32(t[i : i + 1]) for t in tables], axis=1)
            for i in tokens
        ]
        return np.concatenate(rows)

    def vector(self, name: str, layer: int) -> np.ndarray:
        return self._float32(self.shards[0][self.names[name].format(layer)][:])

    def into(self, x: np.ndarray, name: str, layer: int) -> np.ndarray:
        tensors = [shard[self.names[name].format(layer)] for shard in self.shards]
        return np.concatenate([self._product(x, t) for t in tensors], axis=1)

    def back(self, x: np.ndarray, name: str, layer: int) -> np.ndarray:
        tensors = [shard[self.names[name].format(layer)] for shard in self.shards]
        parts = np.split(x, len(tensors), axis=1)
        products = map(self._product, parts, tensors)
        return np.sum(list(products), axis=0)

    def _product(self, x: np.ndarray, tensor: Tensor) -> np.ndarray:
        blocks = _blocks(tensor.shape)
        products = [_times_transposed(x, self._rounded(tensor[b])) for b in blocks]
        return np.concatenate(products, axis=1)

    def _float32(self, stored: np.ndarray) -> np.ndarray:
        return self._rounded(stored).astype(np.float32)

    def _rounded(self, stored: np.ndarray) -> np.ndarray:
        return stored.astype(self.dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """Orbax's arrays; kernels are [in, out], with heads unfolded."""

    checkpoint: Checkpoint
    dtype: jnp.dtype
    interleaved: bool = False

    def embed(self, tokens: Sequence[int]) -> np.ndarray:
        path = _ORBAX["embed"]
        rows = [self.checkpoint.read(path, (slice(i, i + 1),)) for i in tokens]
        return self._float32(np.concatenate(rows))

    def vector(self, name: str, layer: int) -> np.ndarray:
        return self._float32(self._read(name, layer))

    def into(self, x: np.ndarray, name: str, layer: int) -> np.ndarray:
        return self._product(x, self._read(name, layer))

    def back(self, x: np.ndarray, name: str, layer: int) -> np.ndarray:
        return self._product(x, self._read(name, layer))

    def _read(self, name: str, layer: int) -> np.ndarray:
        path = _ORBAX[name]
        if path.startswith("blocks/"):
            return self.checkpoint.read(path, (slice(layer, layer + 1),))[0]
        return self.checkpoint.read(path)

    def _product(self, x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        kernel = kernel.reshape(x.shape[1], -1)
        product = np.zeros((len(x), kernel.shape[1]), np.float32)
        for b in _blocks(kernel.shape):
            part = kernel[b].astype(self.dtype, copy=False)
            product += _times(np.ascontiguousarray(x[:, b]), part)
        return product

    def _float32(self, stored: np.ndarray) -> np.ndarray:
        return stored.astype(self.dtype).astype(np.float32)


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of a matrix that fit into the processor's cache."""
    step = max(1, _BLOCK_VALUES // shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _times(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(_product(x, kernel, "ti,io->to"))


def _times_transposed(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(_product(x, matrix, "ti,oi->to"))


@functools.partial(jax.jit, static_argnames="axes")
def _product(x: jax.Array, matrix: jax.Array, axes: str) -> jax.Array:
    return jnp.einsum(axes, x, matrix.astype(jnp.float32), precision="highest")


def logits(checkpoint: Checkpoint, *, dtype: jnp.dtype) -> np.ndarray:
    """Logits of a fixed row of tokens, float32[T, V], layer by layer.

    Args:
      checkpoint: of any format.
      dtype: that weights are rounded to before they are used.
    """
    config, weights = checkpoint.config, _weights(checkpoint, dtype)
    # <s>, and ids from all over the vocabulary.
    steps = np.arange(_NUM_TOKENS) * 7919
    tokens = [1 % config.vocab_size, *(int(i) % config.vocab_size for i in steps[1:])]
    x_TD = weights.embed(tokens)
    for layer in range(config.num_layers):
        h_TD = _norm(x_TD, weights.vector("attention_norm", layer), config)
        query, key, value = (
            weights.into(h_TD, name, layer) for name in ("query", "key", "value")
        )
        mixed = _attention(query, key, value, config, interleaved=weights.interleaved)
        x_TD = x_TD + weights.back(mixed, "out", layer)
        h_TD = _norm(x_TD, weights.vector("mlp_norm", layer), config)
        gate = weights.into(h_TD, "gate", layer)
        silu = gate / (1 + np.exp(-np.clip(gate, -80, None)))
        up = weights.into(h_TD, "up", layer)
        x_TD = x_TD + weights.back(silu * up, "down", layer)
    h_TD = _norm(x_TD, weights.vector("final_norm", 0), config)
    return weights.into(h_TD, "unembed", 0)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How far logits are apart, relative to the largest of them, or to 1.

    Where weights are NaN, both have to be.
    """
    finite = np.isfinite(ours)
    if not np.array_equal(finite, np.isfinite(theirs)):
        return np.inf
    scale = float(np.abs(ours[finite]).max(initial=1.0))
    return float(np.abs(ours[finite] - theirs[finite]).max(initial=0.0)) / scale


def _weights(checkpoint: Checkpoint, dtype: jnp.dtype) -> _Weights:
    if isinstance(checkpoint, TensorCheckpoint):
        meta = checkpoint.format == "meta"
        return _TensorFiles(checkpoint.shards, _META if meta else _HF, meta, dtype)
    assert isinstance(checkpoint, ParamsCheckpoint), checkpoint
    return _Arrays(checkpoint, dtype)


def _norm(x_TD: np.ndarray, scale_D: np.ndarray, config: LlamaConfig) -> np.ndarray:
    mean_square = np.mean(np.square(x_TD), axis=-1, keepdims=True)
    return x_TD / np.sqrt(mean_square + np.float32(config.norm_eps)) * scale_D


def _attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    config: LlamaConfig,
    *,
    interleaved: bool,
) -> np.ndarray:
    """Causal attention of flat projections, [T, heads * H], and back to that form."""
    T, H = len(query), config.head_dim
    query = _turn(query.reshape(T, -1, H), config, interleaved=interleaved)
    key = _turn(key.reshape(T, -1, H), config, interleaved=interleaved)
    key, value = (
        np.repeat(x, config.group_size, axis=1) for x in (key, value.reshape(T, -1, H))
    )
    scores = np.einsum("tnh,snh->nts", query, key) / np.float32(np.sqrt(H))
    scores = np.where(np.tri(T, dtype=bool), scores, np.float32(-np.inf))
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares = scores / scores.sum(axis=-1, keepdims=True)
    return np.einsum("nts,snh->tnh", shares, value).reshape(T, -1)


def _turn(x_TNH: np.ndarray, config: LlamaConfig, *, interleaved: bool) -> np.ndarray:
    """Turn each pair of features by its position times its frequency."""
    H = config.head_dim
    frequency = config.rope_theta ** (-np.arange(0, H, 2) / H)
    angle_T1h = np.outer(np.arange(len(x_TNH)), frequency)[:, None]
    cos, sin = np.cos(angle_T1h), np.sin(angle_T1h)
    first, second = (
        (slice(0, None, 2), slice(1, None, 2))
        if interleaved
        else (slice(0, H // 2), slice(H // 2, None))
    )
    a, b = x_TNH[..., first], x_TNH[..., second]
    turned = np.empty_like(x_TNH)
    turned[..., first] = a * cos - b * sin
    turned[..., second] = b * cos + a * sin
    return turned
