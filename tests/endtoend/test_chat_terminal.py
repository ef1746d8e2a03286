"""`llama-jax chat` as people meet it: a process with a terminal of its own."""

import dataclasses
import json
import os
import re
import select
import stat
import subprocess
import sys
import time

import pytest

from tests.endtoend.jobs import ROOT
from tests.generate import models

pty = pytest.importorskip("pty")
pytest.importorskip("readline")

# The terminal is to govern the process, which so gets the signal that Ctrl-C sends.
PROGRAM = """\
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
import llama_jax.cli
raise SystemExit(llama_jax.cli.main())
"""
STOPPED = (
    rb"prompt (\d+) tokens, (\d+) of them cached; (\d+) written, \d+ tokens/s; stopped"
)
CTRL_C, CTRL_D, UP = b"\x03", b"\x04", b"\x1b[A"
# Enough for any step here on a busy machine; a hang is a failure.
SECONDS = 120
# An answer of so many tokens lasts until somebody interrupts it.
CONFIG = dataclasses.replace(models.CONFIG, max_length=4096)
NUM_NEW = 3000


class Session:
    """A command with a terminal; a context that leaves nothing behind.

    Args:
      argv: what follows `llama-jax`.
      env: variables beside those of this process.
    """

    def __init__(self, *argv: str, env: dict[str, str]) -> None:
        self._end, inner = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *argv],
            env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"} | env,
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
        )
        os.close(inner)
        self._screen = b""

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)

    def type(self, keys: bytes) -> None:
        """Press some keys."""
        os.write(self._end, keys)

    def wait_for(self, pattern: bytes) -> tuple[bytes, ...]:
        """Until this is on the screen, which is then done with; returns its groups."""
        found = self._awaited(pattern, SECONDS)
        assert found, self._screen
        return found.groups()

    def give_up_line(self) -> None:
        """Press Ctrl-C, as often as it takes to get an empty line.

        Python's `input` misses a signal that comes after it has shown a key and before
        it waits for the next one, until there is one more.
        """
        for _ in range(SECONDS // 5):
            self.type(CTRL_C)
            if self._awaited(rb"\r\n> ", 5):
                return
        raise AssertionError(self._screen)

    def _awaited(self, pattern: bytes, seconds: float) -> re.Match[bytes] | None:
        limit = time.monotonic() + seconds
        while not (found := re.search(pattern, self._screen, re.DOTALL)):
            left = max(limit - time.monotonic(), 0)
            if not select.select([self._end], [], [], left)[0]:
                return None
            self._screen += os.read(self._end, 65536)
        self._screen = self._screen[found.end() :]
        return found


@pytest.mark.slow
def test_a_chat_of_several_turns(tmp_path):
    checkpoint, saved = tmp_path / "model", tmp_path / "chat.jsonl"
    models.llm(config=CONFIG).save(checkpoint)
    argv = ["chat", str(checkpoint), "--temperature", "0"]
    argv += ["--max-new-tokens", str(NUM_NEW)]
    env = {"XDG_STATE_HOME": str(tmp_path / "state")}
    with Session(*argv, env=env) as session:
        session.wait_for(rb"Ctrl-D leaves\.\r\n> ")
        for question in (b"ba ce", b"fo gu"):
            session.type(question + b"\n")
            session.wait_for(question + rb"\r\n.")  # and the answer has begun
            session.type(CTRL_C)
            prompt, cached, written = map(int, session.wait_for(STOPPED))
            assert 0 < written < NUM_NEW
            session.wait_for(b"> ")
        assert 0 < cached < prompt
        session.type(b"never sent")
        session.wait_for(b"never sent")
        session.give_up_line()
        session.type(UP)
        session.wait_for(b"fo gu")
        session.give_up_line()
        session.type(f"/save {saved}\n".encode())
        session.wait_for(b"4 messages are in .*> ")
        session.type(CTRL_D)
        assert session.process.wait(SECONDS) == 0
    messages = [json.loads(line) for line in saved.read_text("utf-8").splitlines()]
    assert [message["content"] for message in messages[::2]] == ["ba ce", "fo gu"]
    assert all(message["content"] for message in messages)
    history = tmp_path / "state" / "llama-jax" / "chat_history"
    assert history.read_text() == f"ba ce\nfo gu\n/save {saved}\n"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
