"""`llama-jax plan` without a compiler: dry runs, exit statuses, errors for people."""

import json

import pytest

from llama_jax.cli import main
from tests.planning.conftest import without_compiler
from tests.planning.recipes import V5P_64, V5P_128

# Used by every test here.
pytestmark = pytest.mark.usefixtures(without_compiler.__name__)


def test_a_recipe_that_fits(capsys):
    assert main(["plan", V5P_64]) == 0
    said = capsys.readouterr().out
    assert "closed-form estimate" in said
    assert "It fits: " in said
    assert "Predicted for 2e+12 tokens" in said


def test_days_of_a_recipe_that_counts_epochs(capsys):
    """The data would say how many steps they are; or the command line does."""
    tuning = V5P_64.replace("pretrain", "chat").rpartition(":")[0] + ":sft"
    assert main(["plan", tuning]) == 0
    said = capsys.readouterr().out
    assert "s a step" in said and "Predicted for" not in said
    assert main(["plan", tuning, "--train.num-steps", "1000"]) == 0
    assert "tokens in 1,000 steps" in capsys.readouterr().out


def test_a_recipe_that_does_not_fit(capsys):
    argv = ["plan", V5P_64, "--train.remat", "none", "--train.batch-size", "1024"]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert "It does not fit: " in error
    assert "too many" in error
    assert "--train.remat" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--mesh.fsdp", "60"], "takes 60 devices, but there are 64"),
        (["--mesh.tensor", "3"], "make the factors multiply to 64"),
        (["--topology", "v5p:4x4x8"], "takes 64 devices, but there are 128"),
        (["--topology", "v5p:4x4x5"], "is no slice"),
        (["--topology", "v5p-127"], "counts TensorCores"),
        (["--topology", "h100:8"], "is no topology"),
        (["--topology", "v9:2x2"], "v9"),
        (["--slices", "0"], "dcn_data is 0"),
        (["--overhead", "0.5"], "PUE"),
        (["--watts-per-chip", "0"], "watts_per_chip is 0"),
        (["--dump-hlo", "never.txt"], "no program to dump"),
        (["--search", "--dump-hlo", "never.txt"], "leave out --search"),
        (["--search", "--decode"], "give one of them"),
        (["--search", "--compiled", "0"], "compiles 0 layouts"),
        (["--search", "--processes", "0"], "in 0 processes"),
        (["--decode", "--length", "9999"], "context is 4096"),
        (["--decode", "--length", "0"], "a cache of 0 slots"),
        (["--decode", "--batch", "0"], "a batch of 0 rows"),
        (["--decode", "--slices", "0"], "slices is 0"),
    ],
    ids=" ".join,
)
def test_errors_are_one_line(options, reason, capsys):
    assert main(["plan", V5P_64, *options]) == 1
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_usage(capsys):
    assert main(["plan"]) == 2
    assert "usage: llama-jax plan RECIPE" in capsys.readouterr().err
    assert main(["plan", "--help"]) == 0
    with pytest.raises(SystemExit) as stopped:
        main(["plan", V5P_64, "--topolgy", "v5p:4x4x4"])
    assert stopped.value.code == 2
    assert "--topology" in capsys.readouterr().err


def test_the_clouds_name_and_overrides_reach_the_plan(capsys):
    argv = ["plan", V5P_128, "--topology", "v5p-256", "--train.remat", "full", "--json"]
    assert main([*argv, "--watts-per-chip", "100"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["topology"], figures["chips"]) == ("v5p:4x4x8", 128)
    assert figures["remat"] == "full"
    assert figures["power"]["watts_per_chip"] == 100
    assert figures["source"] == "closed-form estimate"


def test_a_grid_without_carbon(capsys):
    assert main(["plan", V5P_64, "--kg-co2-per-kwh", "0"]) == 0
    assert " 0.0 t CO2eq" in capsys.readouterr().out


def test_dry_run_prints_the_resolved_recipe(capsys):
    assert main(["plan", V5P_64, "--slices", "2", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert '"dcn_data": 2' in said
    assert "2 slices of v5p:4x4x4" in said


def test_search_and_decode(capsys):
    assert main(["plan", V5P_128, "--search", "--compiled", "3"]) == 0
    assert "Best: mesh" in capsys.readouterr().out
    decode = ["plan", V5P_128, "--decode", "--topology"]
    assert main([*decode, "v5p-8", "--json"]) == 0
    bound = json.loads(capsys.readouterr().out)["predicted"]["bound_seconds"]
    assert bound == pytest.approx(13.2e-3, rel=0.02)
    assert main([*decode, "v5e:2x2"]) == 1
    assert "It does not fit" in capsys.readouterr().err
