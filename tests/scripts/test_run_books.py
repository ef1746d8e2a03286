"""The run-books of a pod: what they would run, and what they make of statuses."""

import fcntl
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llama_jax import cli
from llama_jax.config.recipe import load_recipe
from tests.architecture.tree import ROOT

RUN_BOOKS = sorted((ROOT / "scripts").glob("*.sh"))
PLACE = ("pod", "--zone", "us-east5-a")
RECIPE = "configs/pretrain/llama2_70b.py:v5p_256"
TRAIN = (
    *("pretrain.sh", *PLACE, "--type", "v5p-256", "--recipe", RECIPE),
    *("--workdir", "gs://bucket/70b", "--data", "data with a space"),
)


def run(script: str, *words: str, path: Path = Path(sys.executable).parent):
    env = os.environ | {"PATH": f"{path}:{os.environ['PATH']}"}
    return subprocess.run(
        [ROOT / "scripts" / script, *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )


def planned(*words: str) -> list[list[str]]:
    """The commands that a script prints when it runs dry."""
    done = run(*words, "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace("$'", "'").splitlines()
    commands = [shlex.split(line) for line in lines]
    assert all(command[0] in ("gcloud", "git") for command in commands)
    return commands


def remote(commands: list[list[str]]) -> list[str]:
    """What the hosts are told, each of them."""
    told = [c for c in commands if "ssh" in c]
    assert all(c[c.index("--worker") + 1] == "EACH" for c in told)
    return [c[c.index("--command") + 1] for c in told]


@pytest.mark.parametrize("path", RUN_BOOKS, ids=lambda path: path.name)
def test_each_is_careful_and_says_how_it_is_used(path):
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)
    done = run(path.name)
    assert done.returncode == 2
    takes = {"convert_meta.sh": "SOURCE TARGET", "chat.sh": "--recipes FILE.py"}
    form = takes.get(path.name, "NAME --zone ZONE")
    assert f"scripts/{path.name} {form}" in done.stderr
    assert "pipefail" not in done.stderr


def test_a_slice_is_asked_for_and_gets_this_commit_everywhere():
    commands = planned("setup_tpu_vm.sh", *PLACE, "--type", "v5p-256", "--spot")
    create = commands[0]
    assert create[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    for option, value in (("--accelerator-type", "v5p-256"), ("--zone", "us-east5-a")):
        assert create[create.index(option) + 1] == value
    assert "--spot" in create
    archive = next(c for c in commands if c[:2] == ["git", "archive"])
    copy = next(c for c in commands if "scp" in c)
    assert archive[archive.index("--output") + 1] in copy
    assert copy[copy.index("--worker") + 1] == "all"
    install, meet = remote(commands)
    assert '.venv/bin/pip install --quiet ".[tpu,gcs,demo]"' in install
    assert "jax.distributed.initialize()" in meet


def test_an_unknown_type_is_refused():
    done = run("setup_tpu_vm.sh", *PLACE, "--type", "v9-8", "--dry-run")
    assert done.returncode == 2
    assert "give v4-N, v5litepod-N, v5p-N or v6e-N" in done.stderr


def test_pretraining_checks_data_and_recipe_before_it_trains(capsys):
    *_, inspect, check, train = remote(planned(*TRAIN))
    words = shlex.split(inspect)
    assert words[-2:] == ["inspect", "data with a space"]
    assert shlex.split(check) == [*shlex.split(train), "--dry-run"]
    words = shlex.split(check)
    assert words[:3] == ["cd", "llama-jax", "&&"]
    assert cli.main(words[4:]) == 0  # the command line itself is right
    assert '"data with a space"' in capsys.readouterr().out


def test_metas_weights_are_converted_looked_at_and_write(place):
    done = run("convert_meta.sh", "llama-2-7b", "runs/a model", "--prompt", "The")
    assert done.returncode == 0, done.stderr
    assert "logits of both ends agree" in done.stdout
    assert "every weight is as it was converted" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("The")
    options = ("--", "--model-parallel", "4")
    again = run(
        "convert_meta.sh", "runs/a model", "runs/meta", "--to", "meta", *options
    )
    assert again.returncode == 0, again.stderr
    assert len(list((place / "runs/meta").glob("*.pth"))) == 4
    refused = run("convert_meta.sh", "llama-2-7b", "runs/meta")
    assert refused.returncode == 1
    assert "is not empty" in refused.stderr


def stages(*words: str) -> list[list[str]]:
    """The commands that scripts/chat.sh would run."""
    done = run("chat.sh", "--dry-run", *words)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("$ ")]
    return [shlex.split(line)[1:] for line in lines]


LLAMA = ("--recipes", "configs/chat/llama2_7b.py", "--base", "gs://bucket/llama-2-7b")
CHAT = (*LLAMA, "--data", "some data", "--run", "runs/a chat")


def after(option: str, command: list[str]) -> str:
    return command[command.index(option) + 1]


def test_every_version_of_the_chat_model_begins_with_the_base():
    sizes = ("--tensor", "8", "--batch-size", "4")
    commands = stages(*CHAT, *sizes, "--", "--train.batch-size", "32")
    trained = [c for c in commands if c[:2] == ["llama-jax", "train"]]
    run, base = f"{Path.cwd()}/runs/a chat", "gs://bucket/llama-2-7b"
    assert [after("--workdir", c) for c in trained] == [
        *(f"{run}/{name}" for name in ("sft", "helpfulness", "safety", "distilled")),
        *(f"{run}/{name}" for name in ("v1", "v2", "v3", "v4", "v5", "ppo")),
    ]
    begun = [after("--init-from", c) for c in trained]
    assert begun == [base, *[f"{run}/sft"] * 2, *[base] * 6, f"{run}/v5"]
    assert all(c[-2:] == ["--train.batch-size", "32"] for c in trained)
    pools = [c for c in commands if c[:3] == ["llama-jax", "sample", "pool"]]
    assert [after("--keep", c) for c in pools] == ["latest"] * 3 + ["all"] * 2
    answers = [c for c in commands if c[:3] == ["llama-jax", "sample", "answers"]]
    newest = ("distilled", "v1", "v2", "v3", "v4")
    assert [c[3] for c in answers] == [f"{run}/{name}" for name in newest]
    assert {after("--tensor", c) for c in answers} == {"8"}
    assert {after("--batch-size", c) for c in answers} == {"4"}
    assert not any("small" in word for command in commands for word in command)


def test_paths_with_spaces_stay_whole_and_mixtures_are_of_what_was_made():
    made, mixed = set(), set()
    for command in stages(*CHAT):
        if command[:2] == ["llama-jax", "data"]:
            assert after("--train", command).endswith(".jsonl")
            made.add(after("--output", command))
        if command[:2] == ["llama-jax", "train"]:
            first = command.index("--data.paths") + 1
            paths = list(itertools.takewhile(os.path.isabs, command[first:]))
            if len(paths) > 1:
                first = command.index("--data.weights") + 1
                weights = list(itertools.takewhile(str.isdigit, command[first:]))
                assert len(weights) == len(paths)
            mixed.update(paths)
    assert made == mixed
    assert f"{Path.cwd()}/runs/a chat/rows/ghost" in mixed


def test_a_smaller_model_learns_from_what_a_larger_one_wrote():
    commands = stages(*CHAT, "--selections", "runs/70b")
    root = Path.cwd() / "runs"
    sampled = [c[2] for c in commands if c[:2] == ["llama-jax", "sample"]]
    assert sampled == ["distil", "ghost", "ghost"]
    learnt = [after("--train", c) for c in commands if c[1:3] == ["data", "dialogs"]]
    larger = [str(root / f"70b/samples/v{version}.jsonl") for version in range(1, 6)]
    assert [path for path in learnt if "70b" in path] == larger
    trained = [after("--workdir", c) for c in commands if c[1:2] == ["train"]]
    own = [after("--workdir", c) for c in stages(*CHAT) if c[1:2] == ["train"]]
    assert trained == own


def test_a_larger_model_that_is_not_done(tmp_path):
    (tmp_path / "samples").mkdir()
    for missing in range(1, 6):
        done = run("chat.sh", *CHAT, "--selections", str(tmp_path))
        assert done.returncode == 1
        assert f"{tmp_path} has no samples/v{missing}.jsonl" in done.stderr
        (tmp_path / f"samples/v{missing}.jsonl").touch()


def test_other_comparisons_are_mixed_in_as_the_recipe_says(tmp_path):
    (tmp_path / "safety_others.jsonl").touch()
    commands = stages(*LLAMA, "--data", str(tmp_path), "--run", str(tmp_path))
    rows = tmp_path / "rows"
    compared = [c for c in commands if c[:3] == ["llama-jax", "data", "comparisons"]]
    names = ("helpfulness", "safety", "safety_others")
    assert [after("--output", c) for c in compared] == [str(rows / n) for n in names]
    helpfulness, safety = (
        next(c for c in commands if f"configs/chat/llama2_7b.py:{about}" in c)
        for about in ("helpfulness", "safety")
    )
    assert after("--data.weights", helpfulness) == "1"
    assert safety[-2:] == [str(rows / "safety"), str(rows / "safety_others")]


def test_the_options_of_every_stage_are_known(capsys):
    """Each command line is right, as far as it is without the files before it."""
    for command in stages(*CHAT):
        if command[0] != "llama-jax":
            continue
        name, *rest = command[1:]
        assert cli.main([name, *rest, "--dry-run"]) in (0, 1)
        said = capsys.readouterr()
        assert "nrecognized" not in said.err and "equired" not in said.err


def test_on_a_pod_models_work_on_every_host():
    commands = stages(*CHAT, "--pod", "pod", "--zone", "us-east5-a")
    assert not any(c[:2] == ["llama-jax", "train"] for c in commands)
    told = [shlex.split(c[-1]) for c in commands if "on_every_host" in c[0]]
    assert {tuple(words[:4]) for words in told} == {
        ("cd", "llama-jax", "&&", f".venv/bin/{program}")
        for program in ("llama-jax", "python")
    }
    assert [words[4] for words in told].count("train") == 10
    assert after("--workdir", told[0]) == f"{Path.cwd()}/runs/a chat/sft"
    answered = [words for words in told if "scripts.card" in words]
    assert all("--prompts" in words for words in answered) and len(answered) == 8
    others = [c for c in commands if "scripts.card" in c]
    assert len(others) == 10 and not any("--prompts" in c for c in others)


def test_what_came_after_the_reward_models_has_its_answers_scored():
    cards = [c for c in stages(*CHAT) if "scripts.card" in c]
    scored = [c for c in cards if "--reference" in c]
    names = ["distilled", "v1", "v2", "v3", "v4", "v5", "ppo"]
    root = f"{Path.cwd()}/runs/a chat"
    assert [c[3] for c in scored] == [f"{root}/{name}" for name in names]
    for card in scored:
        assert after("--reference", card) == f"{root}/sft"
        for model in ("helpfulness", "safety"):
            assert after(f"--{model}", card) == f"{root}/{model}"
    assert [c[3] for c in cards if "--prompts" in c] == [
        f"{root}/{name}" for name in ("sft", *names)
    ]


def test_seeds_of_the_small_world_are_runs_of_their_own():
    commands = stages("--tiny", "--run", "runs/tiny", "--seeds", "2")
    root = f"{Path.cwd()}/runs/tiny"
    (report,) = [c for c in commands if "scripts.chat_report" in c]
    assert report[3:] == [f"{root}/seed-0", f"{root}/seed-1", "--output", root]
    trained = [c for c in commands if c[:2] == ["llama-jax", "train"]]
    assert len(trained) == 2 * 12
    for seed in (0, 1):
        own = [c for c in trained if f"{root}/seed-{seed}/" in " ".join(c)]
        assert len(own) == 12
        assert all(after("--train.seed", c) == str(seed) for c in own)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--tiny", "--base", "llama-2-7b"), "makes its own models"),
        ((*LLAMA, "--run", "runs/chat"), "scripts/chat.sh --recipes"),
        ((*CHAT, "--pod", "llama2-70b"), "Give --pod and --zone"),
        ((*CHAT, "--zone", "us-east5-a"), "Give --pod and --zone"),
        ((*CHAT, "--seeds", "3"), "--seeds and --prompts are those of --tiny"),
        (("--tiny", "--seeds", "0"), "0 is no count"),
        (("--tiny", "--run", "gs://bucket/chat"), "is a bucket: mount it"),
        (("--tiny", "--selections", "runs/70b"), "makes its own models"),
        ((*CHAT, "--batch-size", "all"), "all is no count"),
        (("--huge",), "There is no option --huge"),
    ],
)
def test_what_the_chat_run_book_cannot_do_is_refused(words, problem):
    done = run("chat.sh", *words)
    assert done.returncode == 2
    assert problem in done.stderr
    assert "scripts/chat.sh --tiny" in done.stderr


# Stands for llama-jax and python: says what it was told, and fails where it is to.
TOLD = """#!/usr/bin/env bash
[[ $1 != -c ]] || exit 0
echo "$(basename "$0") $*" >>{folder}/log
[[ $* != *{failing}* ]] || exit 3
"""


@pytest.fixture
def told(tmp_path):
    """Runs scripts/chat.sh with programs that only say what they were told."""

    def start(failing: str, *words: str):
        for program in ("llama-jax", "python"):
            path = tmp_path / program
            path.write_text(TOLD.format(folder=tmp_path, failing=failing))
            path.chmod(0o755)
        return run("chat.sh", *words, "--run", str(tmp_path / "chat"), path=tmp_path)

    log = tmp_path / "log"
    log.touch()
    return start, lambda: log.read_text().splitlines()


def test_the_book_stops_where_a_command_fails_and_goes_on_there(told, tmp_path):
    start, log = told
    words = (*LLAMA, "--data", str(tmp_path))
    done = start("run-safety-fails", *words)
    assert done.returncode != 0  # there are no rows to join, as nothing was made
    before = len(log())
    assert before > 5

    for name in ("distilled", "ghost-last", "ghost-all"):
        rows = tmp_path / f"chat/samples/{name}/rows-00000-of-00001.jsonl"
        rows.parent.mkdir(parents=True)
        rows.write_text("{}\n")
    done = start("llama2_7b.py:ppo", *words)
    assert done.returncode == 3
    lines = log()
    assert len(lines) == len(set(lines))  # nothing was done twice
    assert "llama2_7b.py:ppo" in lines[-1]

    assert start("nothing", *words).returncode == 0
    assert log()[: len(lines) + 1] == [*lines, lines[-1]]
    assert (tmp_path / "chat/samples/ghost.jsonl").read_text() == "{}\n{}\n"

    done = start("nothing", *words, "--base", "gs://bucket/another")
    assert done.returncode == 1
    assert "was done by another command" in done.stderr


def test_what_does_not_fit_may_go_on_with_other_sizes(told, tmp_path):
    start, log = told
    words = (*LLAMA, "--data", str(tmp_path))
    start("samples/distilled", *words)
    (failed,) = (line for line in log() if "samples/distilled" in line)
    before = len(log())
    sizes = ("--tensor", "8", "--batch-size", "4")
    start("samples/distilled", *words, *sizes)
    (again,) = log()[before:]  # nothing that was done is done once more
    assert "--tensor 1 " in failed and "--batch-size 32 " in failed
    smaller = failed.replace("--tensor 1 ", "--tensor 8 ")
    assert again == smaller.replace("--batch-size 32 ", "--batch-size 4 ")


def test_rows_that_cannot_be_joined_are_not_joined(told, tmp_path):
    start, _ = told
    rows = tmp_path / "chat/samples/distilled/rows-00000-of-00001.jsonl"
    rows.mkdir(parents=True)  # a directory, which cannot be read as a file
    done = start("nothing", *LLAMA, "--data", str(tmp_path))
    assert done.returncode != 0
    assert not (tmp_path / "chat/samples/distilled.jsonl").exists()
    assert not (tmp_path / "chat/done/join-distilled").exists()


def test_a_run_may_go_on_on_another_pod(told, tmp_path):
    """What was done is known by the command, wherever it ran."""
    start, log = told
    words = (*LLAMA, "--data", str(tmp_path))
    start("samples/distilled", *words)
    (mark,) = (tmp_path / "chat/done").glob("train-sft")
    assert mark.read_text().startswith("llama-jax train configs/chat/llama2_7b.py:sft")
    before = len(log())
    pod = ("--pod", "pod", "--zone", "us-east5-a", "--dry-run")
    done = start("nothing", *words, *pod)
    assert done.returncode == 0 and len(log()) == before
    assert "chat/sft" in done.stdout  # of others, as what they begin with
    lines = [line for line in done.stdout.splitlines() if line.startswith("$ ")]
    remote = [shlex.split(line)[-1] for line in lines]  # a command is one word there
    trained = {
        name: f"--workdir {tmp_path}/chat/{name} " for name in ("sft", "distilled")
    }
    assert not any(trained["sft"] in command for command in remote)
    assert any(trained["distilled"] in command for command in remote)


def test_two_books_do_not_write_to_one_place(told, tmp_path):
    start, _ = told
    (tmp_path / "chat").mkdir()
    with (tmp_path / "chat/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = start("nothing", *LLAMA, "--data", str(tmp_path))
    assert done.returncode == 1
    assert "is being written to" in done.stderr


# Stands for gcloud: two hosts, which end with the next of the statuses in a file each.
GCLOUD = """#!/usr/bin/env bash
set -eu
echo "$*" >>{folder}/log
case "$*" in
  *'describe pod'*networkEndpoints*) echo 2 ;;
  *' describe '*) echo ACTIVE ;;
  *' ssh '*'llama-jax train'*'--dry-run'*) ;;
  *' ssh '*'llama-jax train'*)
    file={folder}/statuses.${{@: -1}}
    read -r status <"$file"
    sed -i 1d "$file"
    echo "working"
    exit "$status" ;;
esac
"""


@pytest.fixture
def gcloud(tmp_path):
    """A folder with a `gcloud` and a `sleep` that take no time."""

    def statuses(*of_hosts: list[int]) -> Path:
        (tmp_path / "gcloud").write_text(GCLOUD.format(folder=tmp_path))
        (tmp_path / "sleep").write_text("#!/bin/sh\n")
        for program in ("gcloud", "sleep"):
            (tmp_path / program).chmod(0o755)
        for host, given in enumerate(of_hosts):
            lines = "".join(f"{status}\n" for status in given)
            (tmp_path / f"statuses.{host}").write_text(lines)
        return tmp_path

    return statuses


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [(0, 0, 0), (75, 75, 75), (76, 75, 76), (76, 1, 1), (255, 76, 76)],
)
def test_how_each_host_ended_is_said(gcloud, first, second, status):
    path = gcloud([first], [second])
    done = run("on_every_host.sh", *PLACE, "--", "llama-jax train", path=path)
    assert done.returncode == status
    assert sorted(done.stdout.splitlines()) == ["[0] working", "[1] working"]
    for host, ended in enumerate((first, second)):
        told = f"host {host} of 2 ended with status {ended}" in done.stderr
        assert told == (ended != 0)


@pytest.mark.parametrize(
    ("first", "second", "status", "starts"),
    [
        ([75, 76, 0], [75, 76, 0], 0, 3),
        ([75, 1], [75, 76], 1, 2),
        ([76] * 11, [76] * 11, 76, 11),
    ],
    ids=["goes on", "an error", "lost again and again"],
)
def test_what_is_started_again(gcloud, first, second, status, starts):
    path = gcloud(first, second)
    done = run(*TRAIN, path=path)
    assert done.returncode == status, done.stderr
    log = (path / "log").read_text()
    trained = re.findall(r"llama-jax train (?!.*--dry-run).*--worker 0", log)
    assert len(trained) == starts


def test_the_manifest_has_a_host_for_every_four_chips():
    text = (ROOT / "scripts/gke_jobset.yaml").read_text()
    manifest = yaml.safe_load(text)
    assert manifest["kind"] == "JobSet"
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    recipe = load_recipe(container["command"][2])
    hosts = recipe.num_devices // container["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == hosts
    assert spec["completionMode"] == "Indexed"
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert recipe.topology == f"v5p:{topology}"
    assert job["replicas"] == recipe.mesh.num_slices
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [1, 2]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert cli.main([*container["command"][1:], "--dry-run"]) == 0
    # The line for xpk runs the same command.
    line = re.search(r'--command "llama-jax ([^"]*)"', text)
    assert container["command"][1:5] == shlex.split(line[1])
