"""`llama-jax generate`: its options reach the library, and what it prints."""

import dataclasses
import json

import pytest

import llama_jax
from llama_jax.cli import main
from llama_jax.config.sampling import MinP, Penalties, TopK, TopP
from tests.generate import models


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A small model, in a directory whose name needs quoting."""
    path = tmp_path_factory.mktemp("a place with späces") / "model"
    models.llm().save(path)
    return str(path)


@pytest.mark.parametrize(
    ("options", "sampler"),
    [
        ([], TopP(0.9, temperature=0.6)),
        (["--top-p", "1", "--temperature", "2"], TopP(1.0, temperature=2.0)),
        (["--top-k", "7"], TopK(7, temperature=0.6)),
        (["--min-p", "0.1"], MinP(0.1, temperature=0.6)),
        (["--temperature", "0"], TopP(0.9, temperature=0.0)),
    ],
    ids=str,
)
def test_samplers(checkpoint, options, sampler, capsys):
    assert main(["generate", checkpoint, *options, "--dry-run"]) == 0
    summary = capsys.readouterr().out
    assert "parameters, float32; 1 prompts" in summary
    assert summary.endswith(f"{sampler}\n")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--top-k", "7", "--top-p", "0.5"], "give one of them"),
        (["--top-p", "0.5", "--min-p", "0.5"], "give one of them"),
        (["--top-k", "0"], "top-k's k is 0"),
        (["--min-p", "2"], "min-p's p is 2"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--repetition-penalty", "0"], "repetition penalty is 0"),
        (["--frequency-penalty", "nan"], "frequency penalty is nan"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--stop", ""], "none of them empty"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_setting_is_refused_before_anything_is_loaded(
    command, options, reason, capsys
):
    assert main([command, "nowhere", *options]) == 1
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--cache-length", "1"], "cache_length is 1"),
        (["--cache-length", "4", "--prompt", "ba ce di fo"], "the context is 4"),
        (["--num-samples", "0"], "num_samples is 0"),
        (["--dtype", "int4"], "dtype 'int4'"),
        (["--tokenizer", "nowhere.model"], "nowhere.model"),
        (["--tensor", "3"], "tensor"),
    ],
    ids=" ".join,
)
def test_errors_are_one_line(checkpoint, options, reason, capsys):
    assert main(["generate", checkpoint, *options]) == 1
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_weights_and_cache_are_int8_or_as_they_are(checkpoint, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", checkpoint, "--weights", "int4"])
    assert stopped.value.code == 2
    assert "int8" in capsys.readouterr().err


def test_the_options_of_loading(monkeypatch):
    asked = {}

    def load(path, **options):
        asked.update(options, path=path)
        return models.llm()

    monkeypatch.setattr(llama_jax, "load", load)
    argv = ["generate", "a model", "--dtype", "bfloat16", "--tensor", "2"]
    argv += ["--weights", "int8", "--cache", "int8", "--cache-length", "24"]
    argv += ["--max-length", "64", "--tokenizer", "a tokenizer"]
    assert main([*argv, "--max-new-tokens", "2"]) == 0
    assert asked.pop("mesh").shape["tensor"] == 2
    assert asked == {
        "path": "a model",
        "dtype": "bfloat16",
        "weights": "int8",
        "cache": "int8",
        "cache_length": 24,
        "max_length": 64,
        "tokenizer": "a tokenizer",
    }


def test_the_options_of_writing(checkpoint, capsys):
    argv = ["generate", checkpoint, "--prompt", "ba ce", "fo", "--json"]
    argv += ["--max-new-tokens", "9", "--temperature", "1.5", "--top-k", "20"]
    argv += ["--seed", "5", "--num-samples", "2", "--stop", "a", "e"]
    argv += ["--repetition-penalty", "1.5", "--presence-penalty", "0.25"]
    argv += ["--frequency-penalty", "0.5"]
    assert main(argv) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = models.llm().generate(
        ["ba ce", "fo"],
        max_new_tokens=9,
        sampler=TopK(20, temperature=1.5),
        seed=5,
        num_samples=2,
        penalties=Penalties(repetition=1.5, presence=0.25, frequency=0.5),
        stop=["a", "e"],
    )
    assert [fields.pop("prompt") for fields in found] == ["ba ce", "ba ce", "fo", "fo"]
    for fields, completion in zip(found, expected, strict=True):
        wanted = dataclasses.asdict(completion)
        assert fields.pop("timing").keys() == wanted.pop("timing").keys()
        assert fields == wanted


def test_one_answer_is_streamed_and_several_follow_one_another(checkpoint, capsys):
    argv = ["generate", checkpoint, "--max-new-tokens", "8", "--prompt", "ba ce"]
    assert main(argv) == 0
    streamed = capsys.readouterr().out
    assert main([*argv, "fo"]) == 0
    assert capsys.readouterr().out.startswith(f"{streamed}\nfo")
    assert main([*argv, "--num-samples", "2"]) == 0
    several = capsys.readouterr().out
    assert several.startswith(f"{streamed}\nba ce")
    assert several != f"{streamed}\n{streamed}\n"
