"""The notebook's `llm`, and the package's lazy names."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import llama_jax
from llama_jax.errors import GenerationError
from llama_jax.generate import Generator
from llama_jax.llm import LLM
from tests.generate.models import CONFIG, EIGHT, ONE, model, tokenizer

TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 20))


@pytest.fixture(scope="module", params=[ONE, EIGHT], ids=["1 device", "8 devices"])
def llm(request) -> LLM:
    return LLM(*model(request.param), tokenizer())


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    sharded, params = model()
    with jax.set_mesh(sharded.mesh):
        return np.asarray(sharded.model.apply({"params": params}, TOKENS))


def test_logits_of_any_shape(llm, expected):
    assert llm.logits(TOKENS).dtype == np.float32
    np.testing.assert_allclose(llm.logits(TOKENS), expected, atol=2e-5)
    short = llm.logits(jax.numpy.asarray(TOKENS[:, :17]))
    np.testing.assert_allclose(short, expected[:, :17], atol=2e-5)


def test_loss_is_the_mean_over_all_rows(llm, expected):
    logits = expected[:, :-1].astype(np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(logits, TOKENS[:, 1:, None], axis=-1)
    assert abs(llm.loss(TOKENS) - nll.mean()) < 1e-5
    assert abs(llm.loss(TOKENS[:, :18].tolist()) - nll[:, :17].mean()) < 1e-5


def test_it_writes_as_its_generator_does_with_metas_sampler():
    llm, generator = LLM(*model(), tokenizer()), Generator(*model(), tokenizer())
    meta = {"sampler": llama_jax.TopP(0.9, temperature=0.6), "seed": 0}
    prompts = ["Bace", "Gu", "Han", "Kel"]
    by_default = generator.generate(prompts, max_new_tokens=64, **meta)
    assert llm.generate(prompts) == by_default
    assert "".join(llm.stream("Bace")) == by_default[0].text
    dialog = [{"role": "user", "content": "Wex?"}]
    answer = generator.chat(dialog, max_new_tokens=512, **meta)
    assert llm.chat(dialog) == answer


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], r"tokens is \[\]: .*at least one row, .*of 1 to 32"),
        ([1, 2], r"tokens\[0\] is .*1.*: give a list"),
        ([[1] * 33], r"of 1 to 32 ids"),
        ([[1, 2], [3]], r"all of one length"),
        (5, r"tokens is 5: "),
        ([[0.5, 1]], r"tokens\[0\] is .*integers"),
        ([[1, 2], [3, 384]], r"tokens\[1\] has the id 384 at position 1.*0 to 383"),
        ([[]], r"tokens\[0\] has no token ids"),
    ],
)
def test_logits_of_what_are_no_rows(tokens, message):
    with pytest.raises(GenerationError, match=message):
        LLM(*model(), None).logits(tokens)


def test_one_token_has_no_loss():
    with pytest.raises(GenerationError, match=r"tokens is .*of 2 to 32 ids"):
        LLM(*model(), None).loss([[1]])


def test_importing_the_package_imports_nothing_heavy():
    program = (
        "import sys, llama_jax; "
        "assert {'jax', 'numpy', 'flax', 'sentencepiece'}.isdisjoint(sys.modules); "
        "llama_jax.TopP(0.9, temperature=0.6); assert 'jax' not in sys.modules; "
        "print(llama_jax.text.chat.__name__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout == "llama_jax.text.chat\n"


def test_every_public_name_is_there():
    for name in llama_jax.__all__:
        assert getattr(llama_jax, name).__name__ == name
    assert {*llama_jax.__all__, "generate", "errors"} <= set(dir(llama_jax))
    assert llama_jax.load is llama_jax.llm.load


def test_a_misspelt_name_gets_a_suggestion():
    with pytest.raises(AttributeError, match="no attribute 'TopQ'. Did you mean 'Top"):
        llama_jax.__getattr__("TopQ")
    with pytest.raises(AttributeError, match=r"no attribute 'zzzz'\.$"):
        llama_jax.__getattr__("zzzz")
