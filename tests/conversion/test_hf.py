"""Hugging Face's checkpoints: what people have, whole or not."""

import json
import logging
import os

import ml_dtypes
import numpy as np
import pytest

import llama_jax
from llama_jax.conversion import open_checkpoint
from llama_jax.conversion.hf import read_hf
from llama_jax.errors import CheckpointError, ConfigError
from tests.conversion.checkpoints import (
    MAX_LENGTH,
    hf_tensors,
    write_hf,
    write_safetensors,
)
from tests.reference import meta_checkpoint

TENSORS = {
    name: tensor.astype(ml_dtypes.bfloat16)
    for name, tensor in meta_checkpoint.random_tensors().items()
}
NAMED = hf_tensors(TENSORS)
TOKENS = np.random.default_rng(0).integers(0, meta_checkpoint.VOCAB_SIZE, (2, 12))


def rewrite(directory, change) -> None:
    """One file again, with tensors changed."""
    (file,) = directory.glob("*.safetensors")
    tensors = dict(NAMED)
    change(tensors)
    write_safetensors(file, tensors)


@pytest.fixture
def directory(tmp_path):
    return write_hf(tmp_path / "a model", TENSORS)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Logits by way of Meta's format."""
    place = tmp_path_factory.mktemp("meta")
    meta_checkpoint.write_checkpoint(place, [TENSORS])
    return llama_jax.load(place, dtype="float32").logits(TOKENS)


@pytest.mark.parametrize("num_files", [1, 3])
def test_it_is_the_model_that_metas_files_hold(tmp_path, expected, num_files):
    write_hf(tmp_path, TENSORS, num_files=num_files)
    llm = llama_jax.load(tmp_path, dtype="float32")
    assert np.array_equal(llm.logits(TOKENS), expected)
    assert llm.config.max_length == MAX_LENGTH


def test_what_is_loaded_outlives_its_files(tmp_path):
    """Parameters are no views of mapped files, which another program may change."""
    tensors = meta_checkpoint.random_tensors()
    meta_checkpoint.write_checkpoint(tmp_path, [tensors])
    llm = llama_jax.load(tmp_path, dtype="float32")
    for file in tmp_path.glob("*.pth"):
        with file.open("r+b") as stream:
            stream.write(bytes(file.stat().st_size))
    table = np.asarray(llm.params["embed"]["table"])
    assert np.array_equal(table, tensors["tok_embeddings.weight"])


def test_the_hugging_face_twin_of_a_reference_checkpoint(reference):
    meta = open_checkpoint(reference / "oracle/s2_gqa_mp2_fp16", max_length=64)
    twin = open_checkpoint(reference / "oracle/s2_gqa_hf_fp16", max_length=64)
    assert len(twin.files) == 3 and twin.format == "hf"
    for path in meta.shapes:
        assert np.array_equal(meta.read(path), twin.read(path)), path


@pytest.mark.parametrize("num_files", [1, 2])
def test_pytorch_files(tmp_path, expected, num_files):
    weight_map = {}
    named = list(NAMED.items())
    for number in range(num_files):
        name = f"pytorch_model-{number + 1:05}-of-{num_files:05}.bin"
        name = "pytorch_model.bin" if num_files == 1 else name
        meta_checkpoint.write_pth(tmp_path / name, dict(named[number::num_files]))
        weight_map |= {key: name for key, _ in named[number::num_files]}
    if num_files > 1:
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    config = json.loads((write_hf(tmp_path / "x", TENSORS) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert np.array_equal(
        llama_jax.load(tmp_path, dtype="float32").logits(TOKENS), expected
    )


def test_safetensors_before_pytorch_files(directory, caplog):
    (directory / "pytorch_model.bin").write_bytes(b"not looked at")
    with caplog.at_level(logging.INFO):
        read_hf(directory)
    assert "read model.safetensors, not pytorch_model.bin" in caplog.text


def test_links_into_a_cache(tmp_path, expected):
    """The layout that huggingface_hub keeps: blobs, and a directory of links."""
    cache = tmp_path / "models--meta-llama--Llama-2-7b-hf"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "01c7f73d"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in write_hf(tmp_path / "x", TENSORS, num_files=2).iterdir():
        blob = blobs / str(abs(hash(file.name)))
        os.rename(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("01c7f73d")
    for path in (snapshot, cache):
        llm = llama_jax.load(path, dtype="float32")
        assert np.array_equal(llm.logits(TOKENS), expected)
    (cache / "refs" / "main").unlink()
    assert open_checkpoint(cache, max_length=1).directory == snapshot
    (cache / "snapshots" / "other").mkdir()
    with pytest.raises(CheckpointError, match="revisions 01c7f73d, other: give one"):
        open_checkpoint(cache, max_length=1)


def test_a_link_that_leads_nowhere(tmp_path):
    write_hf(tmp_path, TENSORS, num_files=2)
    file = tmp_path / "model-00002-of-00002.safetensors"
    file.unlink()
    file.symlink_to(tmp_path / "blobs" / "gone")
    with pytest.raises(
        CheckpointError, match=r"00002-of-00002.* is missing, but .*ind"
    ):
        read_hf(tmp_path)


def test_rotary_frequencies_are_ignored_and_said(directory, caplog):
    extra = {"model.rotary_emb.inv_freq": np.ones(2, ml_dtypes.bfloat16)}
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        extra[name] = np.ones(2, ml_dtypes.bfloat16)
    rewrite(directory, lambda tensors: tensors.update(extra))
    with caplog.at_level(logging.INFO):
        read_hf(directory)
    assert all(name in caplog.text for name in extra)


def test_code_llamas_base_and_a_resized_embedding(tmp_path):
    rows = meta_checkpoint.VOCAB_SIZE + 16
    tensors = dict(TENSORS)
    for name in ("tok_embeddings.weight", "output.weight"):
        tensors[name] = np.concatenate([TENSORS[name], TENSORS[name][:16]])
    write_hf(tmp_path / "hf", tensors, vocab_size=rows, rope_theta=1e6)
    config = read_hf(tmp_path / "hf").config
    assert (config.vocab_size, config.rope_theta) == (rows, 1e6)
    llama_jax.convert(tmp_path / "hf", tmp_path / "meta", to="meta", model_parallel=4)
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert (params["vocab_size"], params["rope_theta"]) == (rows, 1e6)
    again = open_checkpoint(tmp_path / "meta", max_length=config.max_length)
    assert again.config == config


def test_without_a_sentencepiece_model_it_is_said(directory, caplog):
    (directory / "tokenizer.json").write_text("{}")
    assert read_hf(directory).tokenizer_path is None
    assert "a tokenizer.json but no tokenizer.model" in caplog.text


# What is refused.


def _refused(directory, match, kind=CheckpointError):
    with pytest.raises(kind, match=match):
        read_hf(directory)


def test_no_weights_at_all(directory):
    (directory / "model.safetensors").unlink()
    _refused(directory, "has no model.safetensors and no model.safetensors.index.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("model_type", "mistral"),
        ("hidden_act", "gelu"),
        ("tie_word_embeddings", True),
        ("head_dim", 16),
    ],
)
def test_another_model_is_refused_by_the_field(tmp_path, field, value):
    write_hf(tmp_path, TENSORS, **{field: value})
    _refused(tmp_path, rf"config\.json: {field} is ", ConfigError)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ("{", "is not JSON"), ("[]", "holds list")],
)
def test_an_unusable_config(directory, content, message):
    file = directory / "config.json"
    file.unlink() if content is None else file.write_text(content)
    _refused(directory, rf"config\.json {message}", ConfigError)


def test_missing_extra_and_misshapen_tensors(directory):
    def misshape(tensors):
        name = "model.layers.0.self_attn.k_proj.weight"
        tensors[name] = np.ascontiguousarray(tensors[name].T)

    cases = [
        (lambda t: t.pop("lm_head.weight"), r"lacks lm_head\.weight: config\.json"),
        (
            lambda t: t.update(
                {"model.layers.0.self_attn.q_proj.bias": t["model.norm.weight"]}
            ),
            r"has model\.layers\.0\.self_attn\.q_proj\.bias, which no Llama",
        ),
        (misshape, r"k_proj\.weight has shape \(32, 16\), but by config\.json"),
    ]
    for change, message in cases:
        rewrite(directory, change)
        _refused(directory, message)


def test_an_index_and_its_files(tmp_path):
    write_hf(tmp_path, TENSORS, num_files=2)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"")
    _refused(tmp_path, r"does not list model-00003-of-00003\.safetensors")
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    for damaged in ("{", "[]", '{"weight_map": []}', '{"weight_map": {"a": [1]}}'):
        index.write_text(damaged)
        _refused(tmp_path, "index.json is no index of tensors")
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere"}}))
    _refused(tmp_path, "lists '../elsewhere', which is no file name")
    second = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    write_safetensors(tmp_path / second, NAMED)
    _refused(tmp_path, rf"{second} has .* which another file of .* has too")


def test_metas_files_beside_hugging_faces_are_ambiguous(directory):
    meta_checkpoint.write_checkpoint(directory, [TENSORS])
    with pytest.raises(CheckpointError, match="holds Meta's files and Hugging Face's"):
        open_checkpoint(directory, max_length=MAX_LENGTH)
