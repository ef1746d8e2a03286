"""A second Llama to compare with: float64 NumPy, on tensors as Meta names them.

Written from the paper and Meta's layout alone. It shares no code with `llama_jax`:
rotary pairs are complex numbers of neighbouring features, matrices are [out, in],
blocks are a Python loop. `params` is the content of `params.json`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray]


def logits(params: Mapping[str, Any], tensors: Tensors, tokens) -> np.ndarray:
    """Scores [B, T, V] of the next token at every position of tokens [B, T]."""

    def weight(name: str) -> np.ndarray:
        return np.asarray(tensors[name], np.float64)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        mean_square = (x**2).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + params["norm_eps"]) * weight(name)

    x = weight("tok_embeddings.weight")[np.asarray(tokens)]
    for layer in range(params["n_layers"]):
        block = f"layers.{layer}"
        h = norm(x, f"{block}.attention_norm.weight")
        q, k, v = (h @ weight(f"{block}.attention.w{name}.weight").T for name in "qkv")
        x = x + _attention(params, q, k, v) @ weight(f"{block}.attention.wo.weight").T
        h = norm(x, f"{block}.ffn_norm.weight")
        gate = h @ weight(f"{block}.feed_forward.w1.weight").T
        up = h @ weight(f"{block}.feed_forward.w3.weight").T
        silu = gate / (1 + np.exp(-gate))
        x = x + (silu * up) @ weight(f"{block}.feed_forward.w2.weight").T
    return norm(x, "norm.weight") @ weight("output.weight").T


def log_probs(scores: np.ndarray) -> np.ndarray:
    """The logarithm of the softmax over the last axis."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def loss(params: Mapping[str, Any], tensors: Tensors, tokens) -> float:
    """Mean cross-entropy, in nats, of each token given those before it."""
    tokens = np.asarray(tokens)
    predicted = log_probs(logits(params, tensors, tokens)[:, :-1])
    return float(-np.take_along_axis(predicted, tokens[:, 1:, None], axis=-1).mean())


def generate(
    params: Mapping[str, Any], tensors: Tensors, prompt: Sequence[int], num_tokens: int
) -> list[int]:
    """The likeliest continuation, token by token, without a cache or a stop."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(logits(params, tensors, [tokens])[0, -1].argmax()))
    return tokens[len(prompt) :]


def _attention(params: Mapping[str, Any], q, k, v) -> np.ndarray:
    """Causal attention of projections [B, T, heads * width], back in that form."""
    num_heads = params["n_heads"]
    num_kv_heads = params.get("n_kv_heads") or num_heads
    batch, length, dim = q.shape
    width = dim // num_heads
    q = _turn(q.reshape(batch, length, num_heads, width), params)
    k = _turn(k.reshape(batch, length, num_kv_heads, width), params)
    v = v.reshape(batch, length, num_kv_heads, width)
    # Each key/value head serves the same number of consecutive query heads.
    k, v = (x.repeat(num_heads // num_kv_heads, axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(width)
    future = np.triu(np.ones((length, length), bool), 1)
    weights = np.exp(log_probs(np.where(future, -np.inf, scores)))
    return np.einsum("bnts,bsnh->btnh", weights, v).reshape(batch, length, dim)


def _turn(x: np.ndarray, params: Mapping[str, Any]) -> np.ndarray:
    """Turn each pair of neighbours by its position times its frequency."""
    _, length, _, width = x.shape
    base = params.get("rope_theta", 10_000.0)
    frequency = base ** (-np.arange(0, width, 2) / width)
    turn = np.exp(1j * np.outer(np.arange(length), frequency))[:, None]
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
