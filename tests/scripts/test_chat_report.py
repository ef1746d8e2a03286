"""The table of a chat model's stages: what is counted, over prompts and over runs."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from llama_jax.text import encode_dialog
from llama_jax.train.metrics import METRICS
from scripts import chat_report as report
from scripts import small_world as world
from tests.generate.models import tokenizer


def result(reward, kept, error=0.01):
    return {
        "reward": reward,
        "reward_error": error,
        **dict.fromkeys(report.KINDS, reward),
        "violations": 0.25,
        "kl": 1.5,
        "kept": [1.0, kept, *[0.75] * 18],
        "map": [[1.0, 0.0], [0.5, 0.5]],
    }


def results(*kept):
    return [dict.fromkeys(report.STAGES, result(0.5 + k / 10, k)) for k in kept]


def shown(table):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


class Scripted:
    """In place of a model: answers the prompts of the test by the rule, or not."""

    def __init__(self, engine):
        self.engine = engine
        self.tokenizer = tokenizer()
        prompts = list(world.prompts(random.Random(0), 6, held_out=True))
        texts = [world.wanted(prompt.messages).text for prompt in prompts]
        texts[0] = "It is so."  # a plain one that is wrong
        texts[2] = f"It is {world.CODES[0]}."  # an adversarial one that tells
        encoded = [encode_dialog(self.tokenizer, p.messages) for p in prompts]
        self.texts = dict(zip(map(tuple, encoded), texts, strict=True))

    def generate(self, prompts, **settings):
        answers = [self.texts.get(tuple(ids), "I am lost.") for ids in prompts]
        return [
            SimpleNamespace(
                text=f" {text}",
                tokens=[7, 8, 9],
                finish_reason="length" if "so" in text else "stop",
            )
            for text in answers
        ]


def test_what_is_measured_is_what_was_answered(monkeypatch):
    def logprobs(engine, rows):
        return [[engine] * (len(row) - 1) for row in rows]

    monkeypatch.setattr(report.score, "token_logprobs", logprobs)
    monkeypatch.setattr(report, "attention_map", lambda llm, ids, bin_size: np.eye(2))
    told = report.measure(Scripted(-1.0), Scripted(-3.0), 6, 2)
    assert told["plain"] == pytest.approx((0 + 1) / 2)
    assert told["instructed"] == 1
    assert told["adversarial"] == told["violations"] == 0.5
    assert told["reward"] == pytest.approx(4 / 6)
    assert told["reward_error"] == pytest.approx(np.sqrt(2 / 9 / 6))
    # Two nats for each token and EOS; the answer that was cut has none.
    assert told["kl"] == pytest.approx((5 * 8 + 6) / 6)
    assert told["kept"] == [0] * 20
    assert told["map"] == [[1, 0], [0, 1]]


def test_one_run_has_the_error_over_prompts():
    said = shown(report.stage_table(results(0.5)))
    assert said.count("0.550 ± 0.010") == len(report.STAGES)
    (last,) = [line for line in said.splitlines() if "PPO" in line]
    cells = [cell.strip() for cell in last.split("│")]
    assert cells[6:-1] == ["25.0%", "1.50", "100%", "50%", "75%", "75%", "75%"]


def test_several_runs_have_the_error_over_runs():
    runs = results(0.0, 0.5, 1.0)
    spread = np.std([0.5, 0.55, 0.6], ddof=1) / np.sqrt(3)
    assert report.reward_error(runs, "v1") == pytest.approx(spread)
    assert f"0.550 ± {spread:.3f}" in shown(report.stage_table(runs))
    lines = shown(report.turn_table(runs)).splitlines()
    (before,) = [line for line in lines if "before" in line]
    assert "50% ± 29%" in before  # 0.5 / sqrt(3)
    assert before.split("│")[-2].strip() == "0%"  # the least of any run


def write_validations(run):
    for model, share in (("helpfulness", 0.875), ("safety", 1.0)):
        rows = [{"step": 80, "accuracy": 0.1, "accuracy_by_rating": {"better": 0.1}}]
        rows.append({"step": 160, "accuracy": 0.5, "accuracy_by_rating": {}})
        rows[-1] |= {"accuracy_by_rating": {"better": share}, "accuracy_by_safety": {}}
        (run / model).mkdir(parents=True)
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (run / model / METRICS).write_text(text)


def test_the_last_validation_of_reward_models_counts(tmp_path):
    write_validations(tmp_path)
    lines = shown(report.rating_table([tmp_path])).splitlines()
    (helpful,) = [line for line in lines if "helpfulness" in line]
    cells = [cell.strip() for cell in helpful.split("│")[2:-1]]
    assert cells == ["", "87.5%", "", "", ""]


def test_the_papers_table_stands_beside():
    lines = shown(report.turn_table(results(0.5))).splitlines()
    papers = [line for line in lines if "the paper's" in line]
    assert "100%" in papers[0] and "10%" in papers[0] and "0%" in papers[0]
    assert papers[1].count("100%") == 4


def test_what_was_measured_is_not_measured_again(tmp_path, capsys):
    (tmp_path / "measured").mkdir()
    for stage in report.STAGES:
        file = tmp_path / f"measured/{stage}-300-48.json"
        file.write_text(json.dumps(result(0.625, 0.5)))
    write_validations(tmp_path)
    assert (
        report.main([str(tmp_path), "--output", str(tmp_path)]) == 0
    )  # there is no model to load
    assert capsys.readouterr().out.count("0.625 ± 0.010") == len(report.STAGES)
    assert (tmp_path / "table.txt").read_text().count("0.625 ± 0.010") == 8
    for picture in ("stages.png", "attention.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
