"""Hosts: two real processes over `jax.distributed`, and one alone."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sharding import (
    MeshConfig,
    ShardingError,
    array_sharding,
    hosts,
    make_mesh,
    training_rules,
)

NUM_HOSTS = 2


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def two_hosts():
    """What each of two hosts with two devices found."""
    root = Path(__file__).parents[2]
    env = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{_free_port()}",
        "JAX_NUM_PROCESSES": str(NUM_HOSTS),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(root),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.sharding.host"],
            cwd=root,
            env=env | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(NUM_HOSTS)
    ]
    try:
        ends = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, ends, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in ends]


def test_hosts_join(two_hosts):
    for found in two_hosts:
        assert (found["hosts"], found["devices"], found["local_devices"]) == (2, 4, 2)


def test_rows_of_each_host_make_one_batch(two_hosts):
    whole = np.arange(24, dtype=np.float64).reshape(8, 3)
    for found in two_hosts:
        assert found["shape"] == [8, 3]
        assert found["total"] == whole.sum()
        # Weighted by row, so rows of the two hosts in another order would be seen.
        assert found["weighted"] == (whole * np.arange(8)[:, None]).sum()


def test_what_differs_is_named_on_every_host(two_hosts):
    for found in two_hosts:
        assert found["complaint"] == (
            "the hosts do not agree on data: start all of them with the same command, "
            "code and files."
        )


def test_a_host_alone_starts_and_agrees_with_itself(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    hosts.start()
    assert not jax.distributed.is_initialized()
    hosts.require_agreement(data="digest")


@pytest.mark.parametrize(
    ("address", "num_hosts", "host", "told"),
    [
        ("10.0.0.1:8476", None, None, r"not JAX_NUM_PROCESSES and JAX_PROCESS_ID: set"),
        (None, "2", "0", r"and JAX_PROCESS_ID set, but not JAX_COORDINATOR_ADDRESS"),
        ("10.0.0.1", "2", "0", r"ADDRESS is '10.0.0.1': give host and port"),
        ("10.0.0.1:8476", "two", "0", r"PROCESSES is 'two': give a positive number"),
        ("10.0.0.1:8476", "2", "2", r"PROCESS_ID is '2': .* from 0 to 1, since"),
        ("10.0.0.1:8476", "2", "-1", r"PROCESS_ID is '-1': .* from 0 to 1, since"),
    ],
)
def test_variables_that_make_no_sense_are_refused(
    monkeypatch, address, num_hosts, host, told
):
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    for name, value in zip(names, (address, num_hosts, host), strict=True):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(ShardingError, match=told):
        hosts.start()


def test_a_cluster_that_cannot_be_joined_is_not_one_host_alone(monkeypatch):
    """Else each host of a pod would train by itself, all into one place."""

    def initialize(**settings):
        assert settings["heartbeat_timeout_seconds"] == 7
        raise RuntimeError("Failed to recognize coordinator address pod-0")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ShardingError, match="coordinator address pod-0.*every host"):
        hosts.start(heartbeat_seconds=7)


def test_a_host_alone_answers_itself():
    assert hosts.any_host(True) and not hosts.any_host(False)
    with pytest.raises(ValueError, match="a disk"), hosts.failing_together():
        raise ValueError("a disk")


def test_rows_of_a_host_alone_are_the_batch():
    mesh = make_mesh(MeshConfig())
    sharding = array_sharding(training_rules(sequence_parallel=False), mesh, "batch")
    rows = np.arange(8)
    batch = hosts.global_rows(rows, sharding)
    assert batch.sharding == sharding
    np.testing.assert_array_equal(np.asarray(batch), rows)
