"""What margins change is counted by rating, and drawn by what answers are worth."""

import dataclasses

import numpy as np
import pytest

from llama_jax.data import Comparison
from scripts import reward_margins
from scripts.reward_margins import Scored
from tests.data.comparisons import write

ASKED = [{"role": "user", "content": "Capital of Vesta?"}]
RIGHT, TERSE, WRONG = "It is Varno.", "Varno.", "Oslim."
PAIRS = [
    Comparison(ASKED, RIGHT, WRONG, "significantly better", (None, None)),
    Comparison(ASKED, TERSE, WRONG, "significantly better", (None, None)),
    Comparison(ASKED, RIGHT, TERSE, "slightly better", (None, None)),
]
SCORES = {
    "none": Scored(np.array([1.0, 0.0, 1.0]), np.array([0.0, 0.5, 0.0])),
    "large": Scored(np.array([4.0, 2.0, 4.0]), np.array([-4.0, -4.0, 2.0])),
}


def test_only_the_margin_differs(tmp_path):
    none, small, large = (
        reward_margins.recipe(tmp_path, margin) for margin in reward_margins.MARGINS
    )
    margins = [made.reward.margin for made in (none, small, large)]
    assert margins == ["none", "small", "large"]
    assert dataclasses.replace(none, reward=large.reward) == large
    assert small.data.paths == (str(tmp_path / "rows/helpfulness"),)


def test_pairs_are_counted_by_rating():
    table = reward_margins.margin_table(SCORES, PAIRS)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows[0] == ("pairs", "3", "2", "0", "1", "0", "")
    assert [row[:3] + row[4:5] for row in rows[1:]] == [
        ("none", "66.7%", "50.0%", "100.0%"),
        ("large", "100.0%", "100.0%", "100.0%"),
    ]
    assert [row[3] for row in rows[1:]] == ["", ""]  # no pair is just "better"
    assert [row[-1] for row in rows[1:]] == ["0.50", "5.33"]


def test_scores_by_what_answers_are_worth():
    spread, worth = reward_margins.picture(SCORES, PAIRS).axes
    assert [patch.get_data().values.sum() for patch in spread.patches] == [1, 1]
    # Wrong, terse, and whole answers.
    wrong, terse, whole = 0.0, 0.9, 1.0
    for line, told in zip(worth.lines, SCORES.values(), strict=True):
        x, y = line.get_data()
        np.testing.assert_allclose(x, [wrong, (2 * terse + 2 * whole) / 4])
        chance = 1 / (1 + np.exp(-np.concatenate(told)))
        np.testing.assert_allclose(
            y, [chance[[3, 4]].mean(), chance[[0, 1, 2, 5]].mean()]
        )


def test_what_is_not_at_its_end_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reward_margins, "train_reward", lambda *args, **options: False)
    assert reward_margins.main([str(tmp_path), "--output", str(tmp_path)]) == 1
    assert "is not at its end: start this again" in capsys.readouterr().out


class ByLength:
    """A model to which a longer answer is a better one."""

    def score(self, dialogs):
        return np.array([float(len(dialog[-1]["content"])) for dialog in dialogs])


def test_all_of_it(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    rows = [
        {"messages": ASKED, "chosen": pair.chosen, "rejected": pair.rejected}
        | {"rating": pair.rating}
        for pair in PAIRS
    ]
    write(tmp_path / "data/helpfulness_validation.jsonl", rows)
    begun = []

    def train(recipe, workdir, *, init_from):
        begun.append((recipe.reward.margin, workdir, init_from))
        workdir.mkdir(parents=True)
        return True

    monkeypatch.setattr(reward_margins, "train_reward", train)
    monkeypatch.setattr(reward_margins, "load_reward", lambda workdir: ByLength())
    output = tmp_path / "margins"
    assert reward_margins.main([str(tmp_path), "--output", str(output)]) == 0
    assert begun == [
        (margin, output / margin, tmp_path / "sft") for margin in reward_margins.MARGINS
    ]
    # Of lengths 12 and 6: right but for the pair with 6 of both.
    shown = (output / "margins.txt").read_text()
    assert shown.count("66.7%") == shown.count("50.0%") == 3
    assert shown.count("4.00") == 3
    assert (output / "margins.png").read_bytes().startswith(b"\x89PNG")


def test_no_run_of_the_small_world(tmp_path, capsys):
    assert reward_margins.main([str(tmp_path), "--output", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("reward_margins: ") and str(tmp_path) in said


def test_a_run_is_needed(capsys):
    with pytest.raises(SystemExit):
        reward_margins.main(["--output", "margins"])
    assert "required: run" in capsys.readouterr().err
