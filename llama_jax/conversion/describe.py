"""What other programs want to know of a model, in the files that they read.

`params.json` for Meta's code; `config.json` and its companions for transformers, 4.31
and later, and for llama.cpp's converter.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from llama_jax.config import LlamaConfig
from llama_jax.config.model import hidden_dim
from llama_jax.conversion.tokenizer_json import special_token, tokenizer_json
from llama_jax.errors import CheckpointError
from llama_jax.text import Tokenizer

# The pairs that Meta's releases use (7B to 65B, Code Llama; 70B), tried first.
_RELEASED_WIDTHS = ((256, None), (4096, 1.3), (256, 1.3))
_ROPE_THETA = 1e4  # what Meta's code takes when nothing is said
# The release whose format of config.json it is; later ones read it as well.
_TRANSFORMERS = "4.31.0"


def params_json(config: LlamaConfig, tokenizer: Tokenizer | None) -> str:
    """The content of `params.json`.

    `vocab_size` is -1, as in Meta's releases, where the tokenizer says it.
    """
    multiple_of, multiplier = _width_rule(config)
    params: dict[str, Any] = {"dim": config.dim, "multiple_of": multiple_of}
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    params["n_heads"] = config.num_heads
    if config.num_kv_heads != config.num_heads:
        params["n_kv_heads"] = config.num_kv_heads
    params["n_layers"] = config.num_layers
    params["norm_eps"] = config.norm_eps
    said = tokenizer is not None and tokenizer.vocab_size == config.vocab_size
    params["vocab_size"] = -1 if said else config.vocab_size
    if config.rope_theta != _ROPE_THETA:
        params["rope_theta"] = config.rope_theta
    return json.dumps(params) + "\n"


def hf_files(
    config: LlamaConfig, dtype: jnp.dtype, tokenizer: Tokenizer | None
) -> Mapping[str, str]:
    """The content of `config.json` and what stands beside it, by file name."""
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    described = {
        "architectures": ["LlamaForCausalLM"],
        **ids,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "initializer_range": 0.02,
        "intermediate_size": config.hidden_dim,
        "max_position_embeddings": config.max_length,
        "model_type": "llama",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": dtype.name,
        "transformers_version": _TRANSFORMERS,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    generation = {
        **ids,
        "transformers_version": _TRANSFORMERS,
    }
    contents: dict[str, Any] = {"generation_config.json": generation}
    if tokenizer is not None:
        special = {
            f"{name}_token": special_token(tokenizer.piece(id))
            for name, id in (("unk", 0), ("bos", 1), ("eos", 2))
        }
        fast = tokenizer_json(tokenizer.model_bytes)
        contents["special_tokens_map.json"] = special
        contents["tokenizer_config.json"] = {
            "add_bos_token": True,
            "add_eos_token": False,
            **{
                name: {"__type": "AddedToken", **token}
                for name, token in special.items()
            },
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            # Or releases before 5 add token types, which no Llama takes.
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": config.max_length,
            "pad_token": None,
            "padding_side": "left",
            "sp_model_kwargs": dict[str, str](),
            # LlamaTokenizer of transformers 5 would not do as tokenizer.json says.
            "tokenizer_class": "PreTrainedTokenizerFast" if fast else "LlamaTokenizer",
        }
        if fast:
            contents["tokenizer.json"] = fast
    # Last, for it is what others look for first.
    contents["config.json"] = described
    return {name: json.dumps(c, indent=2) + "\n" for name, c in contents.items()}


def _width_rule(config: LlamaConfig) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` by which Meta's code finds this width."""
    width = config.hidden_dim
    # In general: no rounding, and a factor half a unit above what gives the width.
    factor = (width + 0.5) / int(2 * (4 * config.dim) / 3)
    divisors = (2**n for n in range(int(math.log2(width)) + 1))
    plain = [(m, None) for m in reversed(list(divisors)) if width % m == 0]
    for multiple_of, multiplier in (*_RELEASED_WIDTHS, *plain, (1, factor)):
        found = hidden_dim(
            config.dim, multiple_of=multiple_of, ffn_dim_multiplier=multiplier
        )
        if found == width:
            return multiple_of, multiplier
    raise CheckpointError(
        f"Meta's params.json cannot say hidden_dim {width} with dim {config.dim}."
    )
