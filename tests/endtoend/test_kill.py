"""A run as a process of its own: killed, stopped, started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llama_jax.train.faults import EXIT_PREEMPTED
from llama_jax.train.metrics import METRICS, read_metrics
from tests import runs
from tests.data import corpus

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Starts a run of 60 steps in a work directory, with a checkpoint every fifth."""
    directory = tmp_path_factory.mktemp("kill")
    tokenizer = corpus.make_tokenizer(directory)
    data = corpus.prepare_corpus(directory / "rows", tokenizer).path
    fields = {
        "data.paths": data,
        "data.sequence-length": corpus.LENGTH,
        "model.vocab-size": 400,
        "model.dim": 48,
        "model.num-layers": 2,
        "train.num-steps": 60,
        "train.batch-size": 8,
        "train.checkpoint-every": 5,
        "train.validate-every": 30,
        "mesh.fsdp": 2,
    }
    argv = [sys.executable, "-c", "import llama_jax.cli as c; exit(c.main())", "train"]
    argv += [f"{ROOT}/configs/demo.py:small"]
    for name, value in fields.items():
        argv += [f"--{name}", str(value)]
    flags = "--xla_force_host_platform_device_count=2"

    def start(workdir: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*argv, "--workdir", str(workdir)],
            env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def finish(process: subprocess.Popen[str]) -> int:
    output, _ = process.communicate(timeout=300)
    assert "Traceback" not in output, output
    return process.returncode


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen[str]) -> None:
    while max((r["step"] for r in read_metrics(workdir / METRICS)), default=0) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def losses(workdir: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(workdir / METRICS) if "loss" in r]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("whole")
    assert finish(command(workdir)) == 0
    return workdir


@pytest.mark.slow
def test_killed_at_any_moment_ends_bit_for_bit_the_same(command, whole, tmp_path):
    """Three kills: after a save began, between saves, and a little later still."""
    draw = np.random.default_rng(0)
    for step in (10, 23, 41):
        process = command(tmp_path)
        wait_for_step(tmp_path, step, process)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        for checkpoint in (tmp_path / "checkpoints").iterdir():
            if checkpoint.name.isdigit():  # what is listed is whole
                runs.saved(tmp_path, int(checkpoint.name))
    assert finish(command(tmp_path)) == 0
    for item in ("params", "optimizer"):
        runs.require_equal(runs.saved(tmp_path, 60, item), runs.saved(whole, 60, item))
    assert losses(tmp_path) == losses(whole)


@pytest.mark.slow
def test_sigterm_saves_and_has_its_own_status(command, whole, tmp_path):
    process = command(tmp_path)
    wait_for_step(tmp_path, 7, process)
    process.terminate()
    assert finish(process) == EXIT_PREEMPTED
    steps = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert max(steps) % 5 or max(steps) > 7
    assert finish(command(tmp_path)) == 0
    assert losses(tmp_path) == losses(whole)


@pytest.mark.slow
def test_a_second_signal_stops_at_once_and_the_last_checkpoint_is_whole(
    command, whole, tmp_path
):
    process = command(tmp_path)
    wait_for_step(tmp_path, 12, process)
    process.terminate()
    process.terminate()
    status = process.wait(timeout=60)
    assert status in (128 + signal.SIGTERM, EXIT_PREEMPTED)
    steps = [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    newest = max(map(int, steps))
    assert newest >= 10
    recipe = tmp_path / "checkpoints" / str(newest) / "data" / "metadata"
    assert json.loads(recipe.read_text()) == {"position": newest * 8}
    assert finish(command(tmp_path)) == 0
    assert losses(tmp_path) == losses(whole)
