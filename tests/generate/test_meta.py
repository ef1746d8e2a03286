"""Greedy text of Meta's own code, token by token, with its log-probabilities."""

import json

import numpy as np
import pytest

import llama_jax
from tests.parity.tolerances import META_LOGITS

ORACLE = ("s1_mha_mp1_bf16", "s2_gqa_mp2_fp16", "s3_gqa_mp4_bf16_flat")


@pytest.fixture(scope="module")
def stories(reference):
    folder = reference / "stories260K"
    return llama_jax.load(
        folder / "meta_mp1_fp32",
        tokenizer=folder / "tok512.rebuilt.model",
        max_length=512,
    )


@pytest.fixture(scope="module")
def expected(reference) -> dict:
    return json.loads((reference / "stories260K" / "greedy.json").read_text())


@pytest.fixture
def same(agree):
    """A check that texts have Meta's ids, exactly, and its log-probabilities."""

    def check(completions, case):
        assert [completion.tokens for completion in completions] == case["out_tokens"]
        for completion, logprobs in zip(completions, case["out_logprobs"], strict=True):
            off = np.abs(np.array(completion.logprobs) - logprobs)
            agree("generated logprobs (ids exact)", off.max(), within=META_LOGITS)

    return check


def test_200_tokens_after_bos(stories, expected, same):
    case = expected["bos_only"]
    [found] = stories.generate([""], max_new_tokens=200, sampler=llama_jax.Greedy())
    assert found.text == case["text"]
    case = {key: [case[key]] for key in ("out_tokens", "out_logprobs")}
    same([found], case)


def test_a_ragged_batch_of_texts(stories, expected, same):
    case = expected["ragged_batch"]
    found = stories.generate(
        case["prompts"], max_new_tokens=60, sampler=llama_jax.Greedy()
    )
    assert [completion.text for completion in found] == case["texts"]
    same(found, case)
    stream = stories.stream(
        case["prompts"][0], max_new_tokens=60, sampler=llama_jax.Greedy()
    )
    assert "".join(stream) == case["texts"][0]


@pytest.mark.parametrize("name", ORACLE)
def test_rows_that_end_and_rows_that_do_not(reference, name, same):
    folder = reference / "oracle" / name
    llm = llama_jax.load(folder, dtype="float32", max_length=64)
    greedy = json.loads((folder / "reference.json").read_text())["greedy"]
    cases = [greedy["ragged_batch"], greedy["ragged_batch_echo"], *greedy["single"]]
    ends = set()
    for case in cases:
        found = llm.generate(
            case["prompt_tokens"],
            max_new_tokens=case["max_gen_len"],
            sampler=llama_jax.Greedy(),
            echo=case.get("echo", False),
        )
        same(found, case)
        ends |= {completion.finish_reason for completion in found}
    assert ends == {"stop", "length"}
