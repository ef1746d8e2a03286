"""What learns without a KL term differs in that alone, and its passes are shown."""

import dataclasses
import json

import pytest

from scripts import reward_hacking


def test_variants(tmp_path):
    held, free, stopped = (
        reward_hacking.recipe(tmp_path, **options)
        for options in reward_hacking.VARIANTS.values()
    )
    assert held.ppo.beta > 0 == free.ppo.beta
    assert dataclasses.replace(held, ppo=free.ppo) == free
    assert dataclasses.replace(held.ppo, beta=0.0) == free.ppo
    assert dataclasses.replace(stopped.ppo, patience=None, max_kl=None) == free.ppo
    passes = held.train.num_steps // held.train.validate_every
    assert passes == 15 and held.train.keep_latest >= passes
    assert held.train.validate_every % held.iteration_steps == 0


def test_each_pass_is_a_row(tmp_path, monkeypatch):
    passes = [(15, 0.4, 0.25, 0.0), (30, 0.9, 100.0, 0.75)]
    records = [
        {
            "step": step,
            "validation_reward": r,
            "validation_kl": kl,
            "validation_cut": cut,
        }
        for step, r, kl, cut in passes
    ]
    lines = [
        json.dumps(record) + "\n" for record in [*records, {"step": 30, "loss": 1.0}]
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    asked = []

    def worth(llm, v5, rng, num_prompts):
        asked.append((llm, v5, rng.random(), num_prompts))
        told = {"reward": 0.5, "reward_error": 0.0125, "violations": 0.25}
        return told | {"reward": 0.5 / len(asked)}

    monkeypatch.setattr(reward_hacking.llama_jax, "load", lambda path: path)
    monkeypatch.setattr(reward_hacking, "answers_worth", worth)
    table = reward_hacking.passes_table(tmp_path, "v5", 7)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("0", "", "0.500 ± 0.013", "25.0%", "", ""),
        ("15", "0.400", "0.250 ± 0.013", "25.0%", "0.25", "0%"),
        ("30", "0.900", "0.167 ± 0.013", "25.0%", "100.00", "75%"),
    ]
    steps = [tmp_path / "checkpoints" / str(step) for step in (15, 30)]
    assert [llm for llm, *_ in asked] == ["v5", *steps]
    # The same prompts each time.
    assert len({luck for *_, luck, _ in asked}) == 1
    assert {(v5, num) for _, v5, _, num in asked} == {("v5", 7)}


def test_what_is_not_at_its_end_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reward_hacking, "ppo", lambda *args, **options: False)
    assert reward_hacking.main([str(tmp_path), "--output", str(tmp_path)]) == 1
    assert "is not at its end: start this again" in capsys.readouterr().out


def test_a_run_is_needed(capsys):
    with pytest.raises(SystemExit):
        reward_hacking.main([])
    assert "--output" in capsys.readouterr().err
