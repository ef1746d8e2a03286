"""`llama-jax convert` and what it prints."""

import os

import pytest

from llama_jax.cli import main
from tests.conversion.checkpoints import MAX_LENGTH
from tests.reference import meta_checkpoint


@pytest.fixture
def source(tmp_path):
    tensors = meta_checkpoint.random_tensors()
    meta_checkpoint.write_checkpoint(tmp_path / "a model", [tensors])
    return str(tmp_path / "a model")


def test_a_conversion_says_what_it_did(source, tmp_path, capsys):
    target = str(tmp_path / "späce")
    assert main(["convert", source, target, "--to", "hf", "--dtype", "bfloat16"]) == 0
    first, read_back, digest = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{target}: meta to hf, bfloat16, 0.00 GB in ")
    assert "every weight is as it was read, logits of both ends agree to" in read_back
    assert len(digest.removeprefix("weights' sha256 ")) == 64
    again = str(tmp_path / "again")
    assert main(["convert", target, again, "--to", "meta", "--no-verify"]) == 0
    assert "not read back (--no-verify)" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(source, tmp_path, capsys):
    target = str(tmp_path / "x")
    options = ["--to", "meta", "--model-parallel", "4"]
    assert main(["convert", source, target, *options, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "meta, 26,272 parameters, float32; to" in said
    assert os.listdir(tmp_path) == ["a model"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--to", "meta", "--model-parallel", "3"], "3 shards, which do not divide"),
        (["--to", "hf", "--model-parallel", "2"], "is of Meta's format"),
        (["--to", "hf", "--dtype", "int8"], "give one of float32"),
        (["--to", "hf", "--tokenizer", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line(source, tmp_path, options, reason, capsys):
    argv = ["convert", source, str(tmp_path / "x"), *options]
    assert main([*argv, "--max-length", str(MAX_LENGTH)]) == 1
    error = capsys.readouterr().err
    assert reason in error
    assert "Traceback" not in error
    assert os.listdir(tmp_path) == ["a model"]


def test_a_misspelt_format_is_refused(source, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["convert", source, str(tmp_path / "x"), "--to", "gguf"])
    assert stopped.value.code == 2
    assert "orbax" in capsys.readouterr().err
