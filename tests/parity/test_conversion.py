"""Checkpoints of Meta's own making, through every format: its answers stay."""

import json

import numpy as np
import pytest

import llama_jax
from llama_jax.conversion import open_checkpoint
from llama_jax.conversion.manifest import digest
from llama_jax.conversion.names import weights
from tests.parity.tolerances import META_LOGITS

CASES = ("s1_mha_mp1_bf16", "s2_gqa_mp2_fp16", "s3_gqa_mp4_bf16_flat")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("to", ["meta", "hf", "orbax"])
def test_metas_logits_in_every_format(reference, tmp_path, agree, case, to):
    source = reference / "oracle" / case
    done = llama_jax.convert(source, tmp_path / to, to=to, max_length=64)
    with np.load(source / "reference.npz") as arrays:
        tokens, expected = arrays["tokens"], arrays["logits"]
    found = llama_jax.load(tmp_path / to, dtype="float32").logits(tokens)
    agree("logits, converted", np.abs(found - expected).max(), within=META_LOGITS)
    back = llama_jax.convert(tmp_path / to, tmp_path / "back", to="meta", max_length=64)
    assert back.manifest.digests == done.manifest.digests


def test_the_twins_are_one_model(reference, tmp_path):
    """Meta's files and Hugging Face's of one model have the same digests."""
    meta = reference / "oracle/s2_gqa_mp2_fp16"
    twin = reference / "oracle/s2_gqa_hf_fp16"
    from_meta = llama_jax.convert(meta, tmp_path / "a", to="hf", max_length=64)
    from_twin = llama_jax.convert(twin, tmp_path / "b", to="meta", model_parallel=2)
    assert from_meta.manifest.digests == from_twin.manifest.digests
    opened = open_checkpoint(meta, max_length=64)
    for weight in weights(opened.config):
        assert digest(opened, weight) == from_twin.manifest.digests[weight.name]


@pytest.mark.parametrize("shards", [1, 4])
def test_stories_are_the_same_after_hugging_face_and_back(reference, tmp_path, shards):
    stories = reference / "stories260K"
    expected = json.loads((stories / "greedy.json").read_text())["bos_only"]
    settings = {"max_length": 512}
    tokenizer = stories / "tok512.rebuilt.model"
    source = stories / f"meta_mp{shards}_fp32"
    llama_jax.convert(source, tmp_path / "hf", to="hf", tokenizer=tokenizer, **settings)
    llama_jax.convert(
        tmp_path / "hf", tmp_path / "meta", to="meta", model_parallel=4, **settings
    )
    for place in ("hf", "meta"):
        llm = llama_jax.load(tmp_path / place, **settings)
        (story,) = llm.generate([[1]], sampler=llama_jax.Greedy(), max_new_tokens=200)
        assert story.text == expected["text"]
