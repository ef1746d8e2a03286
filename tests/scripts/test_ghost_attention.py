"""The measurement of Ghost Attention, from nothing to its table, in few steps."""

import json

import pytest

from scripts import ghost_attention


@pytest.mark.slow
def test_it_goes_through_and_does_not_measure_twice(tmp_path, capfd):
    argv = ["--run", str(tmp_path), "--steps", "2", "--last", "40", "--all", "20"]
    argv += ["--tests", "4"]
    assert ghost_attention.main(argv) == 0
    said = capfd.readouterr().out
    assert "Ghost Attention" in said and "turn 20" in said
    for name in ghost_attention.MODELS:
        result = json.loads((tmp_path / f"{name}.json").read_text())
        assert len(result["kept"]) == 20
        assert 0 <= min(result["kept"]) <= max(result["kept"]) <= 1
    for picture in ("kept.png", "attention.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")

    told = {"kept": [0.25] * 20, "plain": 1.0, "map": [[1.0]]}
    (tmp_path / "ghost.json").write_text(json.dumps(told))
    assert ghost_attention.main(argv) == 0
    assert "25%" in capfd.readouterr().out


def test_of_an_untrained_table_the_least_counts(capsys):
    kept = [1.0, 0.5, 0.9, *[0.75] * 17]
    results = {name: {"kept": kept, "plain": 0.5} for name in ghost_attention.MODELS}
    ghost_attention.show(results)
    said = capsys.readouterr().out
    assert said.count("50%") == 4  # at turn 2, and the least, of both
    assert said.count("100%") == 5  # the paper's
