"""A prepared data set: packed rows of token ids in ArrayRecord files.

    DIR/dataset.json                      what it holds, below
    DIR/tokenizer.model                   what its ids mean
    DIR/SPLIT-00000-of-00004.array_record  rows, one record each, little-endian

Documents are cut into rows, of which the last of a shard may be shorter than the
others; a record is its ids. Dialogs and comparisons stay whole, and leave room at the
ends of rows; a record has for each token the id and whether a dialog begins; of
dialogs, whether it is learnt; of comparisons, whether an answer ends, and which.
Prompts have a row each; a record has for each token the id and what the prompt is
about.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

import grain
import numpy as np

from llama_jax.config.data import Rating
from llama_jax.errors import DataError

MANIFEST = "dataset.json"
TOKENIZER = "tokenizer.model"
FORMAT = 1

Kind = Literal["documents", "dialogs", "comparisons", "prompts"]

# Of the last token of an answer, in a record of comparisons; 0 at all other tokens.
CHOSEN, REJECTED = 1, 2
UNSAFE, SAFE = 1, 2  # 0 where nobody said
# By number: how much better the chosen answer is. The last is where nobody said.
RATINGS: tuple[Rating | None, ...] = (*get_args(Rating), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of rows, made of one source.

    Attributes:
      file: its name in the directory.
      source: the name of the source.
      file_bytes: its size.
      sha256: of the records, one after the other.
      num_rows: records.
      num_documents: documents, dialogs, comparisons or prompts in the rows.
      num_skipped: rows of the source that held no usable text.
      text_bytes: UTF-8 of the documents, without BOS and EOS; of dialogs, of the
        answers that are learnt; of comparisons, of both answers; of prompts, of all
        messages.
      num_tokens: of the documents, BOS and EOS included; of the dialogs.
      num_targets: what its rows teach. Of documents, all tokens but the first, and but
        those left over in a split whose tail is dropped; of dialogs, the tokens
        learnt; of comparisons and prompts, those themselves.
      num_too_long: dialogs, comparisons or prompts that do not fit a row, and were left
        out.
      num_unsafe_chosen: comparisons left out because the chosen answer is unsafe and
        the other is safe (section 3.2.1).
    """

    file: str
    source: str
    file_bytes: int
    sha256: str
    num_rows: int
    num_documents: int
    num_skipped: int
    text_bytes: int
    num_tokens: int
    num_targets: int
    num_too_long: int = 0
    num_unsafe_chosen: int = 0


@dataclasses.dataclass(frozen=True)
class Split:
    """Shards that are read together; counts are sums over them."""

    shards: tuple[Shard, ...]

    @property
    def num_rows(self) -> int:
        """Rows of `row_length` + 1 tokens, or fewer at a shard's end."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def num_documents(self) -> int:
        """Documents, dialogs, comparisons or prompts in the rows."""
        return sum(shard.num_documents for shard in self.shards)

    @property
    def num_skipped(self) -> int:
        """Rows of the sources that held no usable text."""
        return sum(shard.num_skipped for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """UTF-8 of the documents: what bits per byte are divided by."""
        return sum(shard.text_bytes for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens of what is in the rows, BOS and EOS included."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_targets(self) -> int:
        """Tokens, comparisons or prompts that are taught."""
        return sum(shard.num_targets for shard in self.shards)

    @property
    def num_too_long(self) -> int:
        """Dialogs, comparisons or prompts left out, as they do not fit a row."""
        return sum(shard.num_too_long for shard in self.shards)

    @property
    def num_unsafe_chosen(self) -> int:
        """Comparisons left out because the unsafe answer was chosen of two."""
        return sum(shard.num_unsafe_chosen for shard in self.shards)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `dataset.json` says, and where.

    Attributes:
      path: the directory.
      tokenizer: digest of the tokenizer that made the ids.
      vocab_size: pieces of that tokenizer.
      bos_id: the id that opens a document.
      row_length: tokens that a row lets a model read at once.
      splits: by name.
      kind: what the rows are made of.
      room: of prompts, tokens of its row that each leaves for an answer.
    """

    path: Path
    tokenizer: str
    vocab_size: int
    bos_id: int
    row_length: int
    splits: Mapping[str, Split]
    kind: Kind = "documents"
    room: int = 0

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what a directory holds; its rows stay on the disk.

        Raises:
          DataError: it was not written by `prepare`, or is damaged.
        """
        path = local(path)
        manifest = path / MANIFEST
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"{path} holds no prepared data: {MANIFEST} is missing. Check the "
                "path, or prepare the data."
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{manifest} cannot be read: {error}.") from error
        try:
            if content["format"] != FORMAT:
                raise DataError(
                    f"{manifest} is of format {content['format']!r}, and this version "
                    f"reads {FORMAT}: prepare the data again."
                )
            return cls(
                path=path,
                tokenizer=content["tokenizer"],
                vocab_size=content["vocab_size"],
                bos_id=content["bos_id"],
                row_length=content["row_length"],
                splits={
                    name: Split(tuple(Shard(**shard) for shard in shards))
                    for name, shards in content["splits"].items()
                },
                kind=content.get("kind", "documents"),
                room=content.get("room", 0),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{manifest} is damaged ({type(error).__name__}: {error}): prepare the "
                "data again."
            ) from error

    def write(self, directory: Path) -> None:
        """Write `dataset.json` into a directory."""
        (directory / MANIFEST).write_text(
            json.dumps(self._to_json(), indent=1), encoding="utf-8"
        )

    @property
    def digest(self) -> str:
        """The same digest, the same rows: a sha256 of all that `dataset.json` says."""
        return hashlib.sha256(json.dumps(self._to_json()).encode()).hexdigest()

    def _to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "tokenizer": self.tokenizer,
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "row_length": self.row_length,
            "kind": self.kind,
            "room": self.room,
            "splits": {
                name: [dataclasses.asdict(shard) for shard in split.shards]
                for name, split in self.splits.items()
            },
        }

    def require_tokenizer(self, digest: str) -> None:
        """Check that a run's tokenizer is the one that made these ids.

        Raises:
          DataError: it is another.
        """
        if digest != self.tokenizer:
            raise DataError(
                f"{self.path} was made with another tokenizer (sha256 "
                f"{self.tokenizer[:12]}…, not {digest[:12]}…), so its ids mean other "
                "text: give that tokenizer, or prepare the data with yours."
            )

    def rows(self, split: str) -> "Rows":
        """The rows of a split, opened.

        Raises:
          DataError: no such split, or a shard is missing, empty or truncated.
        """
        if split not in self.splits:
            raise DataError(
                f"{self.path} has no split {split!r}: it has "
                f"{', '.join(map(repr, self.splits))}."
            )
        return Rows(self, split)


class Rows:
    """Random access to the rows of a split, as records; a source for Grain."""

    def __init__(self, prepared: Prepared, split: str) -> None:
        self._name = f"{prepared.path} {split}"
        self._stored = record_type(prepared.kind, id_type(prepared.vocab_size))
        self._read = record_type(prepared.kind, np.dtype(np.int32))
        # A file without records is a shard whose documents did not fill a row.
        shards = [shard for shard in prepared.splits[split].shards if shard.num_rows]
        self._paths = [prepared.path / shard.file for shard in shards]
        self._records = [
            _open_shard(path, shard)
            for path, shard in zip(self._paths, shards, strict=True)
        ]
        counts = [shard.num_rows for shard in shards]
        self._starts = list(itertools.accumulate(counts, initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        try:
            record = self._records[shard][index - self._starts[shard]]
        except RuntimeError as error:
            raise _damaged(self._paths[shard], str(error)) from error
        return np.frombuffer(record, self._stored).astype(self._read)

    def __repr__(self) -> str:
        return f"Rows({self._name!r}, {len(self)} rows)"


def id_type(vocab_size: int) -> np.dtype:
    """The smallest type that holds the ids of a vocabulary, little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def record_type(kind: Kind, ids: np.dtype) -> np.dtype:
    """Of one token of a row: its id, and with it what it is there for.

    Of comparisons, `answer` says whose last token it is (`CHOSEN`, `REJECTED`), and
    there alone are `rating`, a place in `RATINGS`, and `safety` (`UNSAFE`, `SAFE`).
    Of a prompt, every token says whether it is `about_safety`.
    """
    if kind == "documents":
        return ids
    if kind == "dialogs":
        return np.dtype([("id", ids), ("is_learnt", np.bool_), ("is_first", np.bool_)])
    if kind == "prompts":
        return np.dtype([("id", ids), ("about_safety", np.bool_)])
    marks = [(name, np.uint8) for name in ("answer", "rating", "safety")]
    return np.dtype([("id", ids), ("is_first", np.bool_), *marks])


def local(path: str | Path) -> Path:
    """A path on this machine.

    Raises:
      DataError: it names a bucket.
    """
    if "://" in str(path):
        raise DataError(
            f"{path} is in a bucket, where ArrayRecord files cannot be read in place: "
            "mount the bucket (gcsfuse) and give the path where it is mounted."
        )
    return Path(path)


def _open_shard(path: Path, shard: Shard) -> grain.sources.ArrayRecordDataSource:
    if not path.exists():
        raise DataError(f"the shard {path} is missing: copy it, or prepare it again.")
    size = path.stat().st_size
    if size != shard.file_bytes:
        raise _damaged(path, f"it has {size:,} bytes, not {shard.file_bytes:,}")
    try:
        records = grain.sources.ArrayRecordDataSource([str(path)])
    except RuntimeError as error:
        raise _damaged(path, str(error)) from error
    if len(records) != shard.num_rows:
        raise _damaged(path, f"it has {len(records):,} rows, not {shard.num_rows:,}")
    return records


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(
        f"the shard {path} is damaged: {reason.rstrip('.')}. Copy it again, or prepare "
        "the data again."
    )
