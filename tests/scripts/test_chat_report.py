"""The table of a chat model's stages: what is counted, over prompts and over runs."""

import json

import numpy as np
import pytest
from rich.console import Console

from llama_jax.train.metrics import METRICS
from scripts import chat_report as report


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
    assert "50% ± 50%" in before
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
        file = tmp_path / f"measured/{stage}.json"
        file.write_text(json.dumps(result(0.625, 0.5)))
    write_validations(tmp_path)
    assert report.main([str(tmp_path)]) == 0  # there is no model to load
    assert capsys.readouterr().out.count("0.625 ± 0.010") == len(report.STAGES)
    for picture in ("stages.png", "attention.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
