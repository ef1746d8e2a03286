"""Greedy text of Meta's own code, token by token, with its log-probabilities."""

import json

import numpy as np
import pytest

import llama_jax
from tests.parity.tolerances import INT8_LOSS, META_LOGITS

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
    # Meta's texts are of the answers alone, without the space that may come first.
    for completion, text in zip(found, case["texts"], strict=True):
        assert completion.text.removeprefix(" ") == text
    same(found, case)
    stream = stories.stream(
        case["prompts"][0], max_new_tokens=60, sampler=llama_jax.Greedy()
    )
    assert "".join(stream) == found[0].text


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"weights": "int8"}, {"cache": "int8"}, {"weights": "int8", "cache": "int8"}],
    ids=["weights", "cache", "both"],
)
def test_eight_bits_cost_little(reference, stories, expected, options):
    """The loss of Meta's text, token by token as if it were written."""
    folder = reference / "stories260K"
    rounded = llama_jax.load(
        folder / "meta_mp1_fp32",
        tokenizer=folder / "tok512.rebuilt.model",
        max_length=512,
        **options,
    )
    ids = expected["bos_only"]["out_tokens"][:100]

    def loss(llm):
        (found,) = llm.generate(
            [""], max_new_tokens=len(ids), allowed=lambda so_far: [ids[len(so_far)]]
        )
        assert found.tokens == ids
        return -np.mean(found.logprobs)

    whole, less = loss(stories), loss(rounded)
    print(f"stories260K, int8 {options}: loss {whole:.4f}, then {less:.4f}")
    assert 0 < abs(less - whole) < INT8_LOSS
