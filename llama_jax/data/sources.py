"""Where documents come from: rows of a data set, JSONL files, text files.

A source is one shard of a corpus, read from its beginning as often as one likes and
never held in memory. `data.prepare` turns each into one file.
"""

import abc
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from etils import epath

from llama_jax.errors import DataError

OnError = Literal["raise", "skip"]

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


class _BadRowError(Exception):
    """What is wrong with a row; where it is, is added by who knows."""


class _Rows(abc.ABC):
    """Rows that each hold one text; a row without is an error, or is counted."""

    def __init__(self, name: str, *, on_error: OnError) -> None:
        self.name = name
        self.num_skipped = 0
        self._on_error = on_error

    def __iter__(self) -> Iterator[str]:
        self.num_skipped = 0
        for place, row in self._rows():
            try:
                text = self._text(row)
                _require_usable(text)
            except _BadRowError as error:
                if self._on_error == "raise":
                    raise DataError(
                        f"{place}: {error}. Mend it, or leave such rows out, counted, "
                        "with on_error='skip'."
                    ) from None
                self.num_skipped += 1
            else:
                yield text

    @abc.abstractmethod
    def _rows(self) -> Iterator[tuple[str, Any]]:
        """Each row, after the place to name in an error."""

    @abc.abstractmethod
    def _text(self, row: Any) -> str:
        """The text of a row.

        Raises:
          _BadRowError: it has none.
        """


class Records(_Rows):
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

    def _text(self, row: Any) -> str:
        return _field_text(row, self._field)


class JsonLines(_Rows):
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
        super().__init__(str(path), on_error=on_error)
        self._path = epath.Path(path)
        self._field = field

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

    def _text(self, row: bytes) -> str:
        _require_size(row)
        try:
            content = json.loads(_decode(row))
        except json.JSONDecodeError as error:
            raise _BadRowError(f"it is not JSON ({error})") from None
        except RecursionError:
            raise _BadRowError("its JSON is nested too deeply") from None
        return _field_text(content, self._field)


class TextFiles(_Rows):
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

    def _text(self, row: bytes) -> str:
        _require_size(row)
        return _decode(row)


def files(paths: Iterable[epath.PathLike]) -> list[Documents]:
    """One source for each file: JSONL by its ending, else one document.

    Raises:
      DataError: a file does not exist.
    """
    sources: list[Documents] = []
    for path in map(epath.Path, paths):
        if "://" not in str(path) and not path.is_file():
            raise DataError(f"{path} is no file: check the path.")
        jsonl = path.suffix in (".jsonl", ".ndjson")
        sources.append(JsonLines(path) if jsonl else TextFiles(str(path), [path]))
    return sources


def _field_text(row: Any, field: str) -> str:
    if not isinstance(row, Mapping):
        raise _BadRowError(f"it is {type(row).__name__}, not an object with {field!r}")
    if field not in row:
        raise _BadRowError(
            f"the field {field!r} is missing; it has {', '.join(map(repr, row))}"
        )
    text = row[field]
    if isinstance(text, bytes):
        return _decode(text)
    if not isinstance(text, str):
        raise _BadRowError(f"the field {field!r} is {type(text).__name__}, not text")
    return text


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


def _require_usable(text: str) -> None:
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


def _unreadable(name: str, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{name} does not exist: check the path.")
    if isinstance(error, ImportError):
        return DataError(
            f"{name} is in a bucket, and the package that reads it is not installed "
            f"({error}): pip install 'llama-jax[gcs]'."
        )
    return DataError(f"{name} cannot be read: {error}.")
