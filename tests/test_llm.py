"""The notebook's `llm`, and the package's lazy names."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import llama_jax
from llama_jax.errors import GenerationError
from llama_jax.generate import Generator, Settings
from llama_jax.llm import LLM
from llama_jax.model import Llama
from tests.generate.models import (
    CONFIG,
    EIGHT,
    LONG,
    ONE,
    generator,
    llm,
    model,
    params_of,
    tokenizer,
)
from tests.parity.tolerances import INT8_LOGITS, INT8_LOSS

TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 20))


@pytest.fixture(scope="module", params=[ONE, EIGHT], ids=["1 device", "8 devices"])
def placed(request) -> LLM:
    return llm(request.param)


@pytest.fixture(scope="module")
def silent() -> LLM:
    return llm(speaks=False)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    sharded, params = model()
    with jax.set_mesh(sharded.mesh):
        return np.asarray(jax.jit(sharded.model.apply)({"params": params}, TOKENS))


def mesh_of(speaker: LLM) -> jax.sharding.Mesh:
    return jax.tree.leaves(speaker.params)[0].sharding.mesh


def test_logits_of_any_shape(placed, expected):
    assert placed.logits(TOKENS).dtype == np.float32
    np.testing.assert_allclose(placed.logits(TOKENS), expected, atol=2e-5)
    short = placed.logits(jax.numpy.asarray(TOKENS[:, :17]))
    np.testing.assert_allclose(short, expected[:, :17], atol=2e-5)


def test_loss_is_the_mean_over_all_rows(placed, expected):
    logits = expected[:, :-1].astype(np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(logits, TOKENS[:, 1:, None], axis=-1)
    assert abs(placed.loss(TOKENS) - nll.mean()) < 1e-5
    assert abs(placed.loss(TOKENS[:, :18].tolist()) - nll[:, :17].mean()) < 1e-5


def test_attention_is_causal_and_whole(placed):
    row = TOKENS[0, :11]
    found = placed.attention(row)
    assert found.shape == (CONFIG.num_layers, CONFIG.num_heads, 11, 11)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=0, atol=1e-5)
    assert (found[..., ~np.tri(11, dtype=bool)] == 0).all()
    assert found.min() >= 0 and found[..., -1, :].max(-1).min() < 0.999
    # Of heads by their number, on any mesh.
    np.testing.assert_allclose(found, llm().attention(row.tolist()), atol=1e-5)
    strongest = placed.strongest_attention(row)
    np.testing.assert_allclose(strongest, found.max((0, 1)), rtol=0, atol=1e-6)


def test_parameters_are_those_that_were_given(placed):
    jax.tree.map(np.testing.assert_array_equal, placed.params, params_of(CONFIG))
    assert placed.params is placed.params
    with jax.set_mesh(mesh_of(placed)):
        logits = jax.jit(Llama(placed.config).apply)({"params": placed.params}, TOKENS)
    np.testing.assert_allclose(logits, placed.logits(TOKENS), atol=2e-5)


def test_a_repr_has_no_weights(placed):
    assert repr(placed) == f"LLM({CONFIG!r}, {tokenizer()!r})"
    assert repr(llm(speaks=False)) == f"LLM({CONFIG!r}, None)"


def test_what_is_saved_is_what_is_loaded(placed, tmp_path):
    placed.save(tmp_path / "a model")
    back = llama_jax.load(tmp_path / "a model")
    jax.tree.map(np.testing.assert_array_equal, back.params, params_of(CONFIG))
    assert (back.config, back.tokenizer) == (CONFIG, tokenizer())
    np.testing.assert_array_equal(back.logits(TOKENS), llm().logits(TOKENS))


def test_eight_bits(expected, tmp_path):
    """Near; and not to be saved, since they are no checkpoint's."""
    whole = llm()
    whole.save(tmp_path / "whole")
    rounded = llama_jax.load(tmp_path / "whole", weights="int8")
    found = rounded.logits(TOKENS)
    off = np.abs(found - expected).max()
    more = rounded.loss(TOKENS) - whole.loss(TOKENS)
    print(f"int8 weights: logits off by {off:.3f} at most, loss by {more:.4f}")
    assert 1e-3 < off < INT8_LOGITS and 0 < abs(more) < INT8_LOSS
    # The parameters are what the numbers stand for.
    logits = jax.jit(Llama(CONFIG).apply)({"params": rounded.params}, TOKENS)
    np.testing.assert_allclose(logits, found, rtol=0, atol=1e-4)
    with pytest.raises(GenerationError, match='were rounded to int8.*weights="int8"'):
        rounded.save(tmp_path / "rounded")
    assert not (tmp_path / "rounded").exists()


def test_settings_of_the_cache(tmp_path):
    """The cache is shorter than the context, which other uses of the model have."""
    llm(config=LONG).save(tmp_path)
    short = llama_jax.load(tmp_path, cache_length=32, cache="int8")
    assert short.config.max_length == 1024
    assert (short.engine.slots, short.engine.cache_dtype) == (32, "int8")
    with pytest.raises(GenerationError, match="has 32 tokens, and the context is 32"):
        short.generate([[1] * 32])


def test_it_writes_as_its_generator_does_with_metas_sampler():
    speaker, writer = llm(), generator()
    meta = {"sampler": llama_jax.TopP(0.9, temperature=0.6), "seed": 0}
    prompts = ["Bace", "Gu", "Han", "Kel"]
    by_default = writer.generate(prompts, Settings(max_new_tokens=64, **meta))
    assert speaker.generate(prompts) == by_default
    alone = writer.generate(["Bace"], Settings(max_new_tokens=64, **meta))[0]
    assert "".join(speaker.stream("Bace")) == alone.text
    dialog = [{"role": "user", "content": "Wex?"}]
    answer = writer.chat(dialog, Settings(max_new_tokens=512, **meta))
    assert speaker.chat(dialog) == answer
    chat = speaker.start_chat()
    assert chat.send("Wex?") == answer
    told = speaker.start_chat(system="Gu").messages
    assert told == [{"role": "system", "content": "Gu"}]


def test_every_option_reaches_the_generator(monkeypatch):
    """Each differs from its default, and is in the settings that arrive."""
    speaker, seen = llm(), []

    def generate(self, prompts, settings, **options):
        seen.append((settings, options))
        return [prompts]

    def stream(self, prompt, settings):
        seen.append((settings, {}))
        return [prompt]

    monkeypatch.setattr(Generator, "generate", generate)
    monkeypatch.setattr(Generator, "stream", stream)
    monkeypatch.setattr(Generator, "chat", stream)
    options = {
        "max_new_tokens": 3,
        "sampler": llama_jax.Greedy(),
        "seed": 5,
        "penalties": llama_jax.Penalties(presence=0.5),
    }
    ends = {"stop": ["x"], "stop_tokens": [9], "allowed": lambda _: [7]}
    speaker.generate([[1]], **options, **ends, num_samples=2, echo=True)
    list(speaker.stream([1], **options, **ends))
    speaker.chat([{"role": "user", "content": "Wex?"}], **options)
    whole = Settings(**options, **ends)
    assert seen == [
        (whole, {"num_samples": 2, "echo": True}),
        (whole, {}),
        (Settings(**options), {}),
    ]
    assert speaker.start_chat(**options).settings == Settings(**options)


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
def test_logits_of_what_are_no_rows(silent, tokens, message):
    with pytest.raises(GenerationError, match=message):
        silent.logits(tokens)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], r"tokens\[0\] has no token ids"),
        (5, r"tokens\[0\] is .*5"),
        ([[1]], r"tokens\[0\] is .*token ids"),
        ([1, 384], r"tokens\[0\] has the id 384"),
        ([1] * 33, r"of 1 to 32 ids"),
    ],
)
def test_attention_of_what_is_no_row(silent, tokens, message):
    with pytest.raises(GenerationError, match=message):
        silent.attention(tokens)


def test_one_token_has_no_loss(silent):
    with pytest.raises(GenerationError, match=r"tokens is .*of 2 to 32 ids"):
        silent.loss([[1]])


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


def test_importing_all_of_it_starts_no_device():
    """Hosts that are to join a job must have done so before that."""
    program = (
        "import importlib, pkgutil, llama_jax, sharding\n"
        "for package in (llama_jax, sharding):\n"
        "    for found in pkgutil.walk_packages("
        "package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(found.name)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


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
