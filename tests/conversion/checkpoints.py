"""One small model in all three formats, written by the maker and by plain code."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llama_jax.conversion.safetensors import header_of
from tests.reference import meta_checkpoint

# Of the made checkpoint: `params.json` does not say it.
MAX_LENGTH = 64


def write_hf(
    directory: Path, tensors: Mapping[str, np.ndarray], *, num_files: int = 1, **config
) -> Path:
    """A directory of Hugging Face's from tensors by Meta's names."""
    directory.mkdir(parents=True, exist_ok=True)
    named = list(hf_tensors(tensors).items())
    weight_map = {}
    for number in range(num_files):
        part = dict(named[number::num_files])
        name = (
            "model.safetensors"
            if num_files == 1
            else f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        )
        write_safetensors(directory / name, part)
        weight_map |= dict.fromkeys(part, name)
    if num_files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(hf_config() | config))
    return directory


def write_safetensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """One file of tensors of one type."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    dtype = next(iter(tensors.values())).dtype
    header, _ = header_of(shapes, dtype)
    file.write_bytes(header + b"".join(t.tobytes() for t in tensors.values()))


def hf_config() -> dict:
    """`config.json` of the made checkpoint."""
    params = meta_checkpoint.PARAMS
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": params["dim"],
        "intermediate_size": meta_checkpoint.HIDDEN_DIM,
        "max_position_embeddings": MAX_LENGTH,
        "num_attention_heads": params["n_heads"],
        "num_hidden_layers": params["n_layers"],
        "num_key_value_heads": params["n_kv_heads"],
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": 10000.0,
        "vocab_size": meta_checkpoint.VOCAB_SIZE,
    }


def hf_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Meta's tensors by Hugging Face's names, rotary pairs half a head apart.

    Spelt out, with nothing of the converter's.
    """
    renamed = {
        "tok_embeddings": "model.embed_tokens",
        "norm": "model.norm",
        "output": "lm_head",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    }
    width = meta_checkpoint.PARAMS["dim"] // meta_checkpoint.PARAMS["n_heads"]
    found = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if stem.startswith("layers."):
            _, layer, part = stem.split(".", 2)
            new = f"model.layers.{layer}.{renamed[part]}.weight"
            if part in ("attention.wq", "attention.wk"):
                heads = tensor.reshape(-1, width, tensor.shape[1])
                halves = np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1)
                tensor = halves.reshape(tensor.shape)
        else:
            new = f"{renamed[stem]}.weight"
        found[new] = np.ascontiguousarray(tensor)
    return found
