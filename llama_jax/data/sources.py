"""Where texts, dialogs, comparisons and prompts come from: data sets' rows, files.

A source is one shard of a corpus, read from its beginning as often as one likes and
never held in memory. `data.prepare` turns each into one file.
"""

import abc
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, get_args

from etils import epath

from llama_jax.config.data import Rating, Risk
from llama_jax.errors import DataError, DialogError
from llama_jax.text.chat import Learnt, Message, require_example

OnError = Literal["raise", "skip"]

_log = logging.getLogger(__name__)

# A document beyond this is more likely a broken line than a text: War and Peace has
# three million bytes.
MAX_DOCUMENT_BYTES = 10_000_000


class Documents(Protocol):
    """One shard of a corpus.

    Attributes:
      name: tells it from other shards, in errors and in `dataset.json`.
      num_skipped: rows that the last pass left out because they held no usable text.
    """

    name: str
    num_skipped: int

    def __iter__(self) -> Iterator[str]: ...


class Dialog(NamedTuple):
    """A conversation to learn from, which ends with an answer.

    Attributes:
      messages: as `text.chat` has them.
      learn: whether "all" answers are learnt or the "last" alone.
    """

    messages: Sequence[Message]
    learn: Learnt


class Dialogs(Protocol):
    """One shard of conversations; attributes as those of `Documents`."""

    name: str
    num_skipped: int

    def __iter__(self) -> Iterator[Dialog]: ...


class Comparison(NamedTuple):
    """Two answers to one question, and which of them a person preferred.

    Attributes:
      messages: the dialog up to the question, as `text.chat` has it.
      chosen: the better answer.
      rejected: the other.
      rating: how much better; None where nobody said.
      is_safe: whether the chosen and the rejected answer are safe; None where nobody
        said.
    """

    messages: Sequence[Message]
    chosen: str
    rejected: str
    rating: Rating | None
    is_safe: tuple[bool, bool] | None


class Comparisons(Protocol):
    """One shard of comparisons; attributes as those of `Documents`."""

    name: str
    num_skipped: int

    def __iter__(self) -> Iterator[Comparison]: ...


class Prompt(NamedTuple):
    """A question for a policy to answer.

    Attributes:
      messages: the dialog up to the question, as `text.chat` has it.
      about_safety: whether it is there to elicit unsafe answers, so that the safety
        score is the one that counts.
      risk: of which category that is, where it is known.
    """

    messages: Sequence[Message]
    about_safety: bool = False
    risk: Risk | None = None


class Prompts(Protocol):
    """One shard of prompts; attributes as those of `Documents`."""

    name: str
    num_skipped: int

    def __iter__(self) -> Iterator[Prompt]: ...


class _BadRowError(Exception):
    """What is wrong with a row; where it is, is added by who knows."""


_Item = TypeVar("_Item")


class _Rows(abc.ABC, Generic[_Item]):
    """Rows that each hold one item; a row without is an error, or is counted."""

    def __init__(self, name: str, *, on_error: OnError) -> None:
        self.name = name
        self.num_skipped = 0
        self._on_error = on_error

    def __iter__(self) -> Iterator[_Item]:
        self.num_skipped = 0
        for place, row in self._rows():
            try:
                item = self._item(row)
            except (_BadRowError, DialogError) as error:
                if self._on_error == "raise":
                    kind = DataError if isinstance(error, _BadRowError) else DialogError
                    raise kind(
                        f"{place}: {str(error).rstrip('.')}. Mend it, or leave such "
                        "rows out, counted, with on_error='skip' in Python."
                    ) from None
                self.num_skipped += 1
            else:
                yield item

    @abc.abstractmethod
    def _rows(self) -> Iterator[tuple[str, Any]]:
        """Each row, after the place to name in an error."""

    @abc.abstractmethod
    def _item(self, row: Any) -> _Item:
        """What a row holds.

        Raises:
          _BadRowError: nothing of use.
          DialogError: a conversation that is none.
        """


class Records(_Rows[str]):
    """Documents of a random-access data source, such as TFDS makes.

    Args:
      name: of this shard, for instance "c4/en train".
      records: `builder.as_data_source(split)`; the split may be a slice, so that a
        large one becomes many shards.
      field: of a record, that holds the text as a string or as UTF-8.
      on_error: what to do with a record that holds no usable text.
    """

    def __init__(
        self,
        name: str,
        records: Sequence[Mapping[str, Any]],
        *,
        field: str = "text",
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name, on_error=on_error)
        self._records = records
        self._field = field

    def _rows(self) -> Iterator[tuple[str, Any]]:
        for i in range(len(self._records)):
            yield f"{self.name}, record {i}", self._records[i]

    def _item(self, row: Any) -> str:
        return _field_text(row, self._field)


class _Lines(_Rows[_Item]):
    """Rows that are the lines of a file which are not blank, as bytes."""

    def __init__(self, path: epath.PathLike, *, on_error: OnError) -> None:
        super().__init__(str(path), on_error=on_error)
        self._path = epath.Path(path)

    def _rows(self) -> Iterator[tuple[str, Any]]:
        try:
            with self._path.open("rb") as file:
                number = 0
                while line := file.readline(MAX_DOCUMENT_BYTES + 1):
                    number += 1
                    rest = line
                    while len(rest) > MAX_DOCUMENT_BYTES and not rest.endswith(b"\n"):
                        rest = file.readline(MAX_DOCUMENT_BYTES + 1)
                    if line.strip():
                        yield f"{self.name}, line {number}", line
        except (OSError, ImportError) as error:
            raise _unreadable(self.name, error) from error


class JsonLines(_Lines[str]):
    """Documents of a JSONL file: one object a line, the text in one of its fields.

    Args:
      path: the file, on a disk or in a bucket (`gs://...`).
      field: of an object, that holds the text.
      on_error: what to do with a line that holds no usable text.
    """

    def __init__(
        self,
        path: epath.PathLike,
        *,
        field: str = "text",
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(path, on_error=on_error)
        self._field = field

    def _item(self, row: bytes) -> str:
        return _field_text(_json(row), self._field)


class DialogLines(_Lines[Dialog]):
    """Conversations of a JSONL file, {"messages": [...], "learn": "last"} a line.

    Without "learn", all answers are learnt.

    Args:
      path: the file, on a disk or in a bucket (`gs://...`).
      on_error: what to do with a line that holds no conversation to learn from.
    """

    def __init__(self, path: epath.PathLike, *, on_error: OnError = "raise") -> None:
        super().__init__(path, on_error=on_error)

    def _item(self, row: bytes) -> Dialog:
        content = _object(_json(row), "messages")
        learn = content.get("learn", "all")
        if learn not in get_args(Learnt):
            raise _BadRowError(f'"learn" is {learn!r:.60}: write "all" or "last"')
        return Dialog(_messages(content["messages"]), learn)


class ComparisonLines(_Lines[Comparison]):
    """Comparisons of a JSONL file, one a line.

    {"messages": [..., {"role": "user", ...}], "chosen": TEXT, "rejected": TEXT}, and,
    where they are known, "rating": one of `config.data.Rating`, and "chosen_is_safe"
    and "rejected_is_safe": true or false.

    Args:
      path: the file, on a disk or in a bucket (`gs://...`).
      on_error: what to do with a line that holds no comparison.
    """

    def __init__(self, path: epath.PathLike, *, on_error: OnError = "raise") -> None:
        super().__init__(path, on_error=on_error)

    def _item(self, row: bytes) -> Comparison:
        content = _json(row)
        question = _list(_object(content, "messages")["messages"])
        chosen = _field_text(content, "chosen")
        rejected = _field_text(content, "rejected")
        if chosen.strip() == rejected.strip():
            raise _BadRowError(
                "both answers are the same, so there is nothing to prefer"
            )
        rating = content.get("rating")
        if rating is not None and rating not in get_args(Rating):
            raise _BadRowError(
                f'"rating" is {rating!r:.60}: write one of '
                f"{', '.join(map(repr, get_args(Rating)))}, or leave it out"
            )
        for answer in (chosen, rejected):
            _messages([*question, {"role": "assistant", "content": answer}])
        return Comparison(question, chosen, rejected, rating, _safety_labels(content))


class PromptLines(_Lines[Prompt]):
    """Prompts of a JSONL file, {"messages": [... ends with the user]} a line.

    And, for those that are there to elicit unsafe answers, "about_safety": true; for
    these, where it is known, "risk": one of `config.data.Risk`.

    Args:
      path: the file, on a disk or in a bucket (`gs://...`).
      on_error: what to do with a line that holds no prompt.
    """

    def __init__(self, path: epath.PathLike, *, on_error: OnError = "raise") -> None:
        super().__init__(path, on_error=on_error)

    def _item(self, row: bytes) -> Prompt:
        content = _object(_json(row), "messages")
        messages = _list(content["messages"])
        about_safety = content.get("about_safety", False)
        if not isinstance(about_safety, bool):
            raise _BadRowError(
                f'"about_safety" is {about_safety!r:.60}: write true or false, or '
                "leave it out"
            )
        risk = content.get("risk")
        if risk is not None and (not about_safety or risk not in get_args(Risk)):
            raise _BadRowError(
                f'"risk" is {risk!r:.60}: beside "about_safety": true, write one of '
                f"{', '.join(map(repr, get_args(Risk)))}, or leave it out"
            )
        _messages([*messages, {"role": "assistant", "content": "?"}])
        return Prompt(messages, about_safety, risk)


class TextFiles(_Rows[str]):
    """Documents that are whole files.

    Args:
      name: of this shard.
      paths: the files, on a disk or in a bucket (`gs://...`).
      on_error: what to do with a file that holds no usable text.
    """

    def __init__(
        self,
        name: str,
        paths: Iterable[epath.PathLike],
        *,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name, on_error=on_error)
        self._paths = [epath.Path(path) for path in paths]

    def _rows(self) -> Iterator[tuple[str, Any]]:
        for path in self._paths:
            try:
                with path.open("rb") as file:
                    content = file.read(MAX_DOCUMENT_BYTES + 1)
            except (OSError, ImportError) as error:
                raise _unreadable(str(path), error) from error
            yield str(path), content

    def _item(self, row: bytes) -> str:
        _require_size(row)
        return _usable(_decode(row))


def files(paths: Iterable[epath.PathLike]) -> list[Documents]:
    """One source for each file: JSONL by its ending, else one document.

    Raises:
      DataError: a file does not exist.
    """
    return [
        JsonLines(path) if _is_jsonl(path) else TextFiles(str(path), [path])
        for path in map(_existing, paths)
    ]


def dialog_files(paths: Iterable[epath.PathLike]) -> list[Dialogs]:
    """One source for each file, all of which are JSONL.

    Empty files beside others are left out: where a model writes what is learnt, as in
    `llama-jax sample ghost`, there may be no dialog in a part of it.

    Raises:
      DataError: a file does not exist, or has another ending.
    """
    form = '{"messages": [{"role": "user", "content": ...}, ...]}'
    found = [_jsonl(path, "dialogs", form) for path in paths]
    filled = [path for path in found if not _is_empty(path)]
    if filled and len(filled) < len(found):
        empty = ", ".join(str(path) for path in found if path not in filled)
        _log.warning("No dialog in %s: left out.", empty)
    return [DialogLines(path) for path in filled or found]


def comparison_files(paths: Iterable[epath.PathLike]) -> list[Comparisons]:
    """One source for each file, all of which are JSONL.

    Raises:
      DataError: a file does not exist, or has another ending.
    """
    form = '{"messages": [...], "chosen": ..., "rejected": ...}'
    return [ComparisonLines(_jsonl(path, "comparisons", form)) for path in paths]


def prompt_files(paths: Iterable[epath.PathLike]) -> list[Prompts]:
    """One source for each file, all of which are JSONL.

    Raises:
      DataError: a file does not exist, or has another ending.
    """
    form = '{"messages": [..., {"role": "user", "content": ...}]}'
    return [PromptLines(_jsonl(path, "prompts", form)) for path in paths]


def _jsonl(path: epath.PathLike, what: str, form: str) -> epath.Path:
    path = _existing(path)
    if not _is_jsonl(path):
        raise DataError(
            f"{path} is no .jsonl file: {what} are objects, one a line, as {form}."
        )
    return path


def _existing(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path)
    if "://" not in str(path) and not path.is_file():
        raise DataError(f"{path} is no file: check the path.")
    return path


def _is_jsonl(path: epath.Path) -> bool:
    return path.suffix in (".jsonl", ".ndjson")


def _is_empty(path: epath.Path) -> bool:
    """Whether a file holds nothing; one that cannot be looked at will say so later."""
    try:
        return path.stat().length == 0
    except (OSError, ImportError):
        return False


def _json(row: bytes) -> Any:
    _require_size(row)
    try:
        return json.loads(_decode(row))
    except ValueError as error:  # JSONDecodeError, and numbers of too many digits
        raise _BadRowError(f"it is not JSON ({error})") from None
    except RecursionError:
        raise _BadRowError("its JSON is nested too deeply") from None


def _object(row: Any, field: str) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise _BadRowError(f"it is {type(row).__name__}, not an object with {field!r}")
    if field not in row:
        raise _BadRowError(
            f"the field {field!r} is missing; it has {', '.join(map(repr, row))}"
        )
    return row


def _messages(messages: Any) -> Sequence[Message]:
    """A dialog that ends with an answer, all of it usable text."""
    require_example(_list(messages))
    for number, message in enumerate(messages, start=1):
        try:
            _usable(message["content"])
        except _BadRowError as error:
            raise _BadRowError(f"message {number}: {error}") from None
    return messages


def _list(messages: Any) -> list[Any]:
    if not isinstance(messages, list):
        raise _BadRowError(
            f"the field 'messages' is {type(messages).__name__}, not a list"
        )
    return messages


def _safety_labels(row: Mapping[str, Any]) -> tuple[bool, bool] | None:
    chosen, rejected = row.get("chosen_is_safe"), row.get("rejected_is_safe")
    if chosen is None and rejected is None:
        return None
    if not (isinstance(chosen, bool) and isinstance(rejected, bool)):
        raise _BadRowError(
            f'"chosen_is_safe" is {chosen!r:.60} and "rejected_is_safe" '
            f"{rejected!r:.60}: write true or false for both, or leave both out"
        )
    return chosen, rejected


def _field_text(row: Any, field: str) -> str:
    text = _object(row, field)[field]
    if isinstance(text, bytes):
        return _usable(_decode(text))
    if not isinstance(text, str):
        raise _BadRowError(f"the field {field!r} is {type(text).__name__}, not text")
    return _usable(text)


def _decode(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadRowError(
            f"byte {error.start} is {text[error.start]:#04x}, which is not UTF-8 there"
        ) from None


def _require_size(row: bytes) -> None:
    if len(row) > MAX_DOCUMENT_BYTES:
        raise _BadRowError(f"it is longer than {MAX_DOCUMENT_BYTES:,} bytes")


def _usable(text: str) -> str:
    if not text.strip():
        raise _BadRowError("the text is empty")
    if "\0" in text:
        raise _BadRowError(
            f"character {text.index(chr(0))} is NUL, so this is not text"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadRowError(
            f"character {error.start} is a lone surrogate, half of a character"
        ) from None
    return text


def _unreadable(name: str, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{name} does not exist: check the path.")
    if isinstance(error, ImportError):
        return DataError(
            f"{name} is in a bucket, and the package that reads it is not installed "
            f"({error}): pip install 'llama-jax[gcs]'."
        )
    return DataError(f"{name} cannot be read: {error}.")
