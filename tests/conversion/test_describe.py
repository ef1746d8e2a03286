"""What other programs read of a model: the published files, and any sizes."""

import json

import jax.numpy as jnp
import pytest

from llama_jax.config import LlamaConfig
from llama_jax.conversion.describe import hf_files, params_json

# As published, but for `vocab_size`, which there is -1: no tokenizer is given here.
PUBLISHED = {
    "llama2_7b": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32},
    "llama2_13b": {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40},
    "llama2_70b": {
        "dim": 8192,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
        "n_heads": 64,
        "n_kv_heads": 8,
        "n_layers": 80,
    },
}
PRESETS = [*PUBLISHED, "llama2_34b", "llama1_7b", "llama1_33b", "llama1_65b", "tiny"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_params_are_those_that_meta_published(name):
    found = json.loads(params_json(getattr(LlamaConfig, name)(), None))
    assert found == PUBLISHED[name] | {"norm_eps": 1e-5, "vocab_size": 32_000}


@pytest.mark.parametrize("name", PRESETS)
def test_both_files_say_the_same_model(name):
    config = getattr(LlamaConfig, name)()
    params = json.loads(params_json(config, None))
    assert config == LlamaConfig.from_params_json(params, max_length=config.max_length)
    described = json.loads(hf_files(config, jnp.dtype("bfloat16"), None)["config.json"])
    assert config == LlamaConfig.from_hf_config(described)
    assert described["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("hidden_dim", [1, 7, 255, 256, 1000, 2731, 28673, 99_991])
@pytest.mark.parametrize("rope_theta", [1e4, 1e6])
def test_any_width_can_be_said(hidden_dim, rope_theta):
    config = LlamaConfig(
        vocab_size=100,
        dim=96,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        hidden_dim=hidden_dim,
        norm_eps=1e-6,
        rope_theta=rope_theta,
        max_length=64,
    )
    params = json.loads(params_json(config, None))
    assert config == LlamaConfig.from_params_json(params, max_length=64)
    assert ("rope_theta" in params) == (rope_theta != 1e4)
