"""Text in, text out: completions, streams, samples, seeds, stops, what may come."""

import dataclasses

import jax
import numpy as np
import pytest

from llama_jax.config.sampling import Greedy, Penalties, TopP
from llama_jax.errors import GenerationError
from llama_jax.generate import Generator, Settings
from llama_jax.text import encode_dialog
from tests.generate.models import (
    CONFIG,
    EIGHT,
    engine,
    generator,
    model,
    near,
    tokenizer,
)

WARM = TopP(0.95, temperature=1.5)
TEXTS = ["Bace di.", "", "Han kel", "Mir nos"]


@pytest.fixture(scope="module")
def writer() -> Generator:
    return generator()


@pytest.fixture
def read(writer, monkeypatch):
    """How many rows were read, and from which position, by each `engine.read`."""
    seen = []
    really = writer.engine.read

    def noted(rows, **options):
        seen.append((len(rows), options.get("known", 0)))
        return really(rows, **options)

    monkeypatch.setattr(writer.engine, "read", noted)
    return seen


def settings(*, new=20, sampler=WARM, **options) -> Settings:
    return Settings(max_new_tokens=new, sampler=sampler, **options)


def write(writer, prompts, *, num_samples=1, echo=False, **options):
    return writer.generate(
        prompts, settings(**options), num_samples=num_samples, echo=echo
    )


def encoded(text):
    return tokenizer().encode(text, bos=True, eos=False)


def test_texts_begin_with_bos_and_ids_are_taken_as_they_are(writer):
    ids = [encoded(text) for text in TEXTS]
    assert ids[1] == [tokenizer().bos_id]
    assert write(writer, TEXTS) == write(writer, ids)
    assert write(writer, list(map(np.array, ids))) == write(writer, ids)
    assert write(writer, []) == []


def test_a_completion_is_text_ids_and_logprobs(writer):
    for text, completion in zip(TEXTS, write(writer, TEXTS), strict=True):
        assert completion.text == tokenizer().decode(completion.tokens)
        assert "".join(completion.pieces) == completion.text
        assert len(completion.tokens) == len(completion.logprobs) == 20
        assert len(completion.pieces) == 20
        assert all(type(id) is int for id in completion.tokens)
        assert all(type(x) is float and x <= 0 for x in completion.logprobs)
        assert completion.finish_reason == "length"
        timing = completion.timing
        assert timing.prompt_tokens == len(encoded(text))
        assert timing.cached_tokens == 0
        assert timing.prefill_seconds > 0 and timing.decode_seconds > 0


def test_eos_stops_and_is_left_out(writer, monkeypatch):
    first, *others = write(writer, TEXTS)
    elsewhere = {id for completion in others for id in completion.tokens}
    eos = next(id for id in first.tokens if id not in elsewhere)
    monkeypatch.setattr("llama_jax.generate.generator._EOS", eos)
    stopped, *unchanged = write(writer, TEXTS)
    end = first.tokens.index(eos)
    # A row that ends earlier makes attention read fewer slots, for all rows.
    near(unchanged, others)
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == first.tokens[:end]
    np.testing.assert_allclose(
        stopped.logprobs, first.logprobs[:end], rtol=0, atol=1e-5
    )
    assert stopped.text == tokenizer().decode(first.tokens[:end])


@pytest.mark.parametrize("place", [0, 7])
def test_stop_tokens_end_a_row_and_are_left_out(writer, place):
    first, *others = write(writer, TEXTS)
    end = first.tokens[place]
    stopped, *rest = write(writer, TEXTS, stop_tokens=[383, end])
    place = first.tokens.index(end)
    assert stopped.tokens == first.tokens[:place] and stopped.finish_reason == "stop"
    assert stopped.text == tokenizer().decode(stopped.tokens)
    for found, free in zip(rest, others, strict=True):
        if end not in free.tokens and 383 not in free.tokens:
            near([found], [free])


def test_ends_are_compiled_for_by_the_multiple_of_eight(writer):
    for number, size in ((0, 8), (7, 8), (8, 16)):
        ends = list(range(3, 3 + number))
        found = writer.choice(settings(stop_tokens=ends)).ends.tolist()
        assert found == [2, *ends, *[-1] * (size - number - 1)]


def spelt(completion, start, stop):
    """A part of a text, and the number of characters before it."""
    text = completion.text
    part = text[start:stop]
    return part, text.index(part)


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (5, 6), (4, 9), (10, 14)])
def test_a_stop_string_ends_a_row_wherever_tokens_end(writer, start, stop):
    """At the start, in the middle, across many tokens; and other rows go on."""
    free = write(writer, TEXTS)
    part, place = spelt(free[0], start, stop)
    found, *others = write(writer, TEXTS, stop=["\0never", part])
    assert found.text == free[0].text[:place] and found.finish_reason == "stop"
    num_kept = len(found.tokens)
    assert num_kept == len(found.logprobs) == len(found.pieces) < 20
    assert found.tokens == free[0].tokens[:num_kept]
    assert found.logprobs == free[0].logprobs[:num_kept]
    # No token more than the text needs.
    assert "".join(found.pieces).startswith(found.text)
    assert not found.pieces or len("".join(found.pieces[:-1])) < len(found.text)
    for other, whole in zip(others, free[1:], strict=True):
        if part not in whole.text:
            assert other == whole
    stream = writer.stream(TEXTS[0], settings(stop=["\0never", part]))
    assert "".join(stream) == found.text


def test_a_stop_string_that_does_not_come_changes_nothing(writer):
    free = write(writer, TEXTS)
    beginnings = [completion.text[-3:] + "\0" for completion in free]
    assert write(writer, TEXTS, stop=beginnings) == free
    for text, completion in zip(TEXTS, free, strict=True):
        pieces = list(writer.stream(text, settings(stop=beginnings)))
        assert "".join(pieces) == completion.text


def test_stop_strings_stand_in_the_answer_not_in_the_prompt(writer):
    [free] = write(writer, ["Bace di."])
    assert write(writer, ["Bace di."], stop=["Bace", "di."]) == [free]
    [echoed] = write(writer, ["Bace di."], stop=["Bace"], echo=True)
    assert echoed.text.startswith("Bace di.")


def test_echo_puts_the_prompt_first(writer):
    plain = write(writer, TEXTS)
    echoed = write(writer, TEXTS, echo=True)
    sharded, params = model()
    for text, before, after in zip(TEXTS, plain, echoed, strict=True):
        ids = encoded(text)
        assert after.tokens == ids + before.tokens
        assert after.text == tokenizer().decode(ids + before.tokens)
        assert "".join(after.pieces) == after.text
        assert after.logprobs[len(ids) :] == before.logprobs
        assert after.logprobs[0] == 0 and len(after.logprobs) == len(after.tokens)
        assert after.finish_reason == before.finish_reason
    row = np.zeros((1, CONFIG.max_length), np.int32)
    row[0, : len(after.tokens)] = after.tokens
    with jax.set_mesh(sharded.mesh):
        logits = jax.jit(sharded.model.apply)({"params": params}, row)
    table = np.asarray(jax.nn.log_softmax(logits))[0]
    expected = [table[i, id] for i, id in enumerate(after.tokens[1:])]
    np.testing.assert_allclose(after.logprobs[1:], expected, atol=1e-5)


def test_a_stream_joins_to_the_text(writer):
    for text in TEXTS:
        pieces = list(writer.stream(text, settings()))
        [whole] = write(writer, [text])
        assert "".join(pieces) == whole.text and len(pieces) > 3
        assert all(pieces)


def test_characters_of_several_bytes_come_whole(writer):
    """A model that spells: each byte is a token, forced to come by `allowed`."""
    said = "Zoë 🦙 羊驼!"
    ids = [3 + byte for byte in said.encode()]

    def spell(so_far):
        return [ids[len(so_far)]] if len(so_far) < len(ids) else [2]

    options = {"allowed": spell, "new": len(ids) + 1}
    [whole] = write(writer, [""], **options)
    assert whole.text == said and whole.finish_reason == "stop"
    pieces = list(writer.stream("", settings(**options)))
    assert "".join(pieces) == said and pieces == list(said)
    [stopped] = write(writer, [""], stop=["🦙"], **options)
    assert stopped.text == "Zoë " and stopped.tokens == ids[:5]
    # An answer that ends in the middle of a character says so.
    [cut] = write(writer, [""], allowed=spell, new=6)
    assert cut.text == "Zoë \ufffd" and len(cut.pieces) == len(cut.tokens) == 6


def test_a_stream_that_is_left_early_leaves_nothing_behind(writer):
    stream = writer.stream("Bace", settings())
    first = next(stream)
    assert jax.sharding.get_abstract_mesh().empty
    stream.close()
    assert next(writer.stream("Bace", settings())) == first


def test_two_streams_at_once(writer):
    alone = ["".join(writer.stream(text, settings())) for text in TEXTS[:2]]
    streams = [writer.stream(text, settings()) for text in TEXTS[:2]]
    pieces = ["", ""]
    for _ in range(30):
        for i, stream in enumerate(streams):
            pieces[i] += next(stream, "")
    assert pieces == alone


@pytest.mark.parametrize("before", ["Bace", "Bace ", "", " "])
def test_no_space_is_lost(writer, before):
    """Between a prompt and what goes on from it; a text of its own begins with none."""
    prompt = encoded(before)
    after = [*tokenizer().encode("Han  kel.", bos=False, eos=False)]
    forced = {"allowed": lambda written: [after[len(written)]], "new": len(after)}
    (found,) = write(writer, [before], **forced)
    whole = "Han  kel." if before == "" else f"{before} Han  kel."
    assert before + found.text == tokenizer().decode(prompt + after) == whole
    assert "".join(found.pieces) == found.text
    assert "".join(writer.stream(before, settings(**forced))) == found.text
    (echoed,) = write(writer, [before], echo=True, **forced)
    assert echoed.text == "".join(echoed.pieces) == whole
    (copied,) = write(writer, [prompt], **forced)
    assert copied == found


def test_chat_is_the_dialog_as_a_prompt():
    writer = generator(slots=32)
    dialog = [{"role": "user", "content": "Wex?"}]
    answer = writer.chat(dialog, settings(seed=1))
    prompt = encode_dialog(tokenizer(), dialog)
    (found,) = write(writer, [prompt], seed=1)
    assert answer.tokens == found.tokens and answer.logprobs == found.logprobs


def test_an_answer_is_a_text_of_its_own():
    """Meta's template puts the space before it, where no answer shows it."""
    writer = generator(slots=32)
    after = tokenizer().encode("Han", bos=False, eos=False)
    forced = {"allowed": lambda written: [after[len(written)]], "new": len(after)}
    dialog = [{"role": "user", "content": "Wex?"}]
    assert writer.chat(dialog, settings(**forced)).text == "Han"


def test_seeds_rows_and_copies(writer):
    def texts(prompts, **options):
        return [completion.text for completion in write(writer, prompts, **options)]

    first = texts(TEXTS)
    assert texts(TEXTS) == first
    assert texts(TEXTS, seed=1) != first
    assert texts(TEXTS, seed=-(2**70)) != first
    assert texts(TEXTS[::-1]) == first[::-1]
    copies = texts(["Bace di."] * 4)
    assert copies[0] == first[0] and len(set(copies)) == 4


def test_a_seed_for_each_prompt(writer):
    many = [write(writer, TEXTS, seed=seed)[i] for i, seed in enumerate((5, 6, 7, 5))]
    near(write(writer, TEXTS, seed=[5, 6, 7, 5]), many)
    # Equal prompts with seeds of their own are no copies of one another.
    alike = write(writer, [""] * 4, seed=[1, 2, 2, 1])
    assert alike[0].tokens != alike[3].tokens
    near(write(writer, [""] * 4, seed=[2, 1, 1, 2])[1:3], [alike[0], alike[3]])


def test_samples_of_a_prompt_are_what_copies_of_it_give(writer, read):
    """And the prompt is read once."""
    copied = write(writer, ["Bace di.", "Bace di.", "", ""])
    assert read == [(2, 0)]
    read.clear()
    samples = write(writer, ["Bace di.", ""], num_samples=2)
    assert read == [(2, 0)] and samples == copied
    assert samples[0].text != samples[1].text
    # One alone is the first of several.
    near(write(writer, ["Bace di."]), samples[:1])
    read.clear()
    four = write(writer, ["Bace di."], num_samples=4)
    assert read == [(1, 0)]
    near(four[:2], samples[:2])
    assert len({completion.text for completion in four}) == 4


def test_samples_have_the_seed_of_their_prompt(writer):
    samples = write(writer, ["Bace di.", ""], num_samples=2, seed=[3, 4])
    copies = ["Bace di.", "Bace di.", "", ""]
    assert samples == write(writer, copies, seed=[3, 3, 4, 4])
    assert samples[:2] == write(writer, copies, seed=3)[:2]
    echoed = write(writer, ["Bace di.", ""], num_samples=2, seed=[3, 4], echo=True)
    ids = [*[encoded("Bace di.")] * 2, *[[1]] * 2]
    assert [c.tokens for c in echoed] == [
        prompt + sample.tokens for prompt, sample in zip(ids, samples, strict=True)
    ]


def test_only_allowed_tokens_come(writer):
    """As ids and as a mask; asked for what was written so far."""
    asked = []

    def after(ids):
        asked.append(ids)
        return [100, 101, 102] if len(ids) % 2 else [200, 201]

    def masked(ids):
        mask = np.zeros(CONFIG.vocab_size, bool)
        mask[[100, 101, 102] if len(ids) % 2 else [200, 201]] = True
        return mask

    found = write(writer, TEXTS, new=6, allowed=after)
    for completion in found:
        for place, id in enumerate(completion.tokens):
            assert id in ((100, 101, 102) if place % 2 else (200, 201))
    written = [completion.tokens for completion in found]
    assert len(asked) == 24
    assert all(ids in [row[: len(ids)] for row in written] for ids in asked)
    assert write(writer, TEXTS, new=6, allowed=masked) == found
    free = write(writer, TEXTS, new=6)
    assert write(writer, TEXTS, new=6, allowed=lambda _: range(384)) == free


def test_what_is_asked_cannot_be_changed_by_who_answers(writer):
    def destructive(ids):
        ids.clear()
        return [100, 101]

    [found] = write(writer, [""], new=4, allowed=destructive)
    assert len(found.tokens) == 4


def test_a_row_that_ends_by_what_is_allowed_changes_no_other(writer):
    free = write(writer, TEXTS, new=8)
    firsts = [completion.tokens for completion in free]

    def follow(ids):
        """The way the row went; the first row has to end after three tokens."""
        if len(ids) >= 3 and ids[:3] == firsts[0][:3]:
            return [2]
        return range(384)

    found = write(writer, TEXTS, new=8, allowed=follow)
    assert found[0].tokens == firsts[0][:3] and found[0].finish_reason == "stop"
    assert found[1:] == free[1:]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([], r"allowed\(...\) leaves no token to come after \[\]: let it give EOS"),
        (np.zeros(CONFIG.vocab_size, bool), "leaves no token"),
        ([384], r"allowed\(...\) has the id 384"),
        ([True, False], r"allowed\(...\) is .*token ids"),
        ([0.5], r"allowed\(...\) is .*token ids"),
        (None, r"allowed\(...\) is .*token ids"),
    ],
)
def test_nothing_allowed_or_what_are_no_ids(writer, said, message):
    with pytest.raises(GenerationError, match=message):
        write(writer, TEXTS, allowed=lambda _: said)
    # The generator is as good as before.
    assert len(write(writer, TEXTS)) == 4


def test_penalties_change_what_comes_and_not_its_log_probability(writer):
    free = write(writer, TEXTS, sampler=Greedy())
    same = write(writer, TEXTS, sampler=Greedy(), penalties=Penalties())
    held = write(writer, TEXTS, sampler=Greedy(), penalties=Penalties(presence=99.0))
    assert same == free
    assert all(len(set(completion.tokens)) == 20 for completion in held)
    assert held != free
    echoed = write(
        writer, TEXTS, sampler=Greedy(), penalties=Penalties(presence=99.0), echo=True
    )
    again = writer.generate([c.tokens for c in echoed], settings(new=1), echo=True)
    for completion, row in zip(held, again, strict=True):
        own = row.logprobs[-1 - len(completion.tokens) : -1]
        np.testing.assert_allclose(completion.logprobs, own, rtol=0, atol=1e-5)


def test_the_context_ends_a_row(writer):
    long = [1] * 31
    found = write(writer, [long, [1, 2, 3], [1], [5] * 30], new=999)
    assert [len(c.tokens) for c in found] == [1, 29, 31, 2]
    assert {c.finish_reason for c in found} == {"length"}


def test_a_shorter_cache_ends_a_row_earlier():
    rows = generator(slots=20).rows(TEXTS, settings(new=999))
    assert [row.limit for row in rows] == [20] * 4
    rows = generator(slots=20).rows(TEXTS, settings(new=5))
    assert [row.limit - len(row.ids) for row in rows] == [5] * 4


def test_a_model_without_a_tokenizer_serves_ids(writer):
    silent = Generator(engine(), None)
    for found, spoken in zip(
        write(silent, [[1, 5, 9]] * 4), write(writer, [[1, 5, 9]] * 4), strict=True
    ):
        assert found == dataclasses.replace(spoken, text="", pieces=[""] * 20)


def test_eight_devices_pad_the_batch_and_write_the_same(writer):
    near(write(generator(EIGHT), TEXTS[:3]), write(writer, TEXTS)[:3])
