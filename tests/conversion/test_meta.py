"""Meta's checkpoints become our leaves, whole and in slices."""

import json
import logging

import jax
import ml_dtypes
import numpy as np
import pytest

from llama_jax.config import LlamaConfig
from llama_jax.conversion.meta import read_meta
from llama_jax.conversion.pth import read_pth
from tests.reference import meta_checkpoint

CASES = (
    "oracle/s1_mha_mp1_bf16",
    "oracle/s2_gqa_mp2_fp16",
    "oracle/s3_gqa_mp4_bf16_flat",
    "stories260K/meta_mp1_fp32",
    "stories260K/meta_mp4_fp32",
)


def _leaves(tensors, params):
    """Our tree from whole tensors, spelt out instead of read from the table."""
    dim, heads = params["dim"], params["n_heads"]
    width = dim // heads

    def stack(name, convert=np.transpose):
        names = [f"layers.{i}.{name}.weight" for i in range(params["n_layers"])]
        return np.stack([convert(tensors[name]) for name in names])

    def heads_last(matrix):
        return matrix.T.reshape(dim, -1, width)

    def rotary(matrix):
        by_head = heads_last(matrix)
        return np.concatenate([by_head[..., 0::2], by_head[..., 1::2]], axis=-1)

    return {
        "embed/table": tensors["tok_embeddings.weight"],
        "blocks/attention_norm/scale": stack("attention_norm"),
        "blocks/attention/query": stack("attention.wq", rotary),
        "blocks/attention/key": stack("attention.wk", rotary),
        "blocks/attention/value": stack("attention.wv", heads_last),
        "blocks/attention/out": stack(
            "attention.wo", lambda matrix: matrix.T.reshape(heads, width, dim)
        ),
        "blocks/mlp_norm/scale": stack("ffn_norm"),
        "blocks/mlp/gate": stack("feed_forward.w1"),
        "blocks/mlp/up": stack("feed_forward.w3"),
        "blocks/mlp/down": stack("feed_forward.w2"),
        "final_norm/scale": tensors["norm.weight"],
        "unembed/kernel": tensors["output.weight"].T,
    }


def _assert_same(checkpoint, expected):
    assert checkpoint.shapes == {path: leaf.shape for path, leaf in expected.items()}
    for path, leaf in expected.items():
        found = checkpoint.read(path)
        assert found.dtype == checkpoint.dtype
        assert np.array_equal(found, leaf), path


@pytest.fixture(scope="module")
def tensors():
    return meta_checkpoint.random_tensors()


@pytest.fixture(scope="module")
def leaves(tensors):
    return _leaves(tensors, meta_checkpoint.PARAMS)


@pytest.fixture(scope="module")
def sharded(tensors, tmp_path_factory):
    """The made checkpoint in four shards, open."""
    directory = tmp_path_factory.mktemp("sharded")
    shards = meta_checkpoint.split(tensors, 4)
    meta_checkpoint.write_checkpoint(directory, shards)
    return read_meta(directory, max_length=64)


@pytest.mark.parametrize("shared_storage", [False, True])
@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_leaf_of_a_made_checkpoint(
    tmp_path, tensors, dtype, num_shards, shared_storage
):
    cast = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    shards = meta_checkpoint.split(cast, num_shards)
    meta_checkpoint.write_checkpoint(tmp_path, shards, shared_storage=shared_storage)
    checkpoint = read_meta(tmp_path, max_length=64)
    assert checkpoint.dtype == dtype
    _assert_same(checkpoint, _leaves(cast, meta_checkpoint.PARAMS))


def test_the_configuration_is_that_of_the_files(sharded):
    assert sharded.config == LlamaConfig(
        vocab_size=meta_checkpoint.VOCAB_SIZE,
        dim=32,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        hidden_dim=meta_checkpoint.HIDDEN_DIM,
        norm_eps=1e-5,
        rope_theta=1e4,
        max_length=64,
    )


def test_a_slice_is_that_slice_of_the_leaf(sharded, leaves):
    rng = np.random.default_rng(2)
    for path, leaf in leaves.items():
        for _ in range(12):
            bounds = [sorted(rng.integers(0, size + 1, 2)) for size in leaf.shape]
            index = tuple(slice(*map(int, pair)) for pair in bounds)
            assert np.array_equal(sharded.read(path, index), leaf[index]), (path, index)


def test_leading_and_open_slices_are_enough(sharded, leaves):
    path = "blocks/attention/key"
    for index in ((slice(1, 2),), (slice(None), slice(8), slice(2, None))):
        assert np.array_equal(sharded.read(path, index), leaves[path][index])


def test_a_sharded_array_is_built_from_slices(sharded, leaves):
    mesh = jax.make_mesh(
        (2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    sharding = jax.NamedSharding(mesh, jax.P(None, "fsdp", "tensor", None))
    path, asked = "blocks/attention/query", []

    def read(index):
        asked.append(index)
        return sharded.read(path, index)

    array = jax.make_array_from_callback(sharded.shapes[path], sharding, read)
    assert np.array_equal(array, leaves[path])
    assert {sharded.read(path, index).size for index in asked} == {array.size // 8}


def test_the_tokenizer_is_found_here_or_one_directory_up(tmp_path, tensors):
    directory = tmp_path / "llama-2-tiny"
    meta_checkpoint.write_checkpoint(directory, [tensors])
    assert read_meta(directory, max_length=64).tokenizer_path is None
    for place in (tmp_path, directory):
        (place / "tokenizer.model").touch()
        found = read_meta(directory, max_length=64).tokenizer_path
        assert found == place / "tokenizer.model"


def test_derived_tensors_are_ignored_and_said(tmp_path, tensors, leaves, caplog):
    derived = {
        name: np.ones(2, np.float32)
        for name in ("rope.freqs", "layers.1.attention.inner_attention.rope.freqs")
    }
    meta_checkpoint.write_checkpoint(tmp_path, [tensors | derived])
    with caplog.at_level(logging.INFO):
        checkpoint = read_meta(tmp_path, max_length=64)
    assert all(name in caplog.text for name in derived)
    assert f"vocab_size {meta_checkpoint.VOCAB_SIZE}" in caplog.text
    _assert_same(checkpoint, leaves)


@pytest.mark.parametrize("case", CASES)
def test_every_leaf_of_a_reference_checkpoint(reference, case):
    directory = reference / case
    shards = [read_pth(file) for file in sorted(directory.glob("*.pth"))]
    params = json.loads((directory / "params.json").read_text())
    expected = _leaves(meta_checkpoint.merge(shards), params)
    _assert_same(read_meta(directory, max_length=64), expected)


def test_one_and_four_shards_hold_the_weights_of_llama2_c(reference):
    directory = reference / "stories260K"
    one = read_meta(directory / "meta_mp1_fp32", max_length=512)
    four = read_meta(directory / "meta_mp4_fp32", max_length=512)
    config = one.config
    assert config == four.config
    header = np.fromfile(directory / "stories260K.bin", np.int32, 7)
    assert header.tolist() == [
        config.dim,
        config.hidden_dim,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.vocab_size,
        config.max_length,
    ]
    values = np.fromfile(directory / "stories260K.bin", np.float32, offset=28)
    layers, dim, hidden, vocab = (
        config.num_layers,
        config.dim,
        config.hidden_dim,
        config.vocab_size,
    )
    kv_dim = config.head_dim * config.num_kv_heads
    shapes = {  # in the order of that file
        "tok_embeddings": (vocab, dim),
        "attention_norm": (layers, dim),
        "attention.wq": (layers, dim, dim),
        "attention.wk": (layers, kv_dim, dim),
        "attention.wv": (layers, kv_dim, dim),
        "attention.wo": (layers, dim, dim),
        "ffn_norm": (layers, dim),
        "feed_forward.w1": (layers, hidden, dim),
        "feed_forward.w2": (layers, dim, hidden),
        "feed_forward.w3": (layers, hidden, dim),
        "norm": (dim,),
    }
    tensors, start = {}, 0
    for name, shape in shapes.items():
        stop = start + int(np.prod(shape))
        stored, start = values[start:stop].reshape(shape), stop
        if shape[0] == layers:
            tensors |= {f"layers.{i}.{name}.weight": w for i, w in enumerate(stored)}
        else:
            tensors[f"{name}.weight"] = stored
    tensors["output.weight"] = tensors["tok_embeddings.weight"]  # tied in that file
    params = {"dim": dim, "n_heads": config.num_heads, "n_layers": layers}
    expected = _leaves(tensors, params)
    _assert_same(one, expected)
    _assert_same(four, expected)
