"""`llama-jax sample`: a model's own answers, from checkpoints to files of dialogs."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import jax
import pytest

from llama_jax.checkpoint.params import save_params
from llama_jax.cli import main
from llama_jax.cli.progress import counting_progress
from llama_jax.data import DialogLines, Prompt
from llama_jax.finetune import distill
from llama_jax.finetune.answers import sampled_answers
from llama_jax.finetune.distill import ANSWER_TEMPLATES
from llama_jax.finetune.rejection import Iteration
from llama_jax.generate import Generator
from tests.data import dialogs, prompts
from tests.endtoend.jobs import Job
from tests.finetune.judges import policy_params, reward
from tests.generate.models import LONG, tokenizer

CHAT = [
    {"role": "user", "content": "ba"},
    {"role": "assistant", "content": "ce"},
    {"role": "user", "content": "di"},
    {"role": "assistant", "content": "fo"},
]
VALUES = {
    "figure": ["ba", "ce"],
    "ending": {"wording": "End by {}.", "short": "End: {}.", "values": ["gu"]},
}
# Two prompts of six are about safety.
QUESTIONS = [
    {
        "messages": [{"role": "user", "content": f"{one} {other}"}],
        "about_safety": one == "ba",
    }
    for one in ("ba", "ce", "di")
    for other in ("fo", "gu")
]
JUDGE = ["--helpfulness", "helpfulness", "--safety", "safety"]
SAMPLES = ["--num-samples", "2", "--max-new-tokens", "24", "--cache-length", "256"]
ANSWERS = ["sample", "answers", "policy", "--prompts", "prompts.jsonl", *JUDGE]
ANSWERS += [*SAMPLES, "--temperature", "1", "--batch-size", "4"]
GHOST = ["sample", "ghost", "policy", "--dialogs", "dialogs.jsonl", *JUDGE, *SAMPLES]
GHOST += ["--values", "values.json", "--batch-size", "2", "--temperature", "1"]
DISTIL = ["sample", "distil", "policy", "--prompts", "prompts.jsonl"]
DISTIL += ["--safety", "safety", "--max-new-tokens", "40", "--cache-length", "256"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model, two reward models, and what they are asked."""
    path = tmp_path_factory.mktemp("sample")
    models = {"policy": policy_params()}
    models |= {
        name: reward(i).params for i, name in enumerate(("safety", "helpfulness"))
    }
    for name, params in models.items():
        # One layer is compiled in half of the time.
        params = params | {"blocks": jax.tree.map(lambda x: x[:1], params["blocks"])}
        config = dataclasses.replace(LONG, num_layers=1)
        save_params(path / name, params, config, tokenizer())
    prompts.write(path / "prompts.jsonl", QUESTIONS)
    dialogs.write(path / "dialogs.jsonl", [CHAT] * 3)
    (path / "values.json").write_text(json.dumps(VALUES))
    return path


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """The working directory, with all that in it."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys, argv) -> str:
    """The last line that a command prints."""
    capsys.readouterr()
    status = main(argv)
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return printed.out.splitlines()[-1]


def refused(capsys, argv) -> str:
    """The line that a command is refused with."""
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("llama-jax sample: ")
    assert error.count("\n") == 1
    return error


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def sampled(made, tmp_path_factory) -> Path:
    """An iteration, made by the command."""
    path = tmp_path_factory.mktemp("iterations") / "v1"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        assert main([*ANSWERS, "--output", str(path)]) == 0
    return path


class TestAnswersAndPool:
    @pytest.fixture
    def place(self, place, sampled):
        (place / "v1").symlink_to(sampled)
        return place

    def test_answers(self, sampled, place, capsys):
        iteration = Iteration.open(sampled)
        assert iteration.plan["num_samples"] == 2
        assert iteration.plan["sampler"] == "TopP(p=1.0, temperature=1.0)"
        asked = [rollout.prompt for rollout in iteration.rollouts()]
        assert asked == [Prompt(**question) for question in QUESTIONS]
        rewards = iteration.rewards()
        best = rewards.max(axis=1).mean()
        before = content(sampled)
        line = said(capsys, [*ANSWERS, "--output", "v1"])
        assert content(sampled) == before
        assert line == (
            f"v1: 6 prompts, 12 answers; reward {rewards.mean():.4f} on average, "
            f"{best:.4f} the best of each, {rewards.mean():.4f} the median"
        )
        error = refused(capsys, [*ANSWERS, "--output", "v1", "--seed", "1"])
        assert "v1 holds an iteration of rejection sampling that was begun" in error
        assert "otherwise: seed was 0" in error

    def test_pool(self, sampled, place, capsys):
        argv = ["sample", "pool", "v1", "--keep", "latest", "--output", "v1.jsonl"]
        assert said(capsys, [*argv, "--dry-run"]).startswith("v1.jsonl: the best")
        assert not (place / "v1.jsonl").exists()
        line = said(capsys, argv)
        rows = list(DialogLines("v1.jsonl"))
        assert {row.learn for row in rows} == {"last"}
        assert line == (
            f"v1.jsonl: {len(rows)} of 6 prompts have an answer: {len(rows)} from v1"
        )

    def test_pool_that_scores_again(self, sampled, place, capsys):
        (place / "v2").symlink_to(sampled)
        argv = ["sample", "pool", "v1", "v2", "--keep", "all", *JUDGE]
        argv += ["--output", "again.jsonl"]
        said(capsys, [*argv, "--dry-run"])
        assert said(capsys, argv).endswith(" from v1")
        alone = ["sample", "pool", "v1", "--keep", "all", "--output", "one.jsonl"]
        said(capsys, alone)
        assert (place / "again.jsonl").read_text() == (place / "one.jsonl").read_text()

    def test_one_reward_model_alone(self, sampled, place, capsys):
        argv = ["sample", "pool", "v1", "--keep", "all", "--output", "x.jsonl"]
        for dry in ([], ["--dry-run"]):
            error = refused(capsys, [*argv, "--safety", "safety", *dry])
            assert "give --helpfulness and --safety, or neither" in error
        error = refused(capsys, [*argv, "--safety", "safety", "--helpfulness", "v1"])
        assert "v1 is no checkpoint of a kind that is known" in error


def test_ghost(place, capsys):
    argv = [*GHOST, "--output", "ghost"]
    line = said(capsys, [*argv, "--dry-run"])
    assert line.startswith("ghost: 3 dialogs, the first under '")
    assert not (place / "ghost").exists()
    line = said(capsys, argv)
    files = sorted((place / "ghost").glob("rows-*-of-00002.jsonl"))
    rows = [row for file in files for row in DialogLines(file)]
    assert line == f"ghost: {len(rows)} rows of 3 dialogs"
    assert len(files) == 2
    for row in rows:
        assert row.learn == "last"
        assert row.messages[0]["role"] == "system"
        assert row.messages[1:-1] == CHAT[:-1]
        assert row.messages[-1] != CHAT[-1]
    before = content(place / "ghost")
    assert said(capsys, argv) == line
    assert content(place / "ghost") == before
    error = refused(capsys, [*argv, "--resample", "all"])
    assert "ghost holds a set of rows that was begun otherwise: resample was" in error


def test_ghost_without_rows_in_a_part_becomes_rows_of_tokens(place, capsys):
    (place / "ghost").mkdir()
    dialogs.write(place / "ghost/rows-00000-of-00003.jsonl", [CHAT] * 3)
    for number in (1, 2):
        (place / f"ghost/rows-0000{number}-of-00003.jsonl").write_text("")
    files = [f"ghost/rows-0000{number}-of-00003.jsonl" for number in range(3)]
    argv = ["data", "dialogs", "--tokenizer", "policy/tokenizer.model"]
    argv += ["--row-length", "64"]
    line = said(capsys, [*argv, "--train", *files, "--output", "rows"])
    assert line.startswith("rows, train: 3 dialogs")
    assert main([*argv, "--train", *files[1:], "--output", "none"]) == 1
    assert "00001-of-00003.jsonl holds no dialogs" in capsys.readouterr().err


def test_distil(place, capsys):
    argv = [*DISTIL, "--output", "distilled", "--seed", "2"]
    line = said(capsys, [*argv, "--dry-run"])
    assert line.startswith("distilled: answers to 2 prompts about safety, not to 4")
    assert not (place / "distilled").exists()
    line = said(capsys, argv)
    (file,) = (place / "distilled").glob("rows-*.jsonl")
    rows = list(DialogLines(file))
    assert line == (
        f"distilled: {len(rows)} of 2 prompts about safety have a safer answer under a "
        "pre-prompt; 4 others are left out"
    )
    asked = [question["messages"] for question in QUESTIONS[:2]]
    assert all(row.messages[:-1] in asked for row in rows)
    assert said(capsys, argv) == line


def test_a_prompt_of_a_known_risk_gets_its_template(place, monkeypatch):
    def ask(llm, dialogs, **settings):
        asked.extend(dialogs)
        return sampled_answers(llm, dialogs, **settings)

    asked = []
    monkeypatch.setattr(distill, "sampled_answers", ask)
    short = dict(zip(ANSWER_TEMPLATES, ("fo", "gu", "ba"), strict=True))
    monkeypatch.setattr(distill, "ANSWER_TEMPLATES", short)
    first, second, *_ = (question.copy() for question in QUESTIONS)
    prompts.write(
        place / "risks.jsonl", [first, second | {"risk": "unqualified advice"}]
    )
    # Whether an answer is safer, and the command a success, does not matter here.
    main([*DISTIL, "--prompts", "risks.jsonl", "--output", "distilled"])
    *_, drawn, template = asked  # after both without any
    assert drawn[0]["content"].startswith("You are a ")
    told = short["unqualified advice"]
    assert template == [{"role": "system", "content": told}, *second["messages"]]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([*ANSWERS, "--safety", "policy"], "policy is a model that writes, and no rew"),
        ([*GHOST, "--helpfulness", "policy"], "policy is a model that writes, and no"),
        ([*DISTIL, "--safety", "policy"], "policy is a model that writes, and no rew"),
        ([*ANSWERS, "--safety", "nowhere"], "nowhere does not exist"),
        (["sample", "answers", "safety", *ANSWERS[3:]], "safety is a reward model, wh"),
        (["sample", "answers", "nowhere", *ANSWERS[3:]], "nowhere does not exist"),
        ([*ANSWERS, "--prompts", "none.jsonl"], "none.jsonl is no file"),
        ([*ANSWERS, "--prompts", "values.json"], "values.json is no .jsonl file"),
        ([*ANSWERS, "--prompts", "dialogs.jsonl"], "dialogs.jsonl, line 1: "),
        ([*ANSWERS, "--prompts", "empty.jsonl"], "there are no prompts in empty.jsonl"),
        ([*ANSWERS, "--num-samples", "0"], "num_samples is 0"),
        ([*ANSWERS, "--batch-size", "0"], "batch_size is 0"),
        ([*ANSWERS, "--max-new-tokens", "0"], "max_new_tokens is 0"),
        ([*ANSWERS, "--temperature", "-1"], "temperature is -1"),
        ([*ANSWERS, "--cache-length", "9999"], "cache_length is 9999"),
        ([*ANSWERS, "--threshold", "1"], "threshold is 1.0"),
        ([*GHOST, "--dialogs", "prompts.jsonl"], "prompts.jsonl, line 1: "),
        ([*GHOST, "--dialogs", "empty.jsonl"], "there are no dialogs in empty.jsonl"),
        ([*GHOST, "--values", "prompts.jsonl"], "prompts.jsonl is no JSON"),
        ([*GHOST, "--values", "unknown.json"], "'mood' is ['glad']: write a list of"),
        ([*GHOST, "--values", "none.json"], "'hobby' has no values"),
        ([*DISTIL, "--prompts", "harmless.jsonl"], "none of 1 prompts is about safety"),
        (["sample", "pool", "--keep", "all"], "there are no iterations to choose from"),
        (["sample", "pool", "policy", "--keep", "all"], "policy is no iteration"),
    ],
    ids=lambda value: " ".join([value[1], *value[-2:]]) if type(value) is list else "",
)
def test_a_dry_run_refuses_what_a_run_would(argv, reason, place, capsys):
    (place / "unknown.json").write_text('{"mood": ["glad"]}')
    (place / "none.json").write_text('{"hobby": []}')
    (place / "empty.jsonl").write_text("")
    prompts.write(place / "harmless.jsonl", QUESTIONS[2:3])
    assert reason in refused(capsys, [*argv, "--output", "new.jsonl", "--dry-run"])


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([*ANSWERS, "--safety", "policy"], "policy is a model that writes, and no rew"),
        ([*ANSWERS, "--tensor", "3"], "tensor"),
        ([*GHOST, "--values", "prompts.jsonl"], "prompts.jsonl is no JSON"),
        ([*DISTIL, "--prompts", "harmless.jsonl"], "none of 1 prompts is about safety"),
        (["sample", "pool", "--keep", "all"], "there are no iterations to choose from"),
    ],
    ids=lambda value: " ".join([value[1], *value[-2:]]) if type(value) is list else "",
)
def test_a_run_is_refused_before_anything_is_written(argv, reason, place, capsys):
    prompts.write(place / "harmless.jsonl", QUESTIONS[2:3])
    assert reason in refused(capsys, [*argv, "--output", "new"])
    assert not (place / "new").exists()


def test_what_does_not_fit_is_told_what_makes_it_smaller(place, monkeypatch, capsys):
    def exhausted(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 17 GiB of 16 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "generate", exhausted)
        said = refused(capsys, [*ANSWERS, "--output", "smaller"])
    assert "17 GiB of 16 GiB" in said and "a smaller --batch-size (now " in said
    assert main([*ANSWERS, "--output", "smaller", "--batch-size", "2"]) == 0


def test_all_devices_take_part(place, monkeypatch):
    """Some share the weights, and the others have copies of their own."""
    asked = {}

    class StopError(Exception):
        pass

    def load(path, **options):
        asked.update(options, path=path)
        raise StopError

    monkeypatch.setattr("llama_jax.load", load)
    argv = [*ANSWERS, "--output", "new", "--tensor", "2", "--dtype", "bfloat16"]
    with pytest.raises(StopError):
        main(argv)
    shape = asked.pop("mesh").shape
    assert (shape["data"], shape["fsdp"], shape["tensor"]) == (4, 1, 2)
    assert asked == {"path": "policy", "dtype": "bfloat16", "cache_length": 256}


def test_progress_is_a_line_every_ten_seconds_and_the_last(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with counting_progress("prompts") as watch:
        for seconds, done in ((4, 1), (12, 2), (15, 3), (16, 4)):
            now[0] = 100.0 + seconds
            watch(done, 4)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["prompts 2/4 after 12 s", "prompts 4/4 after 16 s"]


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with counting_progress("prompts") as watch:
        watch(1, 2)
        watch(2, 2)
    shown = capsys.readouterr().out
    assert "prompts" in shown and "2/2" in shown


SAMPLE = "import sys, llama_jax.cli as c; raise SystemExit(c.main(sys.argv[2:]))"


@pytest.mark.slow
@pytest.mark.parametrize("command", [ANSWERS, GHOST, DISTIL], ids=lambda argv: argv[1])
def test_two_hosts_sample_as_one(command, place, tmp_path):
    """The same eight devices, in one process and in two; a first one was killed."""
    argv = [*command, "--batch-size", "1", "--seed", "2"]
    assert main([*argv, "--output", "one"]) == 0
    (place / "two").mkdir()
    manifest = next((place / "one").glob("*.json")).name
    first = next((place / "one").glob("*-00000-of-*")).name
    for name in (manifest, first):
        shutil.copy(place / "one" / name, place / "two" / name)
    both = [[*argv, "--output", "two"]] * 2
    with Job(tmp_path / "job", *both, programs=dict.fromkeys((0, 1), SAMPLE)) as job:
        assert job.ends() == [0, 0], job.everything()
    assert content(place / "two") == content(place / "one")


@pytest.mark.slow
def test_what_one_host_lacks_stops_all(place, tmp_path):
    both = [[*DISTIL, "--output", "new"], [*DISTIL, "--output", "new"]]
    both[1][both[1].index("prompts.jsonl")] = "nowhere.jsonl"
    with Job(tmp_path / "job", *both, programs=dict.fromkeys((0, 1), SAMPLE)) as job:
        assert all(job.ends()), job.everything()
        assert "nowhere.jsonl is no file" in job.said(1)
    assert not (place / "new").exists()
