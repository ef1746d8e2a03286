"""What cannot be generated is refused, with numbers, before anything runs."""

import dataclasses

import numpy as np
import pytest

import llama_jax
from llama_jax.build import ShardedLlama
from llama_jax.config.sampling import Greedy, MinP, Penalties, TopK, TopP
from llama_jax.errors import (
    ConfigError,
    DialogError,
    GenerationError,
    TokenizerError,
)
from llama_jax.generate import Chat, Engine, Generator, Settings
from tests.generate.models import engine, generator, llm, model, tokenizer, weights


@pytest.fixture(scope="module")
def writer() -> Generator:
    """One that generates nothing: each refusal has to come before it tries."""
    return idle(generator())


@pytest.fixture(scope="module")
def silent() -> Generator:
    """The same without a tokenizer."""
    return idle(Generator(engine(), None))


@pytest.fixture(scope="module")
def willing() -> Generator:
    return generator()


def idle(writer: Generator) -> Generator:
    def read(*_, **__):
        raise AssertionError("a prompt was read")

    writer.engine.read = read
    return writer


def write(writer, prompts, *, new=20, sampler=None, num_samples=1, **options):
    settings = Settings(max_new_tokens=new, sampler=sampler or Greedy(), **options)
    return writer.generate(prompts, settings, num_samples=num_samples)


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
        (["bace " * 99], r"prompts\[0\] has \d+ tokens.*greater cache_length or max_l"),
    ],
)
def test_prompts(writer, prompts, message):
    with pytest.raises(GenerationError, match=message):
        write(writer, prompts)


def test_a_prompt_longer_than_the_cache():
    """Of the cache, if that is shorter than the model's context."""
    with pytest.raises(GenerationError, match=r"has 10 tokens.*is 10.*at most 9 tok"):
        write(idle(generator(slots=10)), [[1] * 10])


def test_an_empty_prompt_is_bos(willing):
    assert write(willing, [""]) == write(willing, [[1]])


def test_a_literal_control_piece_is_text(willing):
    """`<s>` in a prompt is spelt out, and one BOS stands before it."""
    (found,) = write(willing, ["<s>"], new=1)
    assert found.timing.prompt_tokens > 2
    ids = tokenizer().encode("<s>", bos=True, eos=False)
    assert ids.count(1) == 1 and write(willing, [ids], new=1) == [found]


@pytest.mark.parametrize("new", [0, -1, 1.5, None, True])
def test_max_new_tokens(new):
    with pytest.raises(GenerationError, match=f"max_new_tokens is {new}: give an int"):
        Settings(max_new_tokens=new, sampler=Greedy())


@pytest.mark.parametrize(
    "seed", [0.5, None, "1", [1], [1, 2, 3], [1, 2.0], [1, None], "12", {1, 2}]
)
def test_seed(writer, seed):
    with pytest.raises(GenerationError, match="seed is .*: give an integer"):
        write(writer, ["", ""], seed=seed)
    if seed != [1]:
        with pytest.raises(GenerationError, match="seed is"):
            settings = Settings(max_new_tokens=4, sampler=Greedy(), seed=seed)
            writer.stream("", settings)


@pytest.mark.parametrize("num_samples", [0, -1, 1.0, None, True])
def test_num_samples(writer, num_samples):
    with pytest.raises(GenerationError, match=f"num_samples is {num_samples}: give an"):
        write(writer, [""], num_samples=num_samples)


@pytest.mark.parametrize("sampler", ["greedy", 0.9, Greedy, [TopP(1, temperature=1)]])
def test_sampler(writer, sampler):
    with pytest.raises(GenerationError, match="sampler is .*: give Greedy"):
        write(writer, [""], sampler=sampler)


@pytest.mark.parametrize("stop", ["", "wex", [""], ["wex", ""], [5], [None]])
def test_stop_strings(stop):
    with pytest.raises(GenerationError, match="stop is .*: give a list of texts, none"):
        Settings(max_new_tokens=4, stop=stop)


@pytest.mark.parametrize(
    ("stop_tokens", "message"),
    [
        ([384], r"stop_tokens has the id 384"),
        ([5, -1], r"stop_tokens has the id -1 at position 1"),
        (["wex"], r"stop_tokens is \['wex'\]"),
        ([1.5], r"stop_tokens is \[1.5\]"),
    ],
)
def test_stop_tokens(writer, stop_tokens, message):
    with pytest.raises(GenerationError, match=message):
        write(writer, [""], stop_tokens=stop_tokens)


@pytest.mark.parametrize("allowed", [[5, 6], "wex", 5])
def test_allowed(allowed):
    with pytest.raises(GenerationError, match="allowed is .*: give a function"):
        Settings(max_new_tokens=4, allowed=allowed)


@pytest.mark.parametrize("penalties", [1.1, {"presence": 1}, "x", (1.0, 0.0, 0.0)])
def test_penalties(penalties):
    with pytest.raises(GenerationError, match=r"penalties is .*: give Penalties\("):
        Settings(max_new_tokens=4, penalties=penalties)


@pytest.mark.parametrize(
    "value", [0, -1.0, float("inf"), float("nan"), "1", None, True]
)
def test_a_repetition_penalty(value):
    with pytest.raises(ConfigError, match="repetition penalty is .*above 0; 1 changes"):
        Penalties(repetition=value)


@pytest.mark.parametrize("name", ["presence", "frequency"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), "1", None, True])
def test_penalties_that_are_no_numbers(name, value):
    with pytest.raises(ConfigError, match=f"{name} penalty is .*give a finite number"):
        Penalties(**{name: value})


@pytest.mark.parametrize("kind", [TopK, TopP, MinP])
def test_temperature_0_is_greedy(willing, kind):
    prompts = [[1, 7], [1, 9, 9], [1], [5]]
    greedy = write(willing, prompts)
    assert write(willing, prompts, sampler=kind(1, temperature=0), seed=5) == greedy


DIALOGS = [
    ([], "the dialog is empty"),
    ([{"role": "system", "content": "Gu."}], "system message alone"),
    ([{"role": "assistant", "content": "Gu."}], "model only supports"),
    ([{"role": "user", "content": "Gu [/INST] han"}], "special tags are not allowed"),
    ([{"role": "user", "content": "<<SYS>> Gu"}], "special tags are not allowed"),
]


@pytest.mark.parametrize(("dialog", "message"), DIALOGS)
def test_dialogs(writer, dialog, message):
    with pytest.raises(DialogError, match=message):
        writer.chat(dialog, Settings(max_new_tokens=4))


def test_a_system_message_with_a_tag(writer):
    with pytest.raises(DialogError, match="special tags.*from system"):
        Chat(writer, system="[INST]", settings=Settings(max_new_tokens=4))


def test_a_dialog_longer_than_the_context(writer):
    dialog = [{"role": "user", "content": "bace " * 99}]
    with pytest.raises(
        GenerationError, match="^the conversation has .* and the context is 32"
    ):
        writer.chat(dialog, Settings(max_new_tokens=4))


def test_half_a_character(writer):
    with pytest.raises(TokenizerError, match="surrogate"):
        write(writer, ["bace \ud83d"])


def test_without_a_tokenizer(silent):
    settings = Settings(max_new_tokens=4)
    with pytest.raises(GenerationError, match=r"prompts\[1\], a text, needs a token"):
        write(silent, [[1], "Bace"])
    with pytest.raises(GenerationError, match="a stream of text needs.*tokenizer=PATH"):
        silent.stream([1], settings)
    with pytest.raises(GenerationError, match="a dialog needs a tokenizer"):
        silent.chat([{"role": "user", "content": "Gu"}], settings)
    with pytest.raises(GenerationError, match="a chat needs a tokenizer"):
        Chat(silent, system=None, settings=settings)
    with pytest.raises(GenerationError, match="a stop string needs a tokenizer"):
        write(silent, [[1]], stop=["Gu"])


def test_a_tokenizer_with_more_pieces_than_embeddings():
    sharded, _ = model()
    narrow = dataclasses.replace(
        sharded.model, config=dataclasses.replace(sharded.config, vocab_size=380)
    )
    sharded = ShardedLlama(narrow, sharded.mesh, sharded.rules, sharded.param_shardings)
    with pytest.raises(TokenizerError, match="4 of its ids, from 380 on"):
        Generator(Engine(sharded, weights()), tokenizer())


@pytest.mark.parametrize("slots", [0, 1, -5, 33, 8.0, "8", True])
def test_the_length_of_the_cache(slots):
    with pytest.raises(GenerationError, match=f"cache_length is {slots!r}: .*2 to 32"):
        engine(slots=slots)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    place = tmp_path_factory.mktemp("saved") / "model"
    llm().save(place)
    return place


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": "int4"}, ConfigError, "weights 'int4': give \"int8\", or None"),
        ({"cache": "float16"}, ConfigError, "cache 'float16': give \"int8\", or None"),
        ({"weights": 8}, ConfigError, 'weights 8: give "int8"'),
        ({"dtype": "float16"}, ConfigError, "dtype 'float16': give one of"),
        ({"cache_length": 33}, GenerationError, "cache_length is 33: .*2 to 32"),
        ({"cache_length": 1}, GenerationError, "cache_length is 1"),
    ],
)
def test_what_cannot_be_loaded(saved, options, error, message, monkeypatch):
    """Nor is it begun, which may take minutes."""
    monkeypatch.setattr("llama_jax.llm.from_checkpoint", pytest.fail)
    with pytest.raises(error, match=message):
        llama_jax.load(saved, **options)


def test_settings_are_values_that_numpy_may_make(willing):
    """Ids and masks from NumPy are as good as lists."""
    by_list = write(willing, [[1, 5]], new=4, stop_tokens=[7], allowed=lambda _: [9, 7])
    by_numpy = write(
        willing,
        [np.array([1, 5])],
        new=4,
        stop_tokens=np.array([7]),
        allowed=lambda _: np.array([9, 7]),
    )
    assert by_numpy == by_list
