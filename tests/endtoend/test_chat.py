"""scripts/chat.sh in the small world, killed in every stage, ends as if it were not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scripts.chat_report import STAGES
from tests.architecture.tree import ROOT

# Small, but enough for answers that end, some of them safe.
SIZES = ("--prompts", "60", "--", "--train.num-steps", "60")
# A run that is never killed, on a machine that has other things to do.
SECONDS = 3600


def start(run: Path) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        [ROOT / "scripts/chat.sh", "--tiny", "--run", run, *SIZES],
        env=os.environ | {"PATH": path, "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def killed_once(process: subprocess.Popen[str], spared: set[str], wait: float) -> bool:
    """Follow a run to its end, or to the first command that was not killed before."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        is_stage = any(word in line for word in (" train ", " sample ", "raters"))
        if line.startswith("$ ") and is_stage and line not in spared:
            spared.add(line)
            time.sleep(wait)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
    assert process.wait() == 0, "".join(said[-30:])
    return False


def measured(run: Path) -> dict[str, str]:
    folder = run / "seed-0/measured"
    return {path.stem: path.read_text() for path in folder.iterdir()}


@pytest.mark.slow
def test_killed_once_in_each_stage_the_table_is_the_same(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    said, _ = start(whole).communicate(timeout=SECONDS)
    assert "By the rule of the world" in said, said[-3000:]
    draw, spared, num_kills = np.random.default_rng(0), set[str](), 0
    while killed_once(start(killed), spared, draw.uniform(2, 15)):
        num_kills += 1
    assert num_kills == len(spared) > 20
    assert measured(killed) == measured(whole)
    assert measured(whole).keys() == STAGES.keys()
    for stage in STAGES:
        assert (whole / f"seed-0/{stage}/card.md").exists()
