"""`llama-jax convert` as a process: killed and gone on with, and how much memory."""

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.convert import make_checkpoint, run
from llama_jax.config import LlamaConfig
from llama_jax.conversion.journal import JOURNAL
from llama_jax.model import num_params

pytestmark = pytest.mark.slow

PROGRAM = Path(sys.executable).with_name("llama-jax")
# 70B in small: its eight key/value heads and its eight shards; 0.7 GB in bfloat16.
CONFIG = dataclasses.replace(
    LlamaConfig.llama2_70b(), dim=2048, num_heads=16, hidden_dim=7168, num_layers=4
)
LEGS = {"orbax": [], "hf": [], "meta": ["--model-parallel", "8"]}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made") / "meta"
    make_checkpoint(directory, CONFIG, num_shards=8)
    return directory


def command(source, target, to) -> list[str]:
    return [str(PROGRAM), "convert", str(source), str(target), "--to", to, *LEGS[to]]


def digest(printed: str) -> str:
    return re.findall(r"sha256 (\w{64})", printed)[0]


@pytest.mark.parametrize("to", LEGS)
def test_killed_five_times_and_run_again(source, tmp_path, to):
    whole, target = tmp_path / "whole", tmp_path / "target"
    start = time.monotonic()
    printed, _ = run(command(source, whole, to))
    seconds = time.monotonic() - start
    work, delays = tmp_path / ".target.partial", random.Random(to)
    for _ in range(5):
        process = subprocess.Popen(command(source, target, to))
        while not (work / JOURNAL).exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(delays.uniform(0, seconds / 4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if target.exists():  # it had finished
            break
        assert sorted(os.listdir(tmp_path)) == [".target.partial", "whole"]
    if not target.exists():
        again, _ = run(command(source, target, to))
        assert digest(again) == digest(printed)
        assert "gone on with" in again
    assert sorted(os.listdir(tmp_path)) == ["target", "whole"]
    if to != "orbax":  # whose files have random names
        for file in whole.iterdir():
            assert (target / file.name).read_bytes() == file.read_bytes()
    inspected, _ = run([str(PROGRAM), "inspect", str(target), "--verify"])
    assert "every weight is as it was converted" in inspected


def test_memory_is_bounded_in_every_direction(tmp_path):
    """A few slabs, and one layer's matrix for the proof: not half of the weights."""
    deep = dataclasses.replace(CONFIG, num_layers=12)
    place = tmp_path / "source"
    make_checkpoint(place, deep, num_shards=8)
    _, idle = run([str(PROGRAM), "inspect", str(place)])
    for number, to in enumerate(("orbax", "hf", "meta", "orbax")):
        target = tmp_path / str(number)
        _, peak = run(command(place, target, to))
        print(f"{place.name} to {to}: {peak / 1e6:.0f} MB, idle {idle / 1e6:.0f}")
        assert peak - idle < 0.5 * 2 * num_params(deep)
        place = target
