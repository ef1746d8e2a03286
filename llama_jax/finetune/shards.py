"""Work of hours on numbered items, kept on disk: what is killed goes on where it was.

A directory holds a manifest, which says what was asked, of which models, and files,
each with the lines that a batch of items became:

    DIR/iteration.json
    DIR/rollouts-00000-of-00012.jsonl

A file appears whole or not at all, and one that is there is not made again. So what
an item becomes may depend on its number, and not on the others of its file.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from etils import epath

from llama_jax.checkpoint.params import is_remote, place
from llama_jax.errors import ConfigError, DataError
from llama_jax.text.chat import Message
from sharding import hosts

_Parsed = TypeVar("_Parsed")

# Told the items that are done, and how many there are.
Watch = Callable[[int, int], None]

_BATCH = "batch_size"
# A network file system may remember for a while that something was not there.
_SECONDS_TO_SHOW = 90


class Kind(NamedTuple):
    """What a directory is for.

    Attributes:
      article: of the noun.
      noun: what errors call it.
      manifest: the file that says what was asked.
      files: the first part of the names of all others.
      count: of items, as the manifest calls it.
      facts: what else a manifest must say to be one.
    """

    article: str
    noun: str
    manifest: str
    files: str
    count: str
    facts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Shards:
    """A directory of such work, done or not.

    Attributes:
      kind: what it is for.
      path: the directory.
      plan: what was asked: the manifest's content, with "batch_size", items in a file.
    """

    kind: Kind
    path: epath.Path
    plan: Mapping[str, Any]

    @property
    def num_items(self) -> int:
        """Items in all."""
        return self.plan[self.kind.count]

    @property
    def num_files(self) -> int:
        """Files in all, made or not."""
        return -(-self.num_items // self.plan[_BATCH])

    def file(self, number: int) -> epath.Path:
        """Where the lines of a batch are."""
        name = f"{self.kind.files}-{number:05}-of-{self.num_files:05}.jsonl"
        return self.path / name

    def items(self, number: int) -> range:
        """The numbers of the items of a file."""
        size = self.plan[_BATCH]
        return range(self.num_items)[number * size : (number + 1) * size]

    def finished(self) -> list[int]:
        """The numbers of the files that are there."""
        return [n for n in range(self.num_files) if self.file(n).exists()]

    def read(self, number: int, parse: Callable[[str], _Parsed]) -> list[_Parsed]:
        """What the lines of a file say.

        Raises:
          DataError: it is damaged.
        """
        path = self.file(number)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            return [parse(line) for line in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(path, f"{type(error).__name__}: {error}") from error

    def lines(self, parse: Callable[[str], _Parsed]) -> Iterator[_Parsed]:
        """What the lines of all files say, in order.

        Raises:
          DataError: a file is missing or damaged.
        """
        for number in range(self.num_files):
            yield from self.read(number, parse)

    def complete(self, make: Callable[[range], Iterable[str]], watch: Watch) -> None:
        """Make the files that are missing.

        On several hosts all of them call this, and see one directory, to which the
        first one writes.

        Args:
          make: the lines that items become, given their numbers.
          watch: told the items that are done, and how many there are.

        Raises:
          DataError: the directory has files that were asked for otherwise, or others;
            its manifest is damaged; it cannot be written, or hosts do not share it.
          ShardingError: hosts see different files.
        """
        with hosts.failing_together():
            is_begun = self._require_plan()
            finished = self.finished()
        hosts.require_agreement(plan=self.plan, finished=finished, is_begun=is_begun)
        if not is_begun:
            manifest = self.path / self.kind.manifest
            write(manifest, json.dumps(self.plan, indent=2) + "\n")
            with hosts.failing_together():
                _require_shared(manifest)
        for number in range(self.num_files):
            items = self.items(number)
            if number not in finished:
                write(self.file(number), "".join(make(items)))
            watch(items.stop, self.num_items)

    def _require_plan(self) -> bool:
        """Whether the directory was begun with this plan; it has no other one."""
        kind, directory = self.kind, self.path
        plan = read_plan(kind, directory)
        if plan is None:
            if directory.exists() and any(
                not path.name.startswith(".") for path in directory.iterdir()
            ):
                raise DataError(
                    f"{directory} holds other files: give each {kind.noun} a directory "
                    "of its own, which need not exist."
                )
            return False
        changes = [
            f"{name} was {plan.get(name)!r} and is {value!r}"
            for name, value in self.plan.items()
            if plan.get(name) != value
        ]
        if changes and not Shards(kind, directory, plan).finished():
            return False  # what was asked made nothing: it may not have fitted
        if changes:
            raise DataError(
                f"{directory} holds {kind.article} {kind.noun} that was begun "
                f"otherwise: {'; '.join(changes)}. Choose another directory, or go on "
                "as it began."
            )
        return True


class Written(NamedTuple):
    """Rows to learn from, on disk and whole.

    Attributes:
      path: the directory, whose files `data.DialogLines` reads.
      num_items: what they were made of.
      num_rows: how many came of it.
    """

    path: epath.Path
    num_items: int
    num_rows: int


def write_rows(
    kind: Kind,
    directory: epath.PathLike,
    plan: Mapping[str, Any],
    make: Callable[[range], Iterable[Mapping[str, Any]]],
    watch: Watch,
) -> Written:
    """Write rows to learn from, or go on with that, or find it done.

    An item becomes a row, or none.

    Args:
      kind: of directory.
      directory: for these rows, and no other.
      plan: what is asked, of which models.
      make: the rows of some items, given their numbers.
      watch: told the items that are done, and how many there are.

    Raises:
      CheckpointError: the directory is in a bucket that cannot be reached.
      DataError, ShardingError: as `Shards.complete`; or a file is damaged.
    """
    shards = Shards(kind, place(directory), plan)
    shards.complete(lambda items: map(line, make(items)), watch)
    with hosts.failing_together():
        num_rows = sum(1 for _ in shards.lines(json.loads))
    return Written(shards.path, shards.num_items, num_rows)


def open_done(kind: Kind, path: epath.PathLike) -> Shards:
    """A directory of some kind, whose files are all there.

    Raises:
      CheckpointError: it is in a bucket that cannot be reached.
      DataError: it is of another kind, or is not done.
    """
    directory = place(path)
    plan = read_plan(kind, directory)
    if plan is None:
        raise DataError(f"{path} is no {kind.noun}: it has no {kind.manifest}.")
    shards = Shards(kind, directory, plan)
    if missing := shards.num_files - len(shards.finished()):
        raise DataError(
            f"{path} is not done: {missing} of its {shards.num_files} files are "
            "missing. Sample it again with the same settings, and it goes on."
        )
    return shards


def read_plan(kind: Kind, directory: epath.Path) -> dict[str, Any] | None:
    """What the manifest of a directory says; None if it has none.

    Raises:
      DataError: it is damaged.
    """
    path = directory / kind.manifest
    try:
        plan = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
    if plan is not None:
        counts = (kind.count, _BATCH)
        if not isinstance(plan, dict) or not {*counts, *kind.facts} <= plan.keys():
            raise damaged(path, "it is not what was written")
        if not all(type(plan[name]) is int and plan[name] > 0 for name in counts):
            raise damaged(path, f"it counts no {kind.count.removeprefix('num_')}")
    return plan


def write(path: epath.Path, content: str) -> None:
    """A file, whole or not at all, also if power fails; the first host writes.

    Raises:
      DataError: it cannot be written.
      ShardingError: on the other hosts, if the first one cannot.
    """
    with hosts.failing_together():
        if jax.process_index() != 0:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if is_remote(path):  # where objects appear whole
                path.write_text(content, encoding="utf-8")
                return
            partial = path.parent / f".{path.name}.partial"
            with open(partial, "w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error}.") from error


def _require_shared(path: epath.Path) -> None:
    """Every host sees what the first one wrote, once its file system has told it."""
    for _ in range(_SECONDS_TO_SHOW):
        if path.exists():
            return
        time.sleep(1)
    raise DataError(
        f"{path} was written by the first host, and host {jax.process_index()} does "
        "not see it: choose a directory that all hosts share."
    )


def line(row: Mapping[str, Any]) -> str:
    """A line of a file."""
    return json.dumps(row) + "\n"


def digest(content: Any) -> str:
    """What tells one list of prompts, or anything that JSON can hold, from another."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def digest_dialogs(dialogs: Iterable[Sequence[Message]]) -> str:
    """`digest` of what dialogs say, whatever else their messages hold."""
    return digest([plain(dialog) for dialog in dialogs])


def plain(dialog: Sequence[Message]) -> list[dict[str, str]]:
    """A dialog as a file has it."""
    return [
        {"role": message["role"], "content": message["content"]} for message in dialog
    ]


def damaged(path: epath.Path, problem: str) -> DataError:
    """The error of a file that is not as it was written."""
    what = path if path.suffix == ".jsonl" else path.parent
    return DataError(
        f"{path} is damaged ({problem}): remove {what}, and sample again, which makes "
        "it anew."
    )


def require_counts(**counts: int) -> None:
    """Check settings that count.

    Raises:
      ConfigError: one is no positive integer.
    """
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} is {value!r}: give an integer of 1 or more.")
