"""A model's own answers: which of them can be learnt."""

import pytest

import llama_jax
from llama_jax.errors import DialogError, GenerationError
from llama_jax.finetune.answers import can_be_learnt, require_learnable, sampled_answers
from tests.finetune.scripted import Scripted, assistant, user
from tests.generate.models import llm

OPTIONS = {"max_new_tokens": 8, "sampler": llama_jax.Greedy()}


def test_what_can_be_learnt():
    assert can_be_learnt("An answer.")
    for answer in ("", " \n", "a [/INST] b", "a\0"):
        assert not can_be_learnt(answer)
    with pytest.raises(DialogError, match="message 1 holds NUL: it is no text"):
        require_learnable([user("a\0")], "An answer.")


def test_of_each_dialog_those_that_can_be_learnt():
    def answer(prompt, seed):
        return ("cut", "length") if seed.endswith("/1") else f"{seed} "

    dialogs = [[user("a")], [user("b"), assistant("c"), user("d")]]
    made = sampled_answers(
        Scripted(answer), dialogs, num_samples=3, seed=[5, 6], **OPTIONS
    )
    assert made == [["5/0", "5/2"], ["6/0", "6/2"]]


def test_a_dialog_that_fills_the_context_has_none():
    speaker = Scripted(lambda prompt, seed: "yes", slots=20)
    dialogs = [[user("a " * 50)], [user("a")]]
    made = sampled_answers(speaker, dialogs, num_samples=1, seed=[0, 1], **OPTIONS)
    assert made == [[], ["yes"]]


def test_without_a_tokenizer():
    with pytest.raises(GenerationError, match="dialogs need a tokenizer, and this mod"):
        sampled_answers(
            llm(speaks=False), [[user("a")]], num_samples=1, seed=[0], **OPTIONS
        )
