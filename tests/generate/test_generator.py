"""Text in, text out: what a completion holds, streams, chat, seeds and compilations."""

import dataclasses

import jax
import numpy as np
import pytest

from llama_jax.config.sampling import TopP
from llama_jax.generate import Generator
from llama_jax.generate.rows import length_bucket, padded
from llama_jax.text import encode_dialog
from tests.generate.models import CONFIG, EIGHT, model, tokenizer

WARM = TopP(0.95, temperature=1.5)
TEXTS = ["Bace di.", "", "Han kel", "Mir nos"]


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(*model(), tokenizer())


@pytest.fixture
def compiled():
    """The events of XLA compiling something, as they come."""
    events = []

    def listen(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def write(generator, prompts, *, new=24, sampler=WARM, seed=0, **options):
    return generator.generate(
        prompts, max_new_tokens=new, sampler=sampler, seed=seed, **options
    )


def test_texts_begin_with_bos_and_ids_are_taken_as_they_are(generator):
    ids = [tokenizer().encode(text, bos=True, eos=False) for text in TEXTS]
    assert ids[1] == [tokenizer().bos_id]
    assert write(generator, TEXTS) == write(generator, ids)
    assert write(generator, map(np.array, ids)) == write(generator, ids)
    assert write(generator, []) == []


def test_a_completion_is_text_ids_and_logprobs(generator):
    for completion in write(generator, TEXTS):
        assert completion.text == tokenizer().decode(completion.tokens)
        assert len(completion.logprobs) == len(completion.tokens) <= 24
        assert all(type(id) is int for id in completion.tokens)
        assert all(type(x) is float and x <= 0 for x in completion.logprobs)
        assert completion.finish_reason == "length" and len(completion.tokens) == 24


def test_eos_stops_and_is_left_out(generator, monkeypatch):
    first, *others = write(generator, TEXTS)
    elsewhere = {id for completion in others for id in completion.tokens}
    eos = next(id for id in first.tokens if id not in elsewhere)
    monkeypatch.setattr("llama_jax.generate.generator._EOS", eos)
    stopped, *unchanged = write(Generator(*model(), tokenizer()), TEXTS)
    end = first.tokens.index(eos)
    assert stopped.finish_reason == "stop" and unchanged == others
    assert stopped.tokens == first.tokens[:end]
    assert stopped.logprobs == first.logprobs[:end]


def test_echo_puts_the_prompt_first(generator):
    plain = write(generator, TEXTS)
    echoed = write(generator, TEXTS, echo=True)
    sharded, params = model()
    for text, before, after in zip(TEXTS, plain, echoed, strict=True):
        ids = tokenizer().encode(text, bos=True, eos=False)
        assert after.tokens == ids + before.tokens
        assert after.text == tokenizer().decode(ids + before.tokens)
        assert after.logprobs[len(ids) :] == before.logprobs
        assert after.logprobs[0] == 0 and len(after.logprobs) == len(after.tokens)
    tokens = padded(sharded, [after.tokens])
    with jax.set_mesh(sharded.mesh):
        logits = sharded.model.apply({"params": params}, tokens)
    table = np.asarray(jax.nn.log_softmax(logits))[0]
    expected = [table[i, id] for i, id in enumerate(after.tokens[1:])]
    np.testing.assert_allclose(after.logprobs[1:], expected, atol=1e-5)


def test_a_stream_joins_to_the_text(generator):
    for text in TEXTS:
        pieces = list(generator.stream(text, max_new_tokens=24, sampler=WARM, seed=0))
        [whole] = write(generator, [text])
        assert "".join(pieces) == whole.text and len(pieces) > 3
        assert all(pieces)


def test_a_stream_that_is_left_early_leaves_nothing_behind(generator):
    stream = generator.stream("Bace", max_new_tokens=24, sampler=WARM, seed=0)
    first = next(stream)
    assert jax.sharding.get_abstract_mesh().empty
    stream.close()
    again = generator.stream("Bace", max_new_tokens=24, sampler=WARM, seed=0)
    assert next(again) == first


def test_chat_is_the_dialog_as_a_prompt(generator):
    dialog = [{"role": "user", "content": "Wex?"}]
    answer = generator.chat(dialog, max_new_tokens=24, sampler=WARM, seed=1)
    prompt = encode_dialog(tokenizer(), dialog)
    assert [answer] == write(generator, [prompt], seed=1)


def test_seeds_rows_and_copies(generator):
    def texts(prompts, **options):
        return [completion.text for completion in write(generator, prompts, **options)]

    first = texts(TEXTS)
    assert texts(TEXTS) == first
    assert texts(TEXTS, seed=1) != first
    assert texts(TEXTS, seed=-(2**70)) != first
    assert texts(TEXTS[::-1]) == first[::-1]
    copies = texts(["Bace di."] * 4)
    assert copies[0] == first[0] and len(set(copies)) == 4


def test_the_context_ends_a_row(generator):
    longest, long, *short = write(generator, [[1] * 31, [1] * 28, [1], [1, 5]], new=20)
    assert longest.finish_reason == long.finish_reason == "length"
    assert (len(longest.tokens), len(long.tokens)) == (1, CONFIG.max_length - 28)
    assert [len(completion.tokens) for completion in short] == [20, 20]


def test_a_model_without_a_tokenizer_serves_ids(generator):
    silent = Generator(*model(), None)
    for found, spoken in zip(
        write(silent, [[1, 5, 9]] * 4), write(generator, [[1, 5, 9]] * 4), strict=True
    ):
        assert found == dataclasses.replace(spoken, text="")


def test_eight_devices_pad_the_batch_and_write_the_same(generator):
    split = Generator(*model(EIGHT), tokenizer())
    found, expected = write(split, TEXTS[:3]), write(generator, TEXTS)[:3]
    assert [c.tokens for c in found] == [c.tokens for c in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_new_requests_compile_nothing(generator, compiled):
    jax.jit(lambda x: x + 1)(jax.numpy.arange(3))
    assert compiled, "the event that counts compilations has another name"
    write(generator, TEXTS, echo=True)
    compiled.clear()
    for length in range(1, 17):
        write(
            generator,
            [[1] * length, [1, 7], [5] * 3, [6] * 16],
            new=16 - length % 3,
            sampler=TopP(0.5 + length / 99, temperature=length),
            seed=length,
            echo=True,
        )
    assert not compiled


def test_buckets():
    sharded, _ = model()
    sizes = [length_bucket(sharded, length) for length in range(1, 33)]
    assert sorted(set(sizes)) == [16, 24, 32]
    assert all(size >= length for length, size in enumerate(sizes, start=1))
    assert padded(sharded, [[5]] * 5).shape == (6, 16)
    split, _ = model(EIGHT)
    assert padded(split, [[5] * 17]).tolist() == [[5] * 17 + [0] * 7, [0] * 24]
