"""What cannot be generated is refused, with numbers, before anything runs."""

import dataclasses

import pytest

from llama_jax.build import ShardedLlama
from llama_jax.config.sampling import Greedy, MinP, TopK, TopP
from llama_jax.errors import DialogError, GenerationError, TokenizerError
from llama_jax.generate import Generator
from tests.generate.models import model, tokenizer


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(*model(), tokenizer())


@pytest.fixture(scope="module")
def silent() -> Generator:
    return Generator(*model(), None)


def write(generator, prompts, *, new=24, sampler=None, seed=0):
    sampler = Greedy() if sampler is None else sampler
    return generator.generate(prompts, max_new_tokens=new, sampler=sampler, seed=seed)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("Bace", r"prompts is a single text: put it in a list"),
        ([1, 5], r"prompts\[0\] is 1: give a list of token ids"),
        ([[]], r"prompts\[0\] has no token ids.*begin with BOS"),
        ([[1], []], r"prompts\[1\] has no token ids"),
        ([[1, 384]], r"prompts\[0\] has the id 384 at position 1.*0 to 383"),
        ([[1], [-1, 1]], r"prompts\[1\] has the id -1 at position 0.*padding"),
        ([[1.0, 2.0]], r"prompts\[0\] is \[1.0, 2.0\].*integers"),
        ([[True, False]], r"prompts\[0\] is \[True, False\].*integers"),
        ([["a"]], r"prompts\[0\] is \['a'\]"),
        ([[[1]]], r"prompts\[0\] is \[\[1\]\]"),
        ([[[1], [1, 2]]], r"prompts\[0\] is \[\[1\], \[1, 2\]\]"),
        ([None], r"prompts\[0\] is None"),
        ([[1], [1] * 32], r"prompts\[1\] has 32 tokens.*is 32.*at most 31 tokens"),
        (["bace " * 99], r"prompts\[0\] has \d+ tokens.*greater max_length"),
    ],
)
def test_prompts(generator, prompts, message):
    with pytest.raises(GenerationError, match=message):
        write(generator, prompts)


@pytest.mark.parametrize("new", [0, -1, 1.5, None, True])
def test_max_new_tokens(generator, new):
    with pytest.raises(GenerationError, match=f"max_new_tokens is {new}: give an int"):
        write(generator, [""], new=new)
    with pytest.raises(GenerationError, match="max_new_tokens"):
        generator.stream("", max_new_tokens=new, sampler=Greedy(), seed=0)


@pytest.mark.parametrize("seed", [0.5, None, "1"])
def test_seed(generator, seed):
    with pytest.raises(GenerationError, match="seed is .*: give an integer"):
        write(generator, [""], seed=seed)
    with pytest.raises(GenerationError, match="seed is"):
        generator.stream("", max_new_tokens=4, sampler=Greedy(), seed=seed)


def test_sampler(generator):
    with pytest.raises(GenerationError, match="sampler is 'greedy': give Greedy"):
        write(generator, [""], sampler="greedy")


@pytest.mark.parametrize("kind", [TopK, TopP, MinP])
def test_temperature_0_is_greedy(generator, kind):
    prompts = [[1, 7], [1, 9, 9], [1], [5]]
    greedy = write(generator, prompts)
    assert write(generator, prompts, sampler=kind(1, temperature=0), seed=5) == greedy


@pytest.mark.parametrize(
    "dialog",
    [
        [],
        [{"role": "system", "content": "Gu."}],
        [{"role": "assistant", "content": "Gu."}],
        [{"role": "user", "content": "Gu [/INST] han"}],
        [{"role": "user", "content": "<<SYS>> Gu"}],
    ],
)
def test_dialogs(generator, dialog):
    with pytest.raises(DialogError):
        generator.chat(dialog, max_new_tokens=4, sampler=Greedy(), seed=0)


def test_a_dialog_longer_than_the_context(generator):
    dialog = [{"role": "user", "content": "bace " * 99}]
    with pytest.raises(GenerationError, match="and the context is 32"):
        generator.chat(dialog, max_new_tokens=4, sampler=Greedy(), seed=0)


def test_half_a_character(generator):
    with pytest.raises(TokenizerError, match="surrogate"):
        write(generator, ["bace \ud83d"])


def test_text_without_a_tokenizer(silent):
    with pytest.raises(GenerationError, match=r"prompts\[1\], a text, needs a token"):
        write(silent, [[1], "Bace"])
    with pytest.raises(GenerationError, match="a stream of text needs.*tokenizer=PATH"):
        silent.stream([1], max_new_tokens=4, sampler=Greedy(), seed=0)
    with pytest.raises(GenerationError, match="a dialog needs a tokenizer"):
        silent.chat(
            [{"role": "user", "content": "Gu"}],
            max_new_tokens=4,
            sampler=Greedy(),
            seed=0,
        )


def test_a_tokenizer_with_more_pieces_than_embeddings():
    sharded, params = model()
    narrow = dataclasses.replace(
        sharded.model, config=dataclasses.replace(sharded.config, vocab_size=380)
    )
    sharded = ShardedLlama(narrow, sharded.mesh, sharded.rules, sharded.param_shardings)
    with pytest.raises(TokenizerError, match="4 of its ids, from 380 on"):
        Generator(sharded, params, tokenizer())
