"""What a run tells: JSON lines, TensorBoard, and whatever watches it."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

import jax
from etils import epath
from tensorboardX import SummaryWriter

from llama_jax.config.recipe import TrainingRecipe
from llama_jax.errors import TrainingError
from llama_jax.model.count import train_flops_per_token
from llama_jax.train.step import Measured

_log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"

# Peak bfloat16 FLOP/s of one chip, by JAX's name of it (public data sheets).
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}

Record = dict[str, Any]
Item = TypeVar("Item")


class Stopwatch:
    """Where the time of a run goes."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._spent = dict.fromkeys(("compile", "data", "save", "validate"), 0.0)

    @contextlib.contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Count what happens inside as time of this kind."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[kind] += time.perf_counter() - start

    def compiling(self, first: bool) -> contextlib.AbstractContextManager[None]:
        """Count the first step as time of the kind "compile", which is most of it."""
        return self.measure("compile") if first else contextlib.nullcontext()

    def waiting(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; waiting for the next one is time of the kind "data"."""
        iterator = iter(items)
        while True:
            with self.measure("data"):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def shares(self) -> dict[str, float]:
        """The share of each kind; "step" is what is left, the goodput."""
        total = max(time.perf_counter() - self._start, 1e-9)
        shares = {kind: spent / total for kind, spent in self._spent.items()}
        return {"step": 1.0 - sum(shares.values()), **shares}


class Sink:
    """Takes measurements as they come, and reads the device one step late.

    So the host never waits for the step that it has just started.

    Args:
      workdir: gets `metrics.jsonl` and `tensorboard/`, written by host 0.
      recipe: of the run.
      start_step: steps done before; what an earlier, killed process logged beyond
        them is taken out, since those steps are done anew.
      watch: called with every record, for progress bars.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        recipe: TrainingRecipe,
        *,
        start_step: int,
        watch: Callable[[Record], None],
    ) -> None:
        self._recipe = recipe
        self._watch = watch
        self._pending: tuple[int, Measured] | None = None
        self._last_read: float | None = None
        self._flops_per_token = train_flops_per_token(
            recipe.model, recipe.data.sequence_length, recipe.head
        )
        self._peak = _peak_flops()
        is_first = jax.process_index() == 0
        self._files = _Files(epath.Path(workdir), start_step) if is_first else None

    def __enter__(self) -> Self:
        """The same."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what is still held, unless the run has failed."""
        if kind is None:
            self.flush()
        if self._files is not None:
            self._files.close()

    def record(self, step: int, measured: Measured) -> None:
        """Take the measurements of a step; write those of the one before.

        Raises:
          TrainingError: the one before was bad, and the recipe says to stop.
        """
        before, self._pending = self._pending, (step, measured)
        if before is not None:
            self._write_step(*before)

    def flush(self) -> None:
        """Write the step that is still held, before other work. Raises as `record`."""
        before, self._pending = self._pending, None
        if before is not None:
            self._write_step(*before)
        self._last_read = None
        if self._files is not None:
            self._files.flush()

    def write(self, step: int, **values: Any) -> None:
        """Write any other values of a step."""
        record = {"step": step, **values}
        if self._files is not None:
            self._files.write(record)
        self._watch(record)

    def lacks(self, step: int, name: str) -> bool:
        """Whether a value of a step was never written; the first host knows."""
        return self._files is not None and self._files.lacks(step, name)

    def _write_step(self, step: int, measured: Measured) -> None:
        read: Measured = jax.device_get(measured)
        now = time.perf_counter()
        rate = mfu = None
        if self._last_read is not None:  # else compiling, or other work, would count
            train = self._recipe.train
            tokens = train.batch_size * self._recipe.data.sequence_length
            rate = tokens / (now - self._last_read)
            if self._peak is not None:
                mfu = rate * self._flops_per_token / self._peak
        self._last_read = now
        self.write(
            step,
            loss=_finite(read.loss),
            grad_norm=_finite(read.grad_norm),
            learning_rate=float(read.learning_rate),
            num_targets=float(read.num_targets),
            applied=bool(read.applied),
            tokens_per_second=rate,
            mfu=mfu,
        )
        if not read.applied:
            bad = (
                f"step {step}: loss {float(read.loss)}, gradient norm "
                f"{float(read.grad_norm)}. The update was not applied"
            )
            if self._recipe.train.on_bad_step == "skip":
                _log.warning("%s; going on with the next step.", bad)
                return
            raise TrainingError(
                f"{bad} and the last checkpoint is good. Look at the data of this "
                "step, lower --optimizer.peak-lr, or go on past such steps with "
                "--train.on-bad-step skip."
            )


class _Files:
    """`metrics.jsonl` and `tensorboard/`, without what was logged after a step."""

    def __init__(self, workdir: epath.Path, start_step: int) -> None:
        self._path = workdir / METRICS
        kept = _records_up_to(self._path, start_step)
        self._lines = [json.dumps(record) + "\n" for record in kept]
        self._appends = "://" not in str(self._path)  # a bucket cannot
        self._rewrite()
        self._board = SummaryWriter(
            str(workdir / TENSORBOARD), purge_step=start_step + 1
        )

    def write(self, record: Record) -> None:
        self._lines.append(json.dumps(record) + "\n")
        if self._appends:
            with self._path.open("a") as file:
                file.write(self._lines[-1])
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, record["step"])

    def lacks(self, step: int, name: str) -> bool:
        records = map(json.loads, self._lines)
        return not any(r["step"] == step and name in r for r in records)

    def flush(self) -> None:
        if not self._appends:
            self._rewrite()

    def close(self) -> None:
        self._board.close()

    def _rewrite(self) -> None:
        """All lines at once, so that a kill leaves the old file or the new one."""
        partial = self._path.parent / f".{METRICS}.partial"
        partial.write_text("".join(self._lines))
        partial.replace(self._path)


def _finite(value: Any) -> float | None:
    """A number as JSON has it: no NaN and no infinity there."""
    return float(value) if math.isfinite(value) else None


def _peak_flops() -> float | None:
    """Of all devices together; None for a kind whose peak is not known, as a CPU's."""
    peak = _PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if peak is None else peak * jax.device_count()


def read_metrics(path: epath.PathLike) -> list[Record]:
    """All records of a `metrics.jsonl`; a last line cut by a kill is left out."""
    path = epath.Path(path)
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def _records_up_to(path: epath.Path, step: int) -> list[Record]:
    return [record for record in read_metrics(path) if record["step"] <= step]
