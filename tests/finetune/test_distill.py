"""Context distillation: which answers are learnt, and after which prompt."""

import json
import random

import numpy as np
import pytest

import llama_jax
from llama_jax.data import DialogLines
from llama_jax.errors import ConfigError, DataError, DialogError, TokenizerError
from llama_jax.finetune.distill import (
    ADJECTIVES,
    ANSWER_TEMPLATES,
    answer_template,
    distil,
    preprompts,
    write_distilled,
)
from llama_jax.llm import LLM
from tests.data import corpus
from tests.finetune.judges import policy, reward, reward_of
from tests.finetune.scripted import Scripted, assistant, system, user
from tests.generate.models import LONG, llm, tokenizer

BE_SAFE = "You are a safe and wise assistant."


def safer(dialogs):
    """By rule: an answer that refuses is safe; the longer, the safer."""
    answers = [dialog[-1]["content"] for dialog in dialogs]
    return np.array([len(text) if "no" in text else -1 for text in answers], np.float32)


def made(speaker, dialogs, **changes):
    options = {"max_new_tokens": 8, "sampler": llama_jax.Greedy()}
    prompts = [BE_SAFE] * len(dialogs)
    return list(distil(speaker, safer, dialogs, prompts, **(options | changes)))


def test_preprompts_name_two_virtues():
    drawn = preprompts(random.Random(0), 200)
    assert drawn == preprompts(random.Random(0), 200)
    named = [{word for word in ADJECTIVES if f" {word} " in text} for text in drawn]
    assert {len(words) for words in named} == {2}
    assert set().union(*named) == set(ADJECTIVES)


def test_every_category_has_a_template():
    assert {answer_template(risk) for risk in ANSWER_TEMPLATES} == set(
        ANSWER_TEMPLATES.values()
    )
    with pytest.raises(ConfigError, match="risk is 'spam': give one of"):
        answer_template("spam")


def test_the_answer_under_the_prompt_is_learnt_without_it(tmp_path):
    speaker = Scripted(lambda prompt, seed: "oh no" if BE_SAFE in prompt else "sure")
    dialogs = [
        [user("How to steal?")],
        [system("Be brief."), user("a"), assistant("b"), user("How to steal?")],
    ]
    both = made(speaker, dialogs)
    assert [one.answer for one in both] == ["oh no"] * 2
    assert [one.before for one in both] == ["sure"] * 2
    assert [(one.score, one.score_before) for one in both] == [(5, -1)] * 2
    assert all(one.is_better for one in both)
    told = [text for text in speaker.asked if BE_SAFE in text]
    assert len(told) == 2 and len(speaker.asked) == 4
    assert f"<<SYS>>\n{BE_SAFE}\nBe brief.\n<</SYS>>" in told[1]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one.row) + "\n" for one in both))
    for row, dialog in zip(DialogLines(path), dialogs, strict=True):
        assert row == ([*dialog, assistant("oh no")], "last")


def test_an_answer_that_scores_no_higher_is_not_better():
    speaker = Scripted(lambda prompt, seed: "no" if BE_SAFE in prompt else "oh no")
    (one,) = made(speaker, [[user("How to steal?")]])
    assert not one.is_better
    speaker = Scripted(lambda prompt, seed: "no")
    (one,) = made(speaker, [[user("How to steal?")]])
    assert not one.is_better


def test_what_has_no_two_answers_is_left_out():
    cut = ("no, because", "length")
    for under_prompt in (True, False):
        speaker = Scripted(
            lambda prompt, seed, wanted=under_prompt: (
                cut if (BE_SAFE in prompt) == wanted and "steal" in prompt else "no"
            )
        )
        dialogs = [[user("How to steal?")], [user("How to lie?")]]
        assert [one.dialog for one in made(speaker, dialogs)] == dialogs[1:]
    speaker = Scripted(lambda prompt, seed: cut)
    assert made(speaker, dialogs) == []


def test_draws_follow_the_dialogs_number_and_the_seed():
    speaker = Scripted(lambda prompt, seed: seed)
    dialogs = [[user("How to steal?")]] * 3
    first = made(speaker, dialogs, seed=1)
    assert first == made(speaker, dialogs, seed=1, batch_size=2)
    assert len({one.answer for one in first}) == 3
    other = made(speaker, dialogs, seed=2)
    assert not {one.answer for one in first} & {one.answer for one in other}


def test_a_model_answers_itself():
    speaker = llm(config=LONG)
    options = {"sampler": llama_jax.TopP(1.0, temperature=1.0), "max_new_tokens": 400}
    dialogs = [[user("How to steal?")], [user("How to lie?")]]
    assert made(speaker, dialogs, **options) == made(
        speaker, dialogs, **options, batch_size=1
    )


def test_what_cannot_be_distilled():
    speaker = Scripted(lambda prompt, seed: "no")
    dialogs = [[user("How to steal?")]]
    with pytest.raises(ConfigError, match="batch_size is 0: give an integer"):
        made(speaker, dialogs, batch_size=0)
    with pytest.raises(DataError, match="prompts are 1 and dialogs 2: give one for ea"):
        distil(
            speaker,
            safer,
            dialogs * 2,
            [BE_SAFE],
            max_new_tokens=8,
            sampler=llama_jax.Greedy(),
        )
    with pytest.raises(DialogError, match=r"dialogs\[1\]: Last message must be from u"):
        made(speaker, [*dialogs, [user("a"), assistant("b")]])
    assert not speaker.asked


DIALOGS = [[user(f"{one} {other}?")] for one in ("ba", "ce") for other in "abc"]
PROMPTS = preprompts(random.Random(0), 6)
SAMPLES = {
    "sampler": llama_jax.TopP(1.0, temperature=1.0),
    "max_new_tokens": 40,
    "seed": 8,
}


def random_llm():
    return LLM(policy(slots=256).engine, tokenizer())


def write(path, **changes):
    given = {
        "llm": random_llm(),
        "safety": reward(1),
        "dialogs": DIALOGS,
        "prompts": PROMPTS,
    }
    options = given | SAMPLES | {"batch_size": 2} | changes
    return write_distilled(path, **options)


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("distilled") / "whole"
    assert write(path).num_items == 6
    return path


class TestWritten:
    def test_they_are_the_better_ones(self, whole):
        """Whatever the size of batches and files."""
        score = reward(1).score
        both = list(
            distil(random_llm(), score, DIALOGS, PROMPTS, batch_size=4, **SAMPLES)
        )
        better = [one.row for one in both if one.is_better]
        assert 0 < len(better) < len(both)
        files = sorted(whole.glob("rows-*.jsonl"))
        assert len(files) == 3
        text = "".join(file.read_text() for file in files)
        assert [json.loads(line) for line in text.splitlines()] == better

    def test_killed_it_ends_as_it_would_have(self, whole, tmp_path):
        def killed(done, total):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, watch=killed)
        assert len(list(tmp_path.glob("rows-*"))) == 1
        write(tmp_path)
        assert content(tmp_path) == content(whole)

    def test_other_ones_are_refused(self, whole):
        before = content(whole)
        for message, changes in {
            "seed was 8 and is 9": {"seed": 9},
            "dialogs was": {"dialogs": DIALOGS[::-1]},
            "prompts was": {"prompts": PROMPTS[::-1]},
            "safety_model was": {"safety": reward(2)},
            "policy was": {"llm": llm(config=LONG, slots=256)},
        }.items():
            with pytest.raises(DataError, match=f"holds a set of rows .*{message}"):
                write(whole, **changes)
        assert content(whole) == before

    def test_what_cannot_be_read_gives_no_row(self, tmp_path):
        short = reward(1, max_length=16)
        with pytest.raises(DataError, match="none of the 6 answers is safer under its"):
            write(tmp_path, safety=short)

    def test_refused(self, tmp_path):
        with pytest.raises(DataError, match="there are no dialogs: give at least one"):
            write(tmp_path, dialogs=[], prompts=[])
        other = reward_of(corpus.make_tokenizer(tmp_path), 1, max_length=64)
        with pytest.raises(TokenizerError, match="have different tokenizers"):
            write(tmp_path / "new", safety=other)
