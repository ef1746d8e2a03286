"""Progress of what reads and writes: a bar where one can be drawn, else plain lines."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def bytes_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A function that takes a phase, bytes done and bytes in all, and shows them."""
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        if console.is_terminal:
            bar = stack.enter_context(
                Progress(
                    TextColumn("{task.description:8}"),
                    BarColumn(),
                    DownloadColumn(),
                    TransferSpeedColumn(),
                    TextColumn("left"),
                    TimeRemainingColumn(),
                    console=console,
                )
            )
            tasks: dict[str, TaskID] = {}

            def watch(phase: str, done: int, total: int) -> None:
                if phase not in tasks:
                    tasks[phase] = bar.add_task(phase, total=total)
                bar.update(tasks[phase], completed=done)
        else:
            started = time.monotonic()
            last_line = started

            def watch(phase: str, done: int, total: int) -> None:
                nonlocal last_line
                now = time.monotonic()
                if now - last_line >= _SECONDS_BETWEEN_LINES:
                    last_line = now
                    seconds = now - started
                    console.print(
                        f"{phase}: {done / 1e9:.2f} of {total / 1e9:.2f} GB after "
                        f"{seconds:.0f} s, {done / 1e9 / seconds:.2f} GB/s",
                        highlight=False,
                    )

        yield watch
