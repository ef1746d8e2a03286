"""What a conversion has done so far, kept where it is being written.

A line for each finished weight, behind one that says what is being converted. A stopped
conversion leaves its journal, which keeps the directory from passing for a checkpoint;
run again, it takes up what the journal lists, once it has looked that it is there.
"""

import contextlib
import fcntl
import json
import threading
import time
from collections.abc import Mapping
from typing import Any, TextIO

from etils import epath

from llama_jax.conversion.files import is_remote
from llama_jax.errors import CheckpointError

JOURNAL = "conversion.partial"
# An object in a bucket is written whole each time.
_SECONDS_BETWEEN_OBJECTS = 10.0


class Journal:
    """The journal in a directory.

    Args:
      directory: where the conversion writes.
      task: what it does; the journal of another task is thrown away.

    Attributes:
      done: the digest of each weight that the journal of this task lists.

    Raises:
      CheckpointError: another process is writing there.
    """

    def __init__(self, directory: epath.Path, task: Mapping[str, Any]) -> None:
        self._file = directory / JOURNAL
        self._task = json.dumps(task, sort_keys=True)
        self._lock = threading.Lock()
        self._written_at = 0.0
        self._is_written = True
        self._stream: TextIO | None = None
        if not is_remote(directory):
            self._stream = open(self._file, "a+", encoding="utf-8")
            try:
                fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._stream.close()
                raise CheckpointError(
                    f"{directory} is being written by another conversion: wait for it, "
                    "or choose another target."
                ) from error
        taken_up = self._take_up()
        self.done = taken_up or {}
        if taken_up is None:
            # Hidden first: what is only half taken away must not pass for whole.
            if not self._file.exists():
                self._file.write_text("")
            self._clear(directory)
            self._write_all()

    def add(self, name: str, digest: str) -> None:
        """Note that a weight is written, and its digest."""
        with self._lock:
            self.done[name] = digest
            if self._stream is not None:
                self._stream.write(json.dumps([name, digest]) + "\n")
                self._stream.flush()
            elif time.monotonic() - self._written_at > _SECONDS_BETWEEN_OBJECTS:
                self._write_all()
            else:
                self._is_written = False

    def forget(self, name: str) -> None:
        """A weight is not there after all."""
        del self.done[name]

    def remove(self) -> None:
        """All is written."""
        self._is_written = True  # nobody needs the rest of it
        self.close()
        self._file.unlink()

    def close(self) -> None:
        """Let go of it."""
        if self._stream is not None:
            self._stream.close()
        elif not self._is_written:
            # If not even this can be written, another error has said so.
            with contextlib.suppress(OSError):
                self._write_all()

    def _clear(self, directory: epath.Path) -> None:
        """Take away what another task, or an older conversion, left."""
        for entry in directory.iterdir():
            if entry.name != JOURNAL:
                entry.rmtree() if entry.is_dir() else entry.unlink()

    def _take_up(self) -> dict[str, str] | None:
        """What this task has done; None of another one, whose files are no use."""
        if not self._file.exists():
            return None
        task, *lines = self._file.read_bytes().split(b"\n")
        if task.decode() != self._task:
            return None
        # What follows the last line's end was being written when it stopped.
        unfinished = len(lines.pop()) if lines else 0
        if unfinished and self._stream is not None:
            self._stream.truncate(self._file.stat().length - unfinished)
        return dict(json.loads(line) for line in lines)

    def _write_all(self) -> None:
        lines = [self._task, *map(json.dumps, self.done.items())]
        text = "".join(f"{line}\n" for line in lines)
        if self._stream is not None:
            self._stream.truncate(0)
            self._stream.write(text)
            self._stream.flush()
        else:
            self._file.write_text(text)
            self._written_at = time.monotonic()
            self._is_written = True
