"""The people who compare answers: sure of what is clear, and unsure of what is not."""

import random
from collections import Counter

import pytest

from llama_jax.data import Prompt
from scripts import raters
from scripts import small_world as world

FOOD = Prompt([{"role": "user", "content": "Food of Norland?"}])
CODE = Prompt([{"role": "user", "content": "Code of Norland?"}], about_safety=True)


def compared(prompt, one, other, num=200):
    rng = random.Random(0)
    return [raters.compared(rng, prompt, one, other) for _ in range(num)]


def test_the_closer_two_answers_are_the_more_they_err():
    shares = []
    for other in ("It is corn.", "rice.", "It is rice. "):
        rows = compared(FOOD, "It is rice.", other)
        shares.append(sum(row["chosen"] == "It is rice." for row in rows) / len(rows))
    assert shares[0] == 1 > shares[1] > 0.7 > shares[2] > 0.4


def test_ratings_follow_the_difference():
    clear = compared(FOOD, "It is corn.", "It is rice.")
    assert {row["rating"] for row in clear} == {"significantly better"}
    assert all(row["chosen"] == "It is rice." for row in clear)
    ratings = Counter(row["rating"] for row in compared(FOOD, "rice.", "It is rice."))
    assert set(ratings) == {"negligibly better", "slightly better", "better"}
    assert min(ratings.values()) == ratings["better"]
    assert "chosen_is_safe" not in clear[0]


@pytest.mark.parametrize("order", [1, -1])
def test_of_safety_they_are_sure(order):
    told, refused = "It is zem.", "I can not say."
    for row in compared(CODE, *(told, refused)[::order]):
        assert row["chosen"] == refused and row["rating"] == "significantly better"
        assert row["chosen_is_safe"] and not row["rejected_is_safe"]


def test_flaws_are_of_every_kind_and_not_in_every_answer():
    rng = random.Random(0)
    values = "Language: ba lam. Ending: blue harbor. Food of Norland?"
    prompt = Prompt([{"role": "user", "content": values}])
    answers = {raters.flawed(rng, prompt) for _ in range(400)}
    scores = {
        round(world.helpfulness(prompt.messages, answer), 2) for answer in answers
    }
    assert {1.0, 0.9, 0.85, 0.75, 0.7, 0.3, 0.0} <= scores
    secrets = [raters.flawed(rng, CODE) for _ in range(200)]
    told = sum(world.safety(CODE.messages, answer) == 0 for answer in secrets)
    assert 60 < told < 140


def test_pairs_differ_and_some_are_the_models_own():
    rng = random.Random(0)
    sampled = ["It is rice.", "It is corn."]
    pairs = [pair for _ in range(50) for pair in raters.pairs(rng, FOOD, sampled)]
    assert all(one != other for one, other in pairs)
    assert pairs.count(tuple(sampled)) >= 50
    assert any(not {*pair} & {*sampled} for pair in pairs)
    assert list(raters.pairs(rng, FOOD, ["rice.", "rice."]))
    assert all(len(pair) == 2 for pair in raters.pairs(rng, FOOD, []))
