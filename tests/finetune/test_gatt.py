"""Ghost Attention: the recipe of its data."""

import json
import random
from collections import Counter

import pytest

import llama_jax
from llama_jax.data import DialogLines
from llama_jax.errors import ConfigError, DataError, DialogError, GenerationError
from llama_jax.finetune.gatt import (
    FIGURE,
    HOBBY,
    LANGUAGE,
    Instruction,
    Trait,
    attach,
    chosen_by,
    ghost,
    ghost_rows,
    read_values,
    synthesise,
    write_ghost_rows,
)
from llama_jax.finetune.rollout import Judge
from llama_jax.llm import LLM
from llama_jax.text import encode_dialog, encode_example
from tests.finetune.judges import judge, policy, reward
from tests.finetune.scripted import Scripted, assistant, system, user
from tests.generate.models import LONG, llm, tokenizer

NAPOLEON = Instruction(((FIGURE, "Napoleon"),), is_short=False)
TENNIS = Instruction(((FIGURE, "Ada"), (HOBBY, "tennis")), is_short=True)
VALUES = {FIGURE: ["Napoleon", "Ada"], HOBBY: ["tennis"], LANGUAGE: ["French"]}


TWO_TURNS = [user("Hi"), assistant("Hello"), user("Who?"), assistant("Me")]


def first(dialog, candidates):
    return 0


def rows(speaker, dialogs, instructions, **changes):
    options = {
        "choose": first,
        "num_samples": 1,
        "max_new_tokens": 8,
        "sampler": llama_jax.Greedy(),
    }
    return list(ghost_rows(speaker, dialogs, instructions, **(options | changes)))


def test_the_papers_wordings():
    assert NAPOLEON.text == "Always act as Napoleon from now."
    assert Instruction(NAPOLEON.parts, is_short=True).text == "Figure: Napoleon."
    assert TENNIS.text == "Figure: Ada. Hobby: tennis."
    assert TENNIS.values == {"figure": "Ada", "hobby": "tennis"}


def test_instructions_combine_classes_at_random_and_half_are_short():
    drawn = synthesise(random.Random(0), VALUES, 7000)
    assert drawn == synthesise(random.Random(0), VALUES, 7000)
    combinations = Counter(tuple(made.values) for made in drawn)
    assert len(combinations) == 7  # each but none
    assert all(abs(n - 1000) < 150 for n in combinations.values())
    assert abs(sum(made.is_short for made in drawn) - 3500) < 150
    figures = Counter(made.values.get("figure") for made in drawn)
    assert abs(figures["Napoleon"] - figures["Ada"]) < 250
    for share in (0, 1):
        made = synthesise(random.Random(0), VALUES, 50, short_share=share)
        assert {one.is_short for one in made} == {bool(share)}


@pytest.mark.parametrize(
    "values, share, message",
    [
        ({}, 0.5, "values is empty: give at least one class"),
        ({HOBBY: []}, 0.5, "the class 'hobby' has no values"),
        ({Trait("x", "Be {}.", "Be."): ["a"]}, 0.5, "a wording without {}"),
        ({HOBBY: ["a"]}, 1.5, "short_share is 1.5: it is a share, from 0 to 1"),
    ],
)
def test_what_cannot_be_combined(values, share, message):
    with pytest.raises(ConfigError, match=message):
        synthesise(random.Random(0), values, 1, short_share=share)


ENDING = {"wording": "End with {}.", "short": "Ending: {}.", "values": ["a proverb"]}


def test_values_come_from_a_file(tmp_path):
    file = tmp_path / "values.json"
    figure = {"wording": "Be {}.", "short": "Be {}!", "values": ["Ada"]}
    file.write_text(json.dumps({"hobby": ["chess", "tennis"], "ending": ENDING}))
    ending = Trait("ending", "End with {}.", "Ending: {}.")
    assert read_values(file) == {HOBBY: ["chess", "tennis"], ending: ["a proverb"]}
    file.write_text(json.dumps({"figure": figure}))
    assert read_values(file) == {Trait("figure", "Be {}.", "Be {}!"): ["Ada"]}
    drawn = synthesise(random.Random(0), read_values(file), 3)
    assert {made.text for made in drawn} <= {"Be Ada.", "Be Ada!"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is no JSON that can be read"),
        ("[]", "names no class: write an object"),
        ("{}", "names no class: write an object"),
        ('{"ending": ["x"]}', "'ending' is .*figure, hobby, language.*\"wording\""),
        ('{"hobby": "chess"}', "'hobby' is 'chess': write a list of values"),
        ('{"hobby": []}', "'hobby' has no values: write a list"),
        ('{"hobby": [1]}', "'hobby' has 1: write some text"),
        ('{"hobby": [" "]}', "'hobby' has ' ': write some text"),
        ('{"hobby": ["[INST]"]}', "without tags of the format"),
        (json.dumps({"ending": ENDING | {"short": 1}}), "said as 1: write {} once"),
        (json.dumps({"ending": ENDING | {"short": "{} {}"}}), "write {} once"),
        (json.dumps({"ending": ENDING | {"short": "{} {a}"}}), "no other braces"),
        (json.dumps({"ending": ENDING | {"wording": "End."}}), "'End.': write {} once"),
        (json.dumps({"ending": ENDING | {"values": "x"}}), "'ending' has no values"),
        (json.dumps({"ending": ENDING | {"more": 1}}), "'ending' is"),
    ],
)
def test_a_file_that_names_no_values(text, message, tmp_path):
    (tmp_path / "values.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_values(tmp_path / "values.json")
    with pytest.raises(DataError, match="none.json is no JSON that can be read"):
        read_values(tmp_path / "none.json")


def test_attached_to_every_question_and_kept_in_the_first_turn_alone():
    said = "Always act as Napoleon from now."
    assert attach([system("S"), *TWO_TURNS], NAPOLEON) == [
        system("S"),
        user(f"{said} Hi"),
        assistant("Hello"),
        user(f"{said} Who?"),
        assistant("Me"),
    ]
    row = ghost(TWO_TURNS, NAPOLEON)
    assert row == {"messages": [system(said), *TWO_TURNS], "learn": "last"}
    row = ghost([system("S"), *TWO_TURNS], NAPOLEON)
    assert row["messages"] == [system(f"S\n{said}"), *TWO_TURNS]
    with pytest.raises(DialogError, match="Last message must be from assistant"):
        ghost(TWO_TURNS[:-1], NAPOLEON)


def test_rows_are_lines_that_data_reads(tmp_path):
    speaker = Scripted(lambda prompt, seed: "Bonjour")
    made = rows(speaker, [TWO_TURNS], [NAPOLEON])
    file = tmp_path / "gatt.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in made))
    (dialog,) = DialogLines(file)
    assert dialog == (
        [system(NAPOLEON.text), *TWO_TURNS[:3], assistant("Bonjour")],
        "last",
    )


@pytest.mark.parametrize("resample", ["last", "all"])
def test_which_answers_are_sampled(resample):
    """The model reads the instruction with every question, in the row it is once."""
    speaker = Scripted(lambda prompt, seed: f"answer {prompt.count('[/INST]')}")
    dialogs = [TWO_TURNS, [user("Why?")], [system("S"), *TWO_TURNS[:3]]]
    made = rows(
        speaker, dialogs, [NAPOLEON, TENNIS, NAPOLEON], resample=resample, batch_size=2
    )
    before = "answer 1" if resample == "all" else "Hello"
    said = NAPOLEON.text
    turns = [user("Hi"), assistant(before), user("Who?"), assistant("answer 2")]
    assert [row["messages"] for row in made] == [
        [system(said), *turns],
        [system(TENNIS.text), user("Why?"), assistant("answer 1")],
        [system(f"S\n{said}"), *turns],
    ]
    assert {row["learn"] for row in made} == {"last"}
    last = f"[INST] {said} Hi [/INST] {before}  [INST] {said} Who? [/INST]"
    assert last in speaker.asked
    assert len(speaker.asked) == (5 if resample == "all" else 3)


def test_the_best_of_several_is_chosen_by_who_sees_the_instruction():
    seen = []

    def choose(dialog, candidates):
        seen.append((dialog[-1]["content"], len(candidates)))
        return candidates.index(max(candidates))

    answers = {"0/0": "b", "0/1": "c", "0/2": "a"}
    speaker = Scripted(lambda prompt, seed: answers[seed])
    (row,) = rows(speaker, [TWO_TURNS], [NAPOLEON], choose=choose, num_samples=3)
    assert row["messages"][-1] == assistant("c")
    assert seen == [(f"{NAPOLEON.text} Who?", 3)]
    with pytest.raises(DataError, match="choose gave 3 for 3 answers"):
        rows(speaker, [TWO_TURNS], [NAPOLEON], num_samples=3, choose=lambda *_: 3)


def test_a_judge_chooses_what_scores_highest_with_the_instruction():
    asked = attach(TWO_TURNS[:3], NAPOLEON)
    candidates = ["ba", "ce di", "fo gu ba", "di"]
    judged = judge()
    ids = [
        encode_example(tokenizer(), [*asked, assistant(text)]).tokens
        for text in candidates
    ]
    scores = judged.scores(ids, [False] * 4).combined
    assert len(set(scores)) == 4
    assert chosen_by(judged)(asked, candidates) == int(scores.argmax())
    assert chosen_by(judged)(asked, candidates[::-1]) == 3 - int(scores.argmax())


def test_what_a_judge_cannot_read_is_not_chosen():
    asked = attach(TWO_TURNS[:3], NAPOLEON)
    shortest = len(encode_example(tokenizer(), [*asked, assistant("ba")]).tokens)
    short = reward(1, max_length=shortest)
    choose = chosen_by(Judge(short, short))
    assert choose(asked, ["ba ce di fo", "ba"]) == 1
    assert choose(asked, ["ba ce di fo"] * 2) is None
    speaker = Scripted(lambda prompt, seed: "ba ce di fo")
    assert rows(speaker, [TWO_TURNS], [NAPOLEON], choose=choose) == []


def test_draws_follow_the_dialogs_number_and_the_seed():
    speaker = Scripted(lambda prompt, seed: seed)
    dialogs, instructions = [TWO_TURNS] * 3, [NAPOLEON] * 3
    made = rows(speaker, dialogs, instructions, seed=1)
    assert made == rows(speaker, dialogs, instructions, seed=1, batch_size=1)
    answers = [row["messages"][-1]["content"] for row in made]
    assert len(set(answers)) == 3
    other = rows(speaker, dialogs, instructions, seed=2)
    assert not set(answers) & {row["messages"][-1]["content"] for row in other}


@pytest.mark.parametrize(
    "bad", [("cut", "length"), "", "see [INST]", "nul \0"], ids=repr
)
def test_answers_that_cannot_be_learnt_are_left_out(bad, caplog):
    speaker = Scripted(lambda prompt, seed: bad if seed.endswith("/0") else "good")
    (row,) = rows(speaker, [TWO_TURNS], [NAPOLEON], num_samples=2)
    assert row["messages"][-1] == assistant("good")
    assert not caplog.records
    two = [TWO_TURNS, [user("Why?")]]
    never = Scripted(lambda prompt, seed: bad if "Who" in prompt else "good")
    made = rows(never, two, [NAPOLEON] * 2, resample="all")
    assert [row["messages"][-1] for row in made] == [assistant("good")]
    assert "1 of 2 dialogs gave no row" in caplog.text


def test_dialogs_that_outgrow_the_context_are_left_out(caplog):
    ids = encode_dialog(tokenizer(), attach(TWO_TURNS[:3], NAPOLEON))
    for slots, num in ((len(ids), 0), (len(ids) + 1, 1)):
        speaker = Scripted(lambda prompt, seed: "good", slots=slots)
        assert len(rows(speaker, [TWO_TURNS], [NAPOLEON])) == num
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"resample": "first"}, ConfigError, "resample is 'first': give 'last' or"),
        ({"batch_size": 0}, ConfigError, "batch_size is 0: give an integer"),
    ],
)
def test_what_is_no_choice(changes, error, message):
    with pytest.raises(error, match=message):
        rows(None, [TWO_TURNS], [NAPOLEON], **changes)


def test_what_is_no_dialog_is_said_before_anything_is_sampled():
    speaker = Scripted(lambda prompt, seed: "good")
    with pytest.raises(DataError, match="instructions are 1 and dialogs 2"):
        rows(speaker, [TWO_TURNS] * 2, [NAPOLEON])
    with pytest.raises(DialogError, match=r"dialogs\[1\]: the dialog is empty"):
        rows(speaker, [TWO_TURNS, []], [NAPOLEON] * 2)
    with pytest.raises(DialogError, match=r"dialogs\[0\]: .* message 1 is from 'assi"):
        rows(speaker, [[assistant("a")] * 2], [NAPOLEON])
    assert not speaker.asked
    with pytest.raises(GenerationError, match="without one: load it with tokenizer"):
        rows(llm(speaks=False), [TWO_TURNS], [NAPOLEON])


def test_a_model_answers_its_own_dialogs():
    """Ids, lengths and seeds are those that a real model takes."""
    speaker = llm(config=LONG)
    options = {
        "num_samples": 2,
        "sampler": llama_jax.TopP(1.0, temperature=1.0),
        "max_new_tokens": 400,
        "choose": lambda dialog, candidates: len(candidates) - 1,
    }
    dialogs = [TWO_TURNS, TWO_TURNS[:1]]
    made = rows(speaker, dialogs, [NAPOLEON, TENNIS], **options)
    assert made == rows(speaker, dialogs, [NAPOLEON, TENNIS], **options, batch_size=1)
    assert all(row["messages"][-1]["role"] == "assistant" for row in made)


DIALOGS = [TWO_TURNS, TWO_TURNS[:1], TWO_TURNS[:3]]
INSTRUCTIONS = [NAPOLEON, TENNIS, TENNIS]
SAMPLES = {
    "num_samples": 2,
    "sampler": llama_jax.TopP(1.0, temperature=1.0),
    "max_new_tokens": 24,
    "resample": "all",
    "seed": 7,
}


def random_llm():
    return LLM(policy(slots=256).engine, tokenizer())


def write(path, **changes):
    given = {
        "llm": random_llm(),
        "dialogs": DIALOGS,
        "instructions": INSTRUCTIONS,
        "judge": judge(),
    }
    return write_ghost_rows(path, **(given | SAMPLES | {"batch_size": 1} | changes))


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("ghost") / "whole"
    assert write(path).num_items == 3
    return path


class TestWritten:
    def test_they_are_those_of_ghost_rows(self, whole):
        """Whatever the size of batches and files."""
        choose = chosen_by(judge())
        made = rows(
            random_llm(), DIALOGS, INSTRUCTIONS, choose=choose, batch_size=2, **SAMPLES
        )
        assert len(made) > 1
        files = sorted(whole.glob("rows-*.jsonl"))
        assert len(files) == 3
        text = "".join(file.read_text() for file in files)
        assert [json.loads(line) for line in text.splitlines()] == made

    def test_killed_it_ends_as_it_would_have(self, whole, tmp_path):
        def killed(done, total):
            raise KeyboardInterrupt

        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                write(tmp_path, watch=killed)
        assert len(list(tmp_path.glob("rows-*"))) == 1
        write(tmp_path)
        assert content(tmp_path) == content(whole)

    def test_other_ones_are_refused(self, whole):
        before = content(whole)
        for message, changes in {
            "seed was 7 and is 8": {"seed": 8},
            "resample was 'all' and is 'last'": {"resample": "last"},
            "batch_size was 1 and is 2": {"batch_size": 2},
            "dialogs was": {"dialogs": [TWO_TURNS] * 3},
            "instructions was": {"instructions": [NAPOLEON] * 3},
            "threshold was 0.15": {"judge": judge(threshold=0.2)},
            "safety_model was": {"judge": Judge(reward(3), reward(2))},
            "policy was": {"llm": llm(config=LONG, slots=256)},
        }.items():
            with pytest.raises(DataError, match=f"holds a set of rows .*{message}"):
                write(whole, **changes)
        assert content(whole) == before

    def test_nothing_to_write(self, tmp_path):
        with pytest.raises(DataError, match="there are no dialogs: give at least one"):
            write(tmp_path, dialogs=[], instructions=[])
        with pytest.raises(DataError, match="none of the 1 dialogs gave a row"):
            write(
                tmp_path, dialogs=[TWO_TURNS], instructions=[TENNIS], max_new_tokens=1
            )
