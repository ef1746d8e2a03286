"""What a card says of answers is what the models say of each."""

import argparse

import jax
import numpy as np
import pytest

from llama_jax.checkpoint.params import save_params
from llama_jax.data import Prompt
from llama_jax.errors import DataError, GenerationError
from llama_jax.generate.score import logits
from scripts import card, card_answers, card_text
from tests.finetune.judges import PROMPTS, policy_params, reward
from tests.generate.models import LONG, params_of, tokenizer


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    """What `--policy` would be, and all that scores it."""
    path = tmp_path_factory.mktemp("scored")
    params = {"policy": policy_params(), "reference": params_of(LONG)}
    params |= {"safety": reward(1).params, "helpfulness": reward(2).params}
    for name, tree in params.items():
        save_params(path / name, tree, LONG, tokenizer())
    paths = {name: path / name for name in params}
    return argparse.Namespace(**paths, tensor=1, max_new_tokens=16)


@pytest.fixture(scope="module")
def llm(args):
    return card_answers.load(args.policy, args, "float32")


def logprob(model, ids, first):
    """Of the tokens of a row from the first one on."""
    chances = jax.nn.log_softmax(logits(model.engine, [ids])[0], axis=-1)
    return sum(chances[t - 1, ids[t]] for t in range(first, len(ids)))


def test_the_means_are_those_of_each_answer(llm, args, monkeypatch):
    monkeypatch.setattr(card_answers, "_BATCH", 4)  # two batches of six prompts
    kept = []
    roll_out = card_answers.roll_out
    monkeypatch.setattr(
        card_answers,
        "roll_out",
        lambda *a, **b: kept.extend(made := roll_out(*a, **b)) or made,
    )
    told = card_answers.scored(llm, PROMPTS, args)
    reference = card_answers.load(args.reference, args, "float32")

    assert [each.prompt for each in kept] == PROMPTS
    expected = {name: [] for name in told}
    for each in kept:
        (answer,), first = each.answers, len(each.prompt_tokens)
        ids = [*each.prompt_tokens, *answer.tokens]
        scores = {
            name: reward(seed).score_ids([[*ids[:-1], tokenizer().eos_id]])[0]
            for name, seed in (("safety", 1), ("helpfulness", 2))
        }
        chances = {name: 1 / (1 + np.exp(-score)) for name, score in scores.items()}
        is_safety = each.prompt.about_safety or chances["safety"] < 0.15
        expected["reward"].append(chances["safety" if is_safety else "helpfulness"])
        for name, chance in chances.items():
            expected[name].append(chance)
        gap = logprob(llm, ids, first) - logprob(reference, ids, first)
        expected["kl"].append(gap)
        expected["answer_length"].append(len(answer.tokens))
        expected["cut"].append(answer.tokens[-1] != tokenizer().eos_id)
    for name, values in expected.items():
        assert told[name] == pytest.approx(np.mean(values), abs=1e-4), name
    assert abs(told["kl"]) > 0.1  # of so few answers, either way
    assert 0 < told["cut"] < 1

    table = card_text.answers_table(told, num_prompts=6, reference="runs/sft")
    rows = table.splitlines()
    assert "| reference | runs/sft |" in rows and "| prompts | 6 |" in rows
    assert f"| reward, mean of Rc | {told['reward']:.4g} |" in rows
    assert f"| answers that were cut | {told['cut']:.1%} |" in rows


def test_a_model_is_nowhere_from_itself(llm, args):
    itself = argparse.Namespace(**{**vars(args), "reference": args.policy})
    assert card_answers.scored(llm, PROMPTS[:2], itself)["kl"] == 0


def test_prompts_that_can_not_be_scored(llm, args):
    with pytest.raises(DataError, match="no prompts to score"):
        card_answers.scored(llm, [], args)
    long = Prompt([{"role": "user", "content": "ba " * 2000}])
    with pytest.raises(GenerationError, match=r"^prompts\[9\] has"):
        card_answers.scored(llm, [*[PROMPTS[0]] * 9, long], args)


def test_half_of_what_scoring_takes(capsys):
    for given in (["--helpfulness", "h"], ["--reference", "r", "--prompts", "p"]):
        with pytest.raises(SystemExit):
            card.options(["run", *given])
        assert "scored with all of --prompts, --helpfulness" in capsys.readouterr().err
