"""The run-books of a pod: what they would run, and what they make of statuses."""

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
    assert '.venv/bin/pip install --quiet ".[tpu,gcs]"' in install
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


LLAMA = ("--recipes", "configs/chat/llama2_7b.py", "--base", "llama-2-7b")
CHAT = (*LLAMA, "--data", "data", "--run", "runs/a chat")


def test_every_version_of_the_chat_model_begins_with_the_base():
    commands = stages(*CHAT, "--", "--train.batch-size", "32")
    trained = [c for c in commands if c[:2] == ["llama-jax", "train"]]
    names = [c[c.index("--workdir") + 1].removeprefix("runs/a chat/") for c in trained]
    assert names == [
        *("sft", "helpfulness", "safety", "distilled"),
        *("v1", "v2", "v3", "v4", "v5", "ppo"),
    ]
    begun = [c[c.index("--init-from") + 1] for c in trained]
    from_sft, from_v5 = "runs/a chat/sft", "runs/a chat/v5"
    assert begun == ["llama-2-7b", *[from_sft] * 2, *["llama-2-7b"] * 6, from_v5]
    assert all(c[-2:] == ["--train.batch-size", "32"] for c in trained)
    pools = [c for c in commands if c[:3] == ["llama-jax", "sample", "pool"]]
    keeps = [c[c.index("--keep") + 1] for c in pools]
    assert keeps == ["latest"] * 3 + ["all"] * 2
    sampled = [c[3] for c in commands if c[:3] == ["llama-jax", "sample", "answers"]]
    newest = ("distilled", "v1", "v2", "v3", "v4")
    assert sampled == [f"runs/a chat/{name}" for name in newest]
    assert not any("small" in word for command in commands for word in command)


def test_the_options_of_every_stage_are_known(capsys):
    """Each command line is right, as far as it is without the files before it."""
    for command in stages(*CHAT):
        if command[0] != "llama-jax":
            continue
        name, *rest = command[1:]
        assert cli.main([name, *rest, "--dry-run"]) in (0, 1)
        said = capsys.readouterr()
        assert "nrecognized" not in said.err and "equired" not in said.err


def test_seeds_of_the_small_world_are_runs_of_their_own():
    commands = stages("--tiny", "--run", "runs/tiny", "--seeds", "2")
    (report,) = [c for c in commands if "scripts.chat_report" in c]
    assert report[3:] == ["runs/tiny/seed-0", "runs/tiny/seed-1"]
    trained = [c for c in commands if c[:2] == ["llama-jax", "train"]]
    assert len(trained) == 2 * 12
    for seed in (0, 1):
        own = [c for c in trained if f"runs/tiny/seed-{seed}/" in " ".join(c)]
        assert len(own) == 12
        assert all(c[c.index("--train.seed") + 1] == str(seed) for c in own)


@pytest.mark.parametrize(
    "words",
    [
        ("--tiny", "--base", "llama-2-7b"),
        ("--recipes", "configs/chat/llama2_7b.py", "--run", "runs/chat"),
        (*CHAT, "--pod", "llama2-70b"),
        ("--huge",),
    ],
    ids=["tiny has a base", "no data", "no zone", "unknown"],
)
def test_what_the_chat_run_book_cannot_do_is_refused(words):
    done = run("chat.sh", *words)
    assert done.returncode == 2
    assert "scripts/chat.sh --tiny" in done.stderr


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
