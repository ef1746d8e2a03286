"""Sizes by arithmetic: parameters, FLOPs, bytes; nothing is built."""

import functools

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig
from llama_jax.config.model import Head
from llama_jax.model.heads import MODELS
from sharding.axes import Tree


@functools.cache
def abstract_params(config: LlamaConfig, head: Head = "unembed") -> Tree:
    """The tree of parameters as shapes and types (float32), without memory."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    key = jax.eval_shape(jax.random.key, 0)
    shapes = jax.eval_shape(MODELS[head](config).init, key, tokens)
    return shapes["params"]


def num_params(config: LlamaConfig, head: Head = "unembed") -> int:
    """All parameters: 2 V D + L (2 D² + 2 D K H + 3 D F + 2 D) + D.

    A model that gives one number has D instead of the last V D.
    """
    D, F, L = config.dim, config.hidden_dim, config.num_layers
    kv_width = config.num_kv_heads * config.head_dim
    block = 2 * D * D + 2 * D * kv_width + 3 * D * F + 2 * D
    width = config.vocab_size if head == "unembed" else 1
    return config.vocab_size * D + L * block + D + width * D


def num_matmul_params(config: LlamaConfig, head: Head = "unembed") -> int:
    """Parameters that multiply: without the embedding table and the norms' scales."""
    D, L = config.dim, config.num_layers
    return num_params(config, head) - config.vocab_size * D - L * 2 * D - D


def train_flops_per_token(
    config: LlamaConfig, sequence_length: int, head: Head = "unembed"
) -> float:
    """Model FLOPs of one token's forward and backward pass.

    6 per matrix parameter, and causal attention: 6 L D T, half of the full square
    (arXiv 2204.02311, appendix B, with the causal half). Recomputation does not count.
    """
    attention = 6 * config.num_layers * config.dim * sequence_length
    return 6 * num_matmul_params(config, head) + attention


def cache_bytes_per_token(config: LlamaConfig, *, dtype: jnp.dtype) -> int:
    """Bytes that one position of one row takes in the key/value cache."""
    width = config.num_kv_heads * config.head_dim
    return 2 * config.num_layers * width * jnp.dtype(dtype).itemsize
