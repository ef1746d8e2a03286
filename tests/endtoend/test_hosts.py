"""Runs of two and of four hosts: equal to one alone, and ending together."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from llama_jax.train.faults import EXIT_HOST_LOST, EXIT_PREEMPTED
from llama_jax.train.metrics import METRICS, read_metrics
from llama_jax.train.pretrain import pretrain
from tests import runs
from tests.data import corpus
from tests.endtoend.jobs import TRAIN, Job
from tests.parity import tolerances

# A lost host is noticed and the others have ended within this time, in seconds.
NOTICED = 60
# Longer than any case here waits.
ENDLESS = ("--train.num-steps", "100000", "--train.validate-every", "100000")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("hosts-data")
    tokenizer = corpus.make_tokenizer(directory)
    return corpus.prepare_corpus(directory / "rows", tokenizer).path


@pytest.fixture(scope="module")
def recipe(data, tmp_path_factory) -> str:
    """The recipe of `tests.runs` as users name one: FILE.py:FUNCTION."""
    file = tmp_path_factory.mktemp("recipe") / "recipe.py"
    file.write_text(
        "from llama_jax.config.recipe import PretrainRecipe\n"
        "from tests import runs\n\n\n"
        f"def tiny() -> PretrainRecipe:\n    return runs.recipe({str(data)!r})\n"
    )
    return f"{file}:tiny"


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The same run by one host."""
    workdir = tmp_path_factory.mktemp("whole")
    assert pretrain(runs.recipe(data), workdir)
    return workdir


@pytest.fixture(scope="module")
def by_two(recipe, tmp_path_factory) -> Path:
    """The same run by two."""
    workdir = tmp_path_factory.mktemp("two")
    argv = [recipe, "--workdir", str(workdir)]
    with Job(workdir / "logs", argv, argv) as job:
        assert job.ends() == [0, 0], job.everything()
    return workdir


def losses(workdir: Path) -> dict[int, float]:
    records = read_metrics(workdir / METRICS)
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def checkpoints(workdir: Path) -> list[int]:
    """Steps that are listed; each has been read, so each is whole."""
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    steps = sorted(int(name) for name in names if name.isdigit())
    for step in steps:
        assert runs.saved(workdir, step)
    return steps


def require_near(after: Path, before: Path, step: int) -> None:
    a, b = runs.saved(after, step), runs.saved(before, step)
    assert a.keys() == b.keys()
    for name in a:
        bound = tolerances.ORDER_PARAMS_RELATIVE * np.abs(b[name]).max()
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=bound, err_msg=name)


def test_two_hosts_train_as_one(whole, by_two):
    mine, theirs = losses(by_two), losses(whole)
    assert list(mine) == list(range(1, runs.NUM_STEPS + 1))
    assert mine == pytest.approx(theirs, abs=tolerances.ORDER_LOSS)
    require_near(by_two, whole, runs.NUM_STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("num_hosts", [1, 4])
@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "tensor": 2, "data": 2}], ids=str)
def test_what_two_hosts_saved_others_go_on_from(
    whole, recipe, by_two, tmp_path, num_hosts, mesh
):
    """Fault 16: another number of hosts, and another mesh."""
    half = runs.NUM_STEPS // 2
    for name in ("checkpoints", "tokenizer.model"):
        source, target = by_two / name, tmp_path / name
        if source.is_dir():
            copy_step(source / str(half), target / str(half))
        else:
            target.write_bytes(source.read_bytes())
    sizes = [w for axis, n in mesh.items() for w in (f"--mesh.{axis}", str(n))]
    argv = [recipe, "--workdir", str(tmp_path), *sizes]
    with Job(tmp_path / "logs", *[argv] * num_hosts) as job:
        assert job.ends() == [0] * num_hosts, job.everything()
        assert f"Going on from step {half}" in job.said(0)
    mine = losses(tmp_path)
    assert list(mine) == list(range(half + 1, runs.NUM_STEPS + 1))
    for step, loss in mine.items():
        assert loss == pytest.approx(losses(whole)[step], abs=tolerances.ORDER_LOSS)
    require_near(tmp_path, whole, runs.NUM_STEPS)


def copy_step(source: Path, target: Path) -> None:
    for file in source.rglob("*"):
        if file.is_file():
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_host_ends_the_other_and_a_rerun_goes_on(recipe, tmp_path, lost):
    argv = [recipe, "--workdir", str(tmp_path)]
    with Job(tmp_path / "logs", *[[*argv, *ENDLESS]] * 2) as job:
        job.wait_for_step(tmp_path, 6)
        job.hosts[lost].kill()
        killed = time.monotonic()
        statuses = job.ends()
        seconds = time.monotonic() - killed
        assert statuses[1 - lost] == EXIT_HOST_LOST, job.everything()
        assert "another host was lost" in job.said(1 - lost)
        assert "start every host again" in job.said(1 - lost)
        assert seconds < NOTICED
    newest = max(checkpoints(tmp_path))
    again = [*argv, "--train.num-steps", str(newest + 2)]
    with Job(tmp_path / "logs", again, again) as job:
        assert job.ends() == [0, 0], job.everything()
        assert f"Going on from step {newest}" in job.said(1)
    assert list(losses(tmp_path)) == list(range(1, newest + 3))


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_host_is_lost_after_the_heartbeat(recipe, tmp_path, silent):
    """No connection breaks, as when a chip waits for one that is gone."""
    argv = [recipe, "--workdir", str(tmp_path), *ENDLESS]
    argv += ["--train.heartbeat-seconds", "10"]
    with Job(tmp_path / "logs", argv, argv) as job:
        job.wait_for_step(tmp_path, 6)
        job.hosts[silent].send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        status = job.hosts[1 - silent].wait(NOTICED)
        assert status == EXIT_HOST_LOST, job.everything()
        assert 5 < time.monotonic() - stopped < NOTICED
        assert "another host was lost, as JAX says above" in job.said(1 - silent)


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked", [{0: signal.SIGTERM}, {1: signal.SIGINT}, dict.fromkeys((0, 1), 15)]
)
def test_a_signal_to_any_host_saves_one_step_on_all(recipe, tmp_path, asked):
    argv = [recipe, "--workdir", str(tmp_path), *ENDLESS]
    with Job(tmp_path / "logs", argv, argv) as job:
        job.wait_for_step(tmp_path, 6)
        for host, number in asked.items():
            job.hosts[host].send_signal(number)
        assert job.ends() == [EXIT_PREEMPTED] * 2, job.everything()
    assert max(checkpoints(tmp_path)) == max(losses(tmp_path))


@pytest.mark.slow
def test_a_second_signal_stops_at_once_and_the_last_checkpoint_is_whole(
    recipe, tmp_path
):
    argv = [recipe, "--workdir", str(tmp_path), *ENDLESS]
    with Job(tmp_path / "logs", argv, argv) as job:
        job.wait_for_step(tmp_path, 6)
        for _ in range(2):
            job.hosts[1].terminate()
            time.sleep(0.05)
        first, second = job.ends()
        assert second in (128 + signal.SIGTERM, EXIT_PREEMPTED), job.everything()
        assert first in (EXIT_HOST_LOST, EXIT_PREEMPTED), job.everything()
    assert checkpoints(tmp_path)


# Runs the command after a signal to itself is arranged for the named moment, once.
SIGNALLED = """
import os, signal
from llama_jax.checkpoint.manager import RunCheckpoints
from llama_jax.train import loop, run
owner, name = {{"compile": (run, "make_train_step"),
               "restore": (run, "_restore_or"),
               "validate": (loop, "validate"),
               "save": (RunCheckpoints, "save")}}[{moment!r}]
work = getattr(owner, name)
def first(*args, **kwargs):
    setattr(owner, name, work)
    result = work(*args, **kwargs) if {moment!r} == "compile" else None
    os.kill(os.getpid(), signal.SIGTERM)
    return result or work(*args, **kwargs)
setattr(owner, name, first)
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["restore", "compile", "validate", "save"])
def test_a_signal_at_any_moment(whole, recipe, tmp_path, moment):
    argv = [recipe, "--workdir", str(tmp_path)]
    program = SIGNALLED.format(moment=moment) + TRAIN
    with Job(tmp_path / "logs", argv, argv, programs={1: program}) as job:
        assert job.ends() == [EXIT_PREEMPTED] * 2, job.everything()
    assert max(checkpoints(tmp_path)) == max(losses(tmp_path)) < runs.NUM_STEPS
    with Job(tmp_path / "logs", argv, argv) as job:
        assert job.ends() == [0, 0], job.everything()
    assert losses(tmp_path) == pytest.approx(losses(whole), abs=tolerances.ORDER_LOSS)


OTHER_CODE = """
import llama_jax
llama_jax.__version__ = "another"
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["recipe", "data", "code"])
def test_hosts_that_differ_are_told_at_start(recipe, data, tmp_path, what):
    argv = [recipe, "--workdir", str(tmp_path / "run")]
    other, programs = list(argv), {}
    match what:
        case "recipe":
            other += ["--optimizer.peak-lr", "3e-4"]
        case "data":  # other rows at the place that the recipe names on this host
            rows = corpus.prepare_corpus(
                tmp_path / "rows", corpus.make_tokenizer(tmp_path), seed=5
            ).path
            programs = {
                1: "from llama_jax.train import run as p; opened = p.open_data\n"
                "import dataclasses\n"
                "p.open_data = lambda c: opened("
                f"dataclasses.replace(c, paths=({str(rows)!r},)))\n{TRAIN}"
            }
        case "code":
            programs = {1: OTHER_CODE + TRAIN}
    with Job(tmp_path / "logs", argv, other, programs=programs) as job:
        assert job.ends() == [1, 1], job.everything()
        for host in (0, 1):
            assert f"host {host} of 2: the hosts do not agree on {what}" in job.said(
                host
            )
    assert not (tmp_path / "run" / METRICS).exists()


@pytest.mark.slow
def test_what_only_one_host_cannot_do_ends_all(recipe, by_two, tmp_path):
    """The first host cannot keep the tokenizer; the second says that it ends too."""
    (tmp_path / "tokenizer.model").mkdir()
    argv = [recipe, "--workdir", str(tmp_path)]
    with Job(tmp_path / "logs", argv, argv) as job:
        assert job.ends() == [1, 1], job.everything()
        assert "tokenizer.model cannot be written" in job.said(0)
        assert "another host cannot go on" in job.said(1)


@pytest.mark.slow
def test_damage_that_one_host_sees_makes_all_fall_back(whole, recipe, by_two, tmp_path):
    for step in checkpoints(by_two):
        copy_step(by_two / "checkpoints" / str(step), tmp_path / f"checkpoints/{step}")
    newest = tmp_path / "checkpoints" / str(runs.NUM_STEPS) / "params"
    for file in newest.glob("ocdbt.process_1/d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    argv = [recipe, "--workdir", str(tmp_path)]
    with Job(tmp_path / "logs", argv, argv) as job:
        assert job.ends() == [1, 1], job.everything()
        assert all(f"step {runs.NUM_STEPS}" in job.said(host) for host in (0, 1))
    fall_back = ["--train.on-damaged-checkpoint", "fall_back"]
    with Job(tmp_path / "logs", *[[*argv, *fall_back]] * 2) as job:
        assert job.ends() == [0, 0], job.everything()
        assert all("Falling back" in job.said(host) for host in (0, 1))
    require_near(tmp_path, whole, runs.NUM_STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("absent", [0, 1])
def test_a_host_that_never_comes(recipe, tmp_path, absent):
    argv = [recipe, "--workdir", str(tmp_path), "--train.join-seconds", "5"]
    with Job(tmp_path / "logs", argv, argv, programs={absent: "pass"}) as job:
        statuses = job.ends()
        assert statuses[1 - absent] == EXIT_HOST_LOST, job.everything()
        assert "did not meet at 127.0.0.1:" in job.said(1 - absent)
        assert "within 5 s: start all of them" in job.said(1 - absent)
