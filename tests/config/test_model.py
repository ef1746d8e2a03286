"""The architecture: presets against the published numbers, files, refusals."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from llama_jax.config import LlamaConfig
from llama_jax.config.model import hidden_dim
from llama_jax.errors import ConfigError
from llama_jax.model import num_params
from llama_jax.model.count import (
    abstract_params,
    cache_bytes_per_token,
    num_matmul_params,
    train_flops_per_token,
)

# Arxiv 2302.13971 and 2307.09288, Tables 1 and 2, and the released params.json. The
# columns: vocab_size, dim, num_layers, num_heads, num_kv_heads, hidden_dim, norm_eps,
# rope_theta, max_length; then the exact number of parameters.
GOLDEN = {
    "llama1_7b": (32000, 4096, 32, 32, 32, 11008, 1e-6, 1e4, 2048, 6_738_415_616),
    "llama1_13b": (32000, 5120, 40, 40, 40, 13824, 1e-6, 1e4, 2048, 13_015_864_320),
    "llama1_33b": (32000, 6656, 60, 52, 52, 17920, 1e-6, 1e4, 2048, 32_528_943_616),
    "llama1_65b": (32000, 8192, 80, 64, 64, 22016, 1e-5, 1e4, 2048, 65_285_660_672),
    "llama2_7b": (32000, 4096, 32, 32, 32, 11008, 1e-5, 1e4, 4096, 6_738_415_616),
    "llama2_13b": (32000, 5120, 40, 40, 40, 13824, 1e-5, 1e4, 4096, 13_015_864_320),
    "llama2_34b": (32000, 8192, 48, 64, 8, 22016, 1e-5, 1e4, 4096, 33_743_970_304),
    "llama2_70b": (32000, 8192, 80, 64, 8, 28672, 1e-5, 1e4, 4096, 68_976_648_192),
    "tiny": (256, 64, 2, 8, 4, 160, 1e-5, 1e4, 128, 119_104),
}

# As Meta's files say it.
PARAMS_7B = (
    '{"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, '
    '"norm_eps": 1e-05, "vocab_size": -1}'
)
PARAMS_70B = (
    '{"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, '
    '"n_kv_heads": 8, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1}'
)
HF_7B = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32000,
}


@pytest.mark.parametrize("name", GOLDEN)
def test_every_field_and_the_parameter_count_of_a_preset(name):
    config = getattr(LlamaConfig, name)()
    *fields, count = GOLDEN[name]
    assert dataclasses.astuple(config) == tuple(fields)
    assert num_params(config) == count
    leaves = jax.tree.leaves(abstract_params(config))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == count
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)


def test_no_preset_is_left_out():
    made = {
        name
        for name in vars(LlamaConfig)
        if name == "tiny" or name.startswith(("llama1_", "llama2_"))
    }
    assert made == set(GOLDEN)


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        ("llama2_7b", 524_288),
        ("llama2_13b", 819_200),
        ("llama2_34b", 196_608),
        ("llama2_70b", 327_680),
    ],
)
def test_bytes_that_the_cache_takes_per_token(name, num_bytes):
    config = getattr(LlamaConfig, name)()
    assert cache_bytes_per_token(config, dtype=jnp.bfloat16) == num_bytes
    assert cache_bytes_per_token(config, dtype=jnp.float32) == 2 * num_bytes


def test_grouped_queries_make_the_70bs_cache_an_eighth():
    grouped = LlamaConfig.llama2_70b()
    plain = dataclasses.replace(grouped, num_kv_heads=64)
    assert (grouped.group_size, grouped.head_dim) == (8, 128)
    assert cache_bytes_per_token(plain, dtype=jnp.bfloat16) == 2_621_440


def test_flops_of_a_token():
    config = LlamaConfig.llama2_7b()
    assert num_matmul_params(config) == 6_738_415_616 - 32_000 * 4096 - 65 * 4096
    # Six per matrix parameter, and half of 12 L D T for causal attention.
    assert train_flops_per_token(config, 4096) == pytest.approx(
        6 * num_matmul_params(config) + 12 * 32 * 4096 * 4096 / 2
    )


def test_the_feed_forward_width_is_rounded_as_metas():
    assert hidden_dim(8192, multiple_of=4096, ffn_dim_multiplier=1.3) == 28672
    assert hidden_dim(4096, multiple_of=256, ffn_dim_multiplier=None) == 11008
    # 1.3 x 21845 is 28398.5; rounded down first, this is a multiple already.
    assert hidden_dim(8192, multiple_of=28398, ffn_dim_multiplier=1.3) == 28398


@pytest.mark.parametrize(
    ("text", "preset"), [(PARAMS_7B, "llama2_7b"), (PARAMS_70B, "llama2_70b")]
)
def test_params_json_gives_the_preset(tmp_path, text, preset):
    file = tmp_path / "params.json"
    file.write_text(text)
    expected = getattr(LlamaConfig, preset)()
    for source in (file, str(file), json.loads(text)):
        made = LlamaConfig.from_params_json(source, max_length=4096, vocab_size=32000)
        assert made == expected


def test_params_json_of_code_llama():
    params = {**json.loads(PARAMS_7B), "vocab_size": 32016, "rope_theta": 1_000_000}
    config = LlamaConfig.from_params_json(
        {**params, "use_scaled_rope": False, "max_seq_len": 2048, "max_batch_size": 8},
        max_length=16384,
    )
    assert (config.rope_theta, config.vocab_size) == (1e6, 32016)
    assert isinstance(config.rope_theta, float)
    assert config.max_length == 16384


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        ("oracle/s1_mha_mp1_bf16", (64, 2, 4, 4, 192)),
        ("oracle/s2_gqa_mp2_fp16", (96, 2, 6, 2, 384)),
        ("oracle/s3_gqa_mp4_bf16_flat", (64, 3, 8, 4, 176)),
        ("stories260K/meta_mp1_fp32", (64, 5, 8, 4, 172)),
        ("stories260K/meta_mp4_fp32", (64, 5, 8, 4, 172)),
    ],
)
def test_params_json_of_metas_layout(reference, case, sizes):
    config = LlamaConfig.from_params_json(
        reference / case / "params.json", max_length=64, vocab_size=512
    )
    assert dataclasses.astuple(config) == (512, *sizes, 1e-5, 1e4, 64)


def test_hf_config_is_that_of_the_same_weights_in_metas_layout(reference):
    made = LlamaConfig.from_hf_config(reference / "oracle/s2_gqa_hf_fp16/config.json")
    assert made == LlamaConfig.from_params_json(
        reference / "oracle/s2_gqa_mp2_fp16/params.json",
        max_length=4096,
        vocab_size=514,
    )


@pytest.mark.parametrize(
    ("more", "change"),
    [
        ({}, {}),
        ({"num_key_value_heads": 8, "head_dim": 128}, {"num_kv_heads": 8}),
        ({"rope_theta": 1e6, "rope_scaling": None}, {"rope_theta": 1e6}),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            {"rope_theta": 5e5},
        ),
        ({"attention_bias": False, "mlp_bias": False, "head_dim": None}, {}),
    ],
)
def test_hf_config(more, change):
    made = LlamaConfig.from_hf_config({**HF_7B, **more})
    assert made == dataclasses.replace(LlamaConfig.llama2_7b(), **change)


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.rope_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"model_type": "mistral"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"head_dim": 64}, "head_dim"),
        ({"num_key_value_heads": 5}, "num_kv_heads 5"),
        ({"hidden_size": "4096"}, "dim must be a positive integer, not '4096'"),
        ({"rope_theta": "high"}, "rope_theta must be a positive number"),
    ],
)
def test_an_hf_config_of_another_model_is_refused_by_field(more, field):
    with pytest.raises(ConfigError) as caught:
        LlamaConfig.from_hf_config({**HF_7B, **more})
    assert str(caught.value).startswith(f"config.json: {field}")


@pytest.mark.parametrize("field", sorted(HF_7B.keys() - {"model_type", "hidden_act"}))
def test_an_hf_config_without_a_size_is_refused(field):
    config = {name: value for name, value in HF_7B.items() if name != field}
    with pytest.raises(ConfigError, match=f"'{field}' is missing"):
        LlamaConfig.from_hf_config(config)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_layer": 32}, "unknown key 'n_layer'. Did you mean 'n_layers'?"),
        ({"dropout": 0.1}, "unknown key 'dropout'"),
        ({"use_scaled_rope": True}, "use_scaled_rope is true"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, not 0"),
        ({"dim": 0}, "dim must be a positive integer, not 0"),
        ({"dim": -4096}, "dim must be a positive integer, not -4096"),
        ({"dim": 4100}, "dim 4100 does not divide into num_heads 32"),
        ({"dim": 96}, "= 3 is odd"),
        ({"n_heads": 0}, "n_heads must be a positive integer"),
        ({"n_layers": 32.0}, "n_layers must be a positive integer, not 32.0"),
        ({"n_layers": True}, "n_layers must be a positive integer, not True"),
        ({"multiple_of": -256}, "multiple_of must be a positive integer"),
        ({"n_kv_heads": 5}, "choose one of [1, 2, 4, 8, 16, 32]"),
        ({"n_kv_heads": -8}, "num_kv_heads must be a positive integer"),
        ({"norm_eps": 0}, "norm_eps must be a positive number"),
        ({"norm_eps": float("nan")}, "norm_eps must be a positive number"),
        ({"norm_eps": "1e-5"}, "norm_eps must be a positive number"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number"),
        ({"rope_theta": "base"}, "rope_theta must be a positive number, not 'base'"),
        ({"ffn_dim_multiplier": -1.0}, "ffn_dim_multiplier must be a positive number"),
        ({"ffn_dim_multiplier": "big"}, "ffn_dim_multiplier must be a positive"),
    ],
)
def test_impossible_params_are_refused(change, says):
    params = {**json.loads(PARAMS_7B), "vocab_size": 32000, **change}
    with pytest.raises(ConfigError) as caught:
        LlamaConfig.from_params_json(params, max_length=4096)
    assert str(caught.value).startswith("params.json: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "key", ["dim", "n_layers", "n_heads", "multiple_of", "norm_eps"]
)
def test_params_without_a_key_are_refused(key):
    params = json.loads(PARAMS_7B)
    del params[key]
    with pytest.raises(ConfigError, match=f"the key '{key}' is missing"):
        LlamaConfig.from_params_json(params, max_length=4096, vocab_size=32000)


def _from_params(path):
    return LlamaConfig.from_params_json(path, max_length=4096, vocab_size=32000)


@pytest.mark.parametrize("read", [_from_params, LlamaConfig.from_hf_config])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        (b"{'dim': 4096}", "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[4096]", "holds list, not an object"),
    ],
)
def test_a_file_that_is_not_a_json_object_is_refused(tmp_path, read, content, says):
    file = tmp_path / "file.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read(file)
    assert str(file) in str(caught.value)
    assert says in str(caught.value)
