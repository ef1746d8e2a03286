"""The command line: answers, dry runs, and errors for people."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax import __version__
from llama_jax.cli import COMMANDS, main
from llama_jax.data.prepared import Prepared
from tests import runs
from tests.data import comparisons, corpus, dialogs

ROOT = Path(__file__).parents[2]
RECIPE = f"{ROOT}/configs/demo.py:small"


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Path:
    """Two JSONL files, in a directory whose name needs quoting."""
    directory = tmp_path_factory.mktemp("a place with späces")
    for name, seed, num in (("train", 0, 60), ("held out", 1, 8)):
        lines = [json.dumps({"text": text}) for text in corpus.texts(num, seed=seed)]
        (directory / f"{name}.jsonl").write_text("\n".join(lines))
    return directory


@pytest.fixture(scope="module")
def trained(documents) -> Path:
    """Tokenizer, rows and a short run, each made by its command."""
    text = ["--train", f"{documents}/train.jsonl"]
    text += ["--validation", f"{documents}/held out.jsonl"]
    tokenizer, data = f"{documents}/tokenizer.model", f"{documents}/rows"
    made = main(
        ["data", "tokenizer", *text, "--output", tokenizer, "--vocab-size", "400"]
    )
    assert made == 0
    prepare = ["data", "prepare", *text, "--tokenizer", tokenizer, "--output", data]
    assert main([*prepare, "--row-length", "16"]) == 0
    fields = ["--data.paths", data, "--data.sequence-length", "16"]
    fields += ["--model.vocab-size", "400", "--model.dim", "48"]
    fields += ["--train.num-steps", "3", "--train.batch-size", "8"]
    workdir = f"{documents}/run"
    assert main(["train", RECIPE, "--workdir", workdir, *fields]) == 0
    return documents / "run"


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__
    assert main([]) == 0
    usage = capsys.readouterr().out
    assert all(f"\n  {name} " in usage for name in COMMANDS)


def test_a_misspelt_command_gets_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


def test_a_misspelt_option_gets_the_nearest(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", RECIPE, "--optimizer.peek-lr", "1e-4"])
    assert stopped.value.code == 2
    assert "--optimizer.peak-lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["train", "configs/none.py:x"], "does not exist"),
        (["train", f"{RECIPE}r", "--dry-run"], "Did you mean 'small'?"),
        (["train", RECIPE, "--profile", "3-4"], "--profile 3-4"),
        (["train", RECIPE, "--profile", "5:2"], "--profile 5:2"),
        (["data", "tokenizer", "--tfds", "shakespeare/x", "--output", "x"], "no data"),
        (["train", RECIPE, "--dry-run", "--mesh.tensor", "3"], "tensor=3"),
        (["generate", "nowhere"], "nowhere does not exist"),
        (["generate", "nowhere", "--top-p", "0"], "top-p"),
        (["inspect", str(ROOT / "docs")], "no checkpoint of a kind that is known"),
        (["data", "tokenizer", "--output", "x"], "no text"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_one_line(argv, reason, capsys):
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "argv",
    [["generate", "gs://bucket/7b"], ["train", RECIPE, "--workdir", "gs://bucket/7b"]],
    ids=lambda argv: argv[0],
)
def test_a_bucket_without_its_package(argv, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert "pip install 'llama-jax[gcs]'" in error
    assert error.count("\n") == 1


def test_an_invalid_value_of_a_field_is_said(capsys):
    with pytest.raises(SystemExit):
        main(["train", RECIPE, "--train.num-steps", "many"])
    assert "num-steps" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", RECIPE, "--optimizer.beta1", "1.5"])
    assert "beta1 is 1.5" in capsys.readouterr().err


def test_dry_run_prints_the_resolved_recipe(capsys):
    argv = ["train", f"{ROOT}/configs/pretrain/llama2_7b.py:v5p_128", "--dry-run"]
    assert main([*argv, "--optimizer.peak-lr", "1e-4"]) == 0
    text, summary = capsys.readouterr().out.rsplit("}\n", 1)
    assert json.loads(text + "}")["optimizer"]["peak_lr"] == 1e-4
    assert "6,738,415,616 parameters; 1,048,576 tokens a step" in summary


def test_the_commands_of_a_run(trained, capsys):
    capsys.readouterr()
    assert main(["inspect", str(trained)]) == 0
    assert "400" in capsys.readouterr().out
    assert main(["inspect", str(trained.parent / "rows")]) == 0
    facts = capsys.readouterr().out
    rows = Prepared.load(trained.parent / "rows").splits["train"].num_rows
    assert f"{rows:,} rows" in facts
    greedy = ["generate", str(trained), "--temperature", "0", "--max-new-tokens", "5"]
    assert main([*greedy, "--prompt", "ba ce"]) == 0
    streamed = capsys.readouterr().out
    assert streamed.startswith("ba ce")
    assert main([*greedy, "--json", "--prompt", "ba ce", "fo"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert streamed == f"ba ce{first['text']}\n"
    assert second["prompt"] == "fo"
    assert len(second["tokens"]) == len(second["logprobs"]) <= 5
    assert main([*greedy, "--dry-run"]) == 0
    assert "parameters, float32" in capsys.readouterr().out


TUNING = f"""
import dataclasses
from llama_jax.config.recipe import load_recipe
from tests import runs

MODEL = dataclasses.replace(load_recipe({RECIPE!r}).model, vocab_size=400, dim=48)

def small():
    return dataclasses.replace(runs.sft_recipe("rows", 64), model=MODEL)

def reward():
    return dataclasses.replace(runs.reward_recipe("rows", 128), model=MODEL)
"""


def test_the_commands_of_fine_tuning(trained, tmp_path, capsys):
    files = [
        dialogs.write(tmp_path / f"{name}.jsonl", dialogs.dialogs(num, seed=num))
        for name, num in (("train", 40), ("validation", 9))
    ]
    argv = ["data", "dialogs", "--train", str(files[0]), "--validation", str(files[1])]
    argv += ["--tokenizer", str(trained.parent / "tokenizer.model")]
    argv += ["--output", str(tmp_path / "rows"), "--row-length", "64"]
    assert main([*argv, "--dry-run"]) == 0
    assert not (tmp_path / "rows").exists()
    assert main(argv) == 0
    assert "rows, train: 40 dialogs" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "rows")]) == 0
    assert "9 dialogs" in capsys.readouterr().out

    (tmp_path / "tuning.py").write_text(TUNING)
    argv = ["train", f"{tmp_path}/tuning.py:small", "--workdir", str(tmp_path / "run")]
    argv += ["--data.paths", str(tmp_path / "rows"), "--init-from", str(trained)]
    assert main([*argv, "--dry-run"]) == 0
    assert "512 tokens a step, 3 epochs" in capsys.readouterr().out
    assert main([*argv, "--epochs", "1"]) == 0
    assert "Talk to it: llama-jax chat" in capsys.readouterr().out


def test_the_commands_of_reward_models(trained, tmp_path, capsys):
    files = [
        comparisons.write(
            tmp_path / f"{name}.jsonl", comparisons.comparisons(num, seed=num)
        )
        for name, num in (("train", 40), ("validation", 9))
    ]
    argv = ["data", "comparisons", "--train", str(files[0])]
    argv += ["--validation", str(files[1]), "--output", str(tmp_path / "rows")]
    argv += ["--tokenizer", str(trained.parent / "tokenizer.model")]
    argv += ["--row-length", "128"]
    assert main([*argv, "--dry-run"]) == 0
    assert not (tmp_path / "rows").exists()
    assert main(argv) == 0
    assert "of 3 more the unsafe answer was chosen" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "rows")]) == 0
    assert "8 comparisons" in capsys.readouterr().out

    (tmp_path / "tuning.py").write_text(TUNING)
    run = str(tmp_path / "run")
    argv = ["train", f"{tmp_path}/tuning.py:reward", "--workdir", run]
    argv += ["--data.paths", str(tmp_path / "rows"), "--init-from", str(trained)]
    assert main([*argv, "--dry-run"]) == 0
    assert "1,024 tokens a step, 3 epochs" in capsys.readouterr().out
    assert main([*argv, "--epochs", "1"]) == 0
    assert "of pairs in order" in (said := capsys.readouterr().out)
    assert f"load_reward({run!r})" in said
    assert main(["inspect", run, "--verify"]) == 0
    assert "all weights can be read" in " ".join(capsys.readouterr().out.split())
    assert main(["generate", run, "--prompt", "ba"]) == 1
    assert "is a reward model, which scores answers" in capsys.readouterr().err


def test_data_dry_runs_write_nothing(documents, tmp_path, capsys):
    output = tmp_path / "new"
    argv = ["data", "tokenizer", "--train", f"{documents}/train.jsonl"]
    assert main([*argv, "--output", str(output), "--dry-run"]) == 0
    assert not output.exists()
    assert "{'train': 1}" in capsys.readouterr().out


def test_installed_as_llama_jax():
    program = Path(sys.executable).parent / "llama-jax"
    ran = subprocess.run(
        [program, "--version"], capture_output=True, text=True, env=os.environ
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, __version__)


def test_progress_is_plain_lines_away_from_a_terminal(trained, capsys):
    from llama_jax.cli.progress import training_progress

    with training_progress(runs.NUM_STEPS) as watch:
        watch({"step": 4, "validation_loss": 2.0})
        watch({"step": 4, "validation_loss": 0.5, "accuracy": 0.75})
        watch(
            {
                "step": 5,
                "loss": 1.25,
                "grad_norm": 0.5,
                "learning_rate": 1e-3,
                "tokens_per_second": 1234.0,
                "mfu": 0.5,
            }
        )
    lines = capsys.readouterr().out.splitlines()
    assert "step 4: validation loss 2.0000 nats per token" in lines
    pairs = "step 4: validation loss 0.5000 nats per pair, 75.0% of pairs in order"
    assert pairs in lines
    assert any(
        "step 5/8  loss 1.2500" in line and "1,234 tokens/s  MFU 50.0%" in line
        for line in lines
    )
