"""Four hosts that load a checkpoint onto one mesh, each reading its own part."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.checkpoint.params import _boxes
from llama_jax.config import LlamaConfig
from llama_jax.conversion import layout, names, targets
from llama_jax.model import num_params
from tests.endtoend.jobs import Job

NUM_HOSTS = 4
NUM_SHARDS = 8
BFLOAT16 = jnp.dtype("bfloat16")
# A 70B made smaller: its key/value heads and shards, its ratio of widths, its depth
# at which the blocks dominate.
LARGE = dataclasses.replace(
    LlamaConfig.llama2_70b(),
    dim=1024,
    num_layers=13,
    num_heads=16,
    hidden_dim=3584,
    vocab_size=8192,
)
SMALL = dataclasses.replace(
    LARGE, dim=128, num_layers=2, hidden_dim=448, vocab_size=256
)
# What may be taken besides weights. Loading the small model takes up to 36 MB, most of
# it once: two programs are compiled for it; threads, chunks on their way and a part
# being copied are in it too.
RUNTIME_BYTES = 42e6
MESHES = [{"fsdp": 8}, {"tensor": 2, "fsdp": 4}]
PROGRAM = "from tests.endtoend.loading import main; main()"


def write(directory: Path, config: LlamaConfig) -> None:
    """One model in all formats, slab by slab: any bits but those of no finite value."""
    opened = [
        targets.MetaTarget(directory / "meta", config, BFLOAT16, NUM_SHARDS),
        targets.HfTarget(directory / "hf", config, BFLOAT16),
        targets.OrbaxTarget(directory / "orbax", config, BFLOAT16),
    ]
    rng = np.random.default_rng(0)
    sizes = names.axis_sizes(config)
    for weight in names.weights(config):
        _, *columns = weight.parameter.hf.shape(sizes)
        for start, stop in layout.slabs(weight, sizes, BFLOAT16.itemsize):
            bits = rng.integers(2**16, size=(stop - start, *columns), dtype=np.uint16)
            matrix = (bits & ~np.uint16(2**14)).view(BFLOAT16)
            for target in opened:
                target.write(weight, start, matrix)
    for target in opened:
        target.finish(None)
        target.close()


@pytest.fixture(scope="session")
def checkpoints():
    """Two models in all formats; removed at the end, since they are over a gigabyte."""
    place = Path(tempfile.mkdtemp(prefix="hosts-load-"))
    for name, config in (("small", SMALL), ("large", LARGE)):
        write(place / name, config)
    yield place
    shutil.rmtree(place)


@pytest.fixture
def found_by_all(tmp_path, monkeypatch):
    """A job that runs `loading.py`: what each host printed."""
    # What is freed is given back at once, as are blocks of the size of a real model's.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))

    def run(*argv: list[str]) -> list:
        programs = dict.fromkeys(range(NUM_HOSTS), PROGRAM)
        with Job(tmp_path / "logs", *argv, programs=programs) as job:
            assert job.ends() == [0] * NUM_HOSTS, job.everything()
            said = [job.said(host).partition("found: ")[2] for host in range(NUM_HOSTS)]
        return [json.loads(line.splitlines()[0]) for line in said]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=json.dumps)
@pytest.mark.parametrize("format", ["meta", "hf", "orbax"])
def test_each_host_reads_only_its_part(checkpoints, found_by_all, format, mesh):
    other = "meta" if format == "hf" else "hf"
    words = [f"small/{format}", f"large/{format}", f"large/{other}"]
    paths = [str(checkpoints / word) for word in words]
    argv = ["measure", json.dumps(mesh), *paths]
    found = found_by_all(*[argv] * NUM_HOSTS)
    num_bytes = num_params(LARGE) * BFLOAT16.itemsize
    for host in found:
        print(
            f"{host['growth'] / 1e6:.0f} of {num_bytes / 1e6:.0f} MB; a small model "
            f"takes {host['runtime'] / 1e6:.0f}"
        )
        assert host["differing"] == [[], []]
        assert host["held"] < 1.02 * num_bytes / NUM_HOSTS
        allowed = num_bytes / NUM_HOSTS + host["largest"] + RUNTIME_BYTES
        assert host["growth"] < allowed
        assert host["runtime"] < RUNTIME_BYTES
    shares = [name for host in found for name in host["digested"]]
    if format == "meta":
        expected = [f"consolidated.{n:02}.pth" for n in range(NUM_SHARDS)]
        assert sorted(shares) == [*expected, "params.json"]
        assert max(len(host["digested"]) for host in found) == 3
    else:
        assert shares == []


def test_what_a_host_holds_is_read_at_once_or_part_by_part():
    low, high, far = range(0, 4), range(4, 8), range(12, 16)
    rows = range(0, 3)
    assert _boxes({(rows, low), (rows, high)}) == [(rows, range(0, 8))]
    assert _boxes({(rows, low)}) == [(rows, low)]
    apart = {(rows, low), (rows, far)}
    assert set(_boxes(apart)) == apart


def flipped(source: Path, target: Path, name: str) -> Path:
    """A copy of a directory with one bit of one file flipped."""
    shutil.copytree(source, target)
    content = bytearray((target / name).read_bytes())
    content[len(content) // 2] ^= 1
    (target / name).write_bytes(content)
    return target


@pytest.mark.slow
def test_damage_anywhere_stops_all(checkpoints, found_by_all, tmp_path):
    source = checkpoints / "small" / "meta"
    files = [f"consolidated.{n:02}.pth" for n in range(NUM_SHARDS)]
    files.append("params.json")
    damaged = [
        str(flipped(source, tmp_path / str(number), name))
        for number, name in enumerate(files)
    ]
    argv = ["complain", *damaged]
    found = found_by_all(*[argv] * NUM_HOSTS)
    for number, said in enumerate(zip(*found, strict=True)):
        assert all(said)
        named = [host for host, one in enumerate(said) if files[number] in one]
        all_read_it = files[number] == "params.json"
        assert named == ([0, 1, 2, 3] if all_read_it else [number % NUM_HOSTS]), said


@pytest.mark.slow
def test_what_one_host_lacks_stops_all(checkpoints, found_by_all, tmp_path):
    """Disks of their own, and one of them lacks a file, or the end of one."""
    for format in ("meta", "hf", "orbax"):
        shutil.copytree(checkpoints / "small" / format, tmp_path / format)
    (tmp_path / "meta" / "consolidated.03.pth").unlink()
    (tmp_path / "hf" / "config.json").unlink()
    for file in (tmp_path / "orbax" / "params" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    whole = [str(checkpoints / "small" / format) for format in ("meta", "hf", "orbax")]
    lacking = [str(tmp_path / format) for format in ("meta", "hf", "orbax")]
    argv = [["complain", *whole]] * NUM_HOSTS
    argv[2] = ["complain", *lacking]
    found = found_by_all(*argv)
    for host, said in enumerate(found):
        for one in said:
            assert one if host == 2 else "another host cannot go on" in one
