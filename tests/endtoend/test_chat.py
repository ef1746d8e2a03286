"""scripts/chat.sh in the small world, killed in every stage, ends as if it were not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.chat_report import STAGES
from tests.architecture.tree import ROOT

# Small, but enough for answers that end, some of them safe, and for two files of each
# kind of rows, so that there is a time between them.
SIZES = ("--prompts", "132", "--", "--train.num-steps", "60")
# A run that is never killed, on a machine that has other things to do.
SECONDS = 3600

TRAINED = ("base-256", "base", "helpfulness", "safety", *STAGES)
SAMPLED = ("distilled", "ghost-last", "ghost-all", *(f"v{n}" for n in range(1, 6)))


def start(run: Path) -> subprocess.Popen[bytes]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with (run.parent / "said").open("w") as said:
        return subprocess.Popen(
            [ROOT / "scripts/chat.sh", "--tiny", "--run", run, *SIZES],
            env=os.environ | {"PATH": path, "XLA_FLAGS": ""},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def half_done(run: Path) -> set[str]:
    """The stages that have kept something, and are not at their end."""
    made = {f"train-{name}": f"{name}/checkpoints/*[0-9]" for name in TRAINED}
    made |= {f"sample-{name}": f"samples/{name}/*-of-*.jsonl" for name in SAMPLED}
    return {
        mark
        for mark, files in made.items()
        if any(run.glob(files)) and not (run / "done" / mark).exists()
    }


def finish(run: Path) -> None:
    process = start(run)
    assert process.wait(SECONDS) == 0, (run.parent / "said").read_text()[-3000:]


def measured(run: Path) -> dict[str, str]:
    folder = run / "seed-0/measured"
    return {path.stem: path.read_text() for path in folder.iterdir()}


@pytest.mark.slow
def test_killed_once_in_each_stage_the_table_is_the_same(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole)

    spared = set[str]()
    process = start(killed)
    while process.poll() is None:
        if hit := half_done(killed / "seed-0") - spared:
            spared |= hit
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process = start(killed)
        time.sleep(0.1)
    assert process.returncode == 0, (tmp_path / "said").read_text()[-3000:]
    assert len(spared) == len(TRAINED) + len(SAMPLED)

    assert measured(killed) == measured(whole)
    assert len(measured(whole)) == len(STAGES)
    tables = {(run / "table.txt").read_text() for run in (whole, killed)}
    assert len(tables) == 1
    for folder in (*TRAINED[1:], *(f"samples/{name}" for name in SAMPLED)):
        assert (killed / f"seed-0/{folder}/card.md").exists()
