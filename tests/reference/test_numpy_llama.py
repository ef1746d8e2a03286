"""The NumPy Llama gives Meta's answers; made weights show a converter's mistakes."""

import json

import numpy as np
import pytest

from llama_jax.conversion.pth import read_pth
from tests.reference import meta_checkpoint, numpy_llama

CASES = ("s1_mha_mp1_bf16", "s2_gqa_mp2_fp16", "s3_gqa_mp4_bf16_flat")
TOKENS = np.random.default_rng(1).integers(0, meta_checkpoint.VOCAB_SIZE, (2, 12))


def _whole(directory):
    shards = [read_pth(file) for file in sorted(directory.glob("*.pth"))]
    return meta_checkpoint.merge(shards)


def _params(directory):
    return json.loads((directory / "params.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_greedy_tokens_are_those_of_metas_code(reference, case):
    directory = reference / "oracle" / case
    params, tensors = _params(directory), _whole(directory)
    with np.load(directory / "reference.npz") as answer:
        tokens = answer["tokens"]
        logits = numpy_llama.logits(params, tensors, tokens)
        np.testing.assert_allclose(logits, answer["logits"], rtol=0, atol=1e-4)
        loss = numpy_llama.loss(params, tensors, tokens)
        assert loss == pytest.approx(float(answer["loss"]), abs=1e-5)
    answers = json.loads((directory / "reference.json").read_text())
    for single in answers["greedy"]["single"]:
        (prompt,), (expected,) = single["prompt_tokens"], single["out_tokens"]
        assert numpy_llama.generate(params, tensors, prompt, len(expected)) == expected


def test_logits_of_a_trained_model_are_those_of_metas_code(reference):
    directory = reference / "stories260K" / "meta_mp4_fp32"
    with np.load(directory.parent / "logits_first64.npz") as answer:
        tokens, expected = answer["tokens"].reshape(1, 64), answer["logits"]
        logits = numpy_llama.logits(_params(directory), _whole(directory), tokens)
        np.testing.assert_allclose(
            logits, expected.reshape(logits.shape), rtol=0, atol=1e-4
        )


def test_split_then_merge_gives_the_same_tensors():
    tensors = meta_checkpoint.random_tensors()
    merged = meta_checkpoint.merge(meta_checkpoint.split(tensors, 4))
    assert merged.keys() == tensors.keys()
    assert all(np.array_equal(merged[name], tensors[name]) for name in tensors)


def _without_rotary_permutation(tensors):
    """Half-split features taken for interleaved ones."""
    head_dim = meta_checkpoint.PARAMS["dim"] // meta_checkpoint.PARAMS["n_heads"]
    wrong = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(("wq.weight", "wk.weight")):
            heads = tensor.reshape(-1, 2, head_dim // 2, tensor.shape[1])
            wrong[name] = heads.swapaxes(1, 2).reshape(tensor.shape)
    return wrong


def _shards_swapped(suffix):
    def swap(tensors):
        first, second = meta_checkpoint.split(tensors, 2)
        for name in first:
            if name.endswith(suffix):
                first[name], second[name] = second[name], first[name]
        return meta_checkpoint.merge([first, second])

    return swap


@pytest.mark.parametrize(
    "mistake",
    [
        _without_rotary_permutation,
        *(_shards_swapped(f"{name}.weight") for name in meta_checkpoint.SPLIT_DIM),
    ],
    ids=["rotary", *meta_checkpoint.SPLIT_DIM],
)
def test_a_converters_mistake_moves_the_logits(mistake):
    params, tensors = meta_checkpoint.PARAMS, meta_checkpoint.random_tensors()
    right = numpy_llama.logits(params, tensors, TOKENS)
    wrong = numpy_llama.logits(params, mistake(tensors), TOKENS)
    assert np.abs(wrong - right).max() > 1e-2
