"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Watch = Callable[[dict[str, Any]], None]

_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def training_progress(num_steps: int) -> Iterator[Watch]:
    """A function that takes the records of a run and shows how far it is."""
    console = Console()
    with contextlib.ExitStack() as stack:
        if console.is_terminal:
            bar = stack.enter_context(
                Progress(
                    TextColumn("step"),
                    MofNCompleteColumn(),
                    BarColumn(),
                    TextColumn("{task.description}"),
                    TimeElapsedColumn(),
                    TextColumn("left"),
                    TimeRemainingColumn(),
                    console=console,
                )
            )
            task = bar.add_task("", total=num_steps)

            def show(record: dict[str, Any]) -> None:
                bar.update(task, completed=record["step"], description=_text(record))
        else:
            last_line = -_SECONDS_BETWEEN_LINES

            def show(record: dict[str, Any]) -> None:
                nonlocal last_line
                now = time.monotonic()
                if now - last_line >= _SECONDS_BETWEEN_LINES:
                    last_line = now
                    step = record["step"]
                    print(f"step {step}/{num_steps}  {_text(record)}", flush=True)

        def watch(record: dict[str, Any]) -> None:
            if record.get("loss") is not None:
                show(record)
            elif "validation_loss" in record:
                console.print(
                    f"step {record['step']}: validation loss "
                    f"{record['validation_loss']:.4f} {_unit(record)}",
                    highlight=False,
                )
            elif "iteration" in record:
                console.print(
                    f"iteration {record['iteration']}: reward {record['reward']:.4f}, "
                    f"divergence {record['kl']:.2f} nats an answer of "
                    f"{record['answer_length']:.0f} tokens; "
                    f"{record['answer_seconds']:.1f} s to answer, "
                    f"{record['reshard_seconds']:.1f} of them to copy the policy",
                    highlight=False,
                    soft_wrap=True,
                )
            elif "validation_reward" in record:
                console.print(
                    f"step {record['step']}: reward of held-out prompts "
                    f"{record['validation_reward']:.4f}, divergence "
                    f"{record['validation_kl']:.2f} nats",
                    highlight=False,
                )
            elif "time_shares" in record:
                shares = record["time_shares"].items()
                console.print(
                    "time: " + ", ".join(f"{kind} {part:.1%}" for kind, part in shares),
                    highlight=False,
                )

        yield watch


def _unit(record: dict[str, Any]) -> str:
    if "accuracy" in record:
        return f"nats per pair, {record['accuracy']:.1%} of pairs in order"
    return "nats per token"


def _text(record: dict[str, Any]) -> str:
    parts = [
        f"loss {record['loss']:.4f}",
        f"gradient {record['grad_norm'] or 0:.2f}",
        f"lr {record['learning_rate']:.2e}",
    ]
    if record["tokens_per_second"] is not None:
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if record["mfu"] is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    return "  ".join(parts)


@contextlib.contextmanager
def counting_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function that takes how many are done, and of how many, and shows it.

    Args:
      what: is counted, as "prompts".
    """
    console = Console()
    with contextlib.ExitStack() as stack:
        if console.is_terminal:
            bar = stack.enter_context(
                Progress(
                    TextColumn(what),
                    MofNCompleteColumn(),
                    BarColumn(),
                    TimeElapsedColumn(),
                    TextColumn("left"),
                    TimeRemainingColumn(),
                    console=console,
                )
            )
            task = bar.add_task("", total=None)

            def watch(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)
        else:
            started = last_line = time.monotonic()

            def watch(done: int, total: int) -> None:
                nonlocal last_line
                now = time.monotonic()
                if now - last_line >= _SECONDS_BETWEEN_LINES or done == total:
                    last_line = now
                    print(
                        f"{what} {done}/{total} after {now - started:.0f} s", flush=True
                    )

        yield watch
