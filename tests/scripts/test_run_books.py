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
    of_a_pod = path.name != "convert_meta.sh"
    takes = "NAME --zone ZONE" if of_a_pod else "SOURCE TARGET"
    assert f"scripts/{path.name} {takes}" in done.stderr
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
