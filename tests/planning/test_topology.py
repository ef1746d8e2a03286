"""Names of slices, what they mean, and what is said of names that mean nothing."""

import subprocess
import sys

import pytest

from llama_jax.errors import PlanError
from llama_jax.planning.topology import CHIPS, Topology, devices, parse
from llama_jax.train import metrics


@pytest.mark.parametrize(
    ("name", "means", "num_chips"),
    [
        ("v5p:4x4x8", "v5p:4x4x8", 128),
        ("v5p-256", "v5p:4x4x8", 128),  # TensorCores
        ("v5p-128", "v5p:4x4x4", 64),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-2048", "v5p:8x8x16", 1024),
        ("v4-1024", "v4:8x8x8", 512),
        ("v5e-256", "v5e:16x16", 256),  # chips
        ("v5litepod-256", "v5e:16x16", 256),
        ("V6E-256", "v6e:16x16", 256),
        ("v6e-1", "v6e:1x1", 1),
        ("v5e:2x4", "v5e:2x4", 8),
    ],
)
def test_names(name, means, num_chips):
    topology = parse(name)
    assert (topology.name, topology.num_chips) == (means, num_chips)
    assert parse(topology.cloud_name) == topology


def test_slices_multiply():
    topology = parse("v5e-256", slices=4)
    assert topology.num_chips == 1024
    with pytest.raises(PlanError, match="slices is 0"):
        parse("v5e-256", slices=0)


@pytest.mark.parametrize(
    ("name", "rings"),
    [
        ("v5p:4x4x8", (True, True, True)),
        ("v5p:2x2x4", (False, False, False)),  # less than a cube is not closed
        ("v5e:8x16", (False, True)),
        ("v5e:16x16", (True, True)),
    ],
)
def test_rings(name, rings):
    assert parse(name).wrap == rings


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5p:3x3x3", r"multiple of 4.*v5p:2x2x4 \(v5p-32\) and v5p:2x4x4 \(v5p-64\)"),
        ("v5p:8x4x4", r"none less than the one before.*v5p:4x4x8"),
        ("v5p:4x4", "three dimensions"),
        ("v5e:16x16x2", r"flat.*Nearest are v5e:16x16 \(v5e-256\)\."),
        ("v5p-100", r"counts TensorCores, 2 a chip; this would be 50 chips.*v5p-128"),
        ("v5p-3", r"1\.5 chips.*v5p:2x2x1"),
        ("v5e-512", r"counts chips; this would be 512 chips.*v5e-256"),
        ("v7:2x2", "the chip 'v7': planning knows v4, v5e, v5p, v6e"),
        ("pod", "write a chip and its torus"),
        ("", "write a chip and its torus"),
    ],
)
def test_names_of_nothing(name, says):
    with pytest.raises(PlanError, match=says):
        parse(name)


def test_every_chip_has_a_smallest_slice():
    for chip in CHIPS.values():
        sizes = (2, 2) if chip.torus_dims == 2 else (2, 2, 1)
        assert Topology(chip, sizes).num_chips == 4
        assert chip.tdp_source


def test_runs_and_plans_count_the_same_peak():
    peaks = {chip.peak_flops for chip in CHIPS.values()}
    assert peaks == set(metrics._PEAK_FLOPS.values())


def test_the_compiler_is_missing(monkeypatch):
    def refuse(**kwargs):
        raise RuntimeError("JAX TPU support not installed; cannot generate topology.")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    with pytest.raises(PlanError, match=r"pip install 'llama-jax\[tpu\]'"):
        devices(parse("v5e:4x4"))


def test_the_compiler_is_another(monkeypatch):
    def refuse(**kwargs):
        raise RuntimeError("INVALID_ARGUMENT: unknown chip")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    with pytest.raises(PlanError, match="does not know v6e:4x4: INVALID_ARGUMENT"):
        devices(parse("v6e:4x4"))


def test_importing_sets_nothing():
    code = (
        "import os, jax.experimental.topologies; before = dict(os.environ);"
        "import llama_jax.planning.topology; assert dict(os.environ) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
