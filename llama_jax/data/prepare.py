"""Tokenise a corpus once, and pack it into rows."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from llama_jax.data.pack import pack, pack_whole
from llama_jax.data.prepared import (
    MANIFEST,
    TOKENIZER,
    Kind,
    Prepared,
    Shard,
    Split,
    id_type,
    local,
    record_type,
)
from llama_jax.data.sources import Dialogs, Documents
from llama_jax.errors import DataError
from llama_jax.text import Example, Tokenizer, encode_example

TRAIN = "train"


def prepare(
    splits: Mapping[str, Sequence[Documents]],
    tokenizer: Tokenizer,
    target: str | Path,
    *,
    row_length: int,
) -> Prepared:
    """Write the rows of a corpus: BOS, document, EOS, end to end (`pack`).

    One source becomes one file. "train" drops what does not fill a row at the end of a
    file; other splits keep it, so that a loss over them covers every token. A
    directory that was prepared from sources of the same names, in the same way, is
    left as it is.

    Args:
      splits: the sources of each split, by its name.
      tokenizer: makes the ids.
      target: the directory; it appears whole or not at all.
      row_length: tokens that the model reads at once.

    Raises:
      DataError: a source is unreadable or without documents, a split does not fill
        one row, or `target` holds something else.
    """

    def write(split: str, source: Documents, path: Path) -> Shard:
        keep_tail = split != TRAIN
        return write_shard(
            source, tokenizer, path, row_length=row_length, keep_tail=keep_tail
        )

    return _prepare("documents", splits, tokenizer, target, row_length, write)


def prepare_dialogs(
    splits: Mapping[str, Sequence[Dialogs]],
    tokenizer: Tokenizer,
    target: str | Path,
    *,
    row_length: int,
) -> Prepared:
    """Write dialogs in the chat format (`text.chat`), several in a row, none cut.

    What each token is there for is written with it: only answers are learnt (paper,
    section 3.1). Arguments and the rest are as `prepare` has them.

    Raises:
      DataError: as `prepare`; or no dialog of a source fits a row.
      DialogError: a row of a source is no conversation to learn from.
    """

    def write(split: str, source: Dialogs, path: Path) -> Shard:
        return write_dialog_shard(source, tokenizer, path, row_length=row_length)

    return _prepare("dialogs", splits, tokenizer, target, row_length, write)


def _prepare(
    kind: Kind,
    splits: Mapping[str, Sequence[Any]],
    tokenizer: Tokenizer,
    target: str | Path,
    row_length: int,
    write: Callable[[str, Any, Path], Shard],
) -> Prepared:
    if row_length < 1:
        raise DataError(f"row_length is {row_length}: it has to be positive.")
    target = local(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        prepared = _existing(target)
        _require_same(prepared, kind, splits, tokenizer, row_length)
        return prepared

    partial = target.parent / f".{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        prepared = Prepared(
            path=target,
            tokenizer=tokenizer.digest,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            row_length=row_length,
            splits={
                name: _write_split(name, sources, partial, row_length, write)
                for name, sources in splits.items()
            },
            kind=kind,
        )
        prepared.write(partial)
        tokenizer.save(partial / TOKENIZER)
        partial.replace(target)
    except OSError as error:
        raise DataError(f"{target} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return prepared


def write_shard(
    documents: Documents,
    tokenizer: Tokenizer,
    path: Path,
    *,
    row_length: int,
    keep_tail: bool,
) -> Shard:
    """Write one file of rows from one source; depends on nothing else.

    So the shards of a large corpus can be written by as many processes.

    Args:
      documents: the source.
      tokenizer: makes the ids.
      path: the file.
      row_length: tokens that the model reads at once.
      keep_tail: write what is left at the end as a shorter row.

    Raises:
      DataError: the source is unreadable or has no documents.
    """
    num_documents = text_bytes = num_tokens = num_targets = 0

    def encoded() -> Iterator[list[int]]:
        nonlocal num_documents, text_bytes, num_tokens
        for text in documents:
            tokens = tokenizer.encode(text, bos=True, eos=True)
            num_documents += 1
            text_bytes += len(text.encode("utf-8"))
            num_tokens += len(tokens)
            yield tokens

    with _Writer(path, record_type("documents", id_type(tokenizer.vocab_size))) as rows:
        for row in pack(encoded(), row_length=row_length):
            if len(row) > row_length or keep_tail:
                rows.write(row)
                num_targets += len(row) - 1
    if not num_documents:
        raise DataError(
            f"{documents.name} holds no documents ({documents.num_skipped} rows were "
            "skipped): leave it out, or give its text."
        )
    return rows.shard(
        source=documents.name,
        num_documents=num_documents,
        num_skipped=documents.num_skipped,
        text_bytes=text_bytes,
        num_tokens=num_tokens,
        num_targets=num_targets,
    )


def write_dialog_shard(
    dialogs: Dialogs, tokenizer: Tokenizer, path: Path, *, row_length: int
) -> Shard:
    """`write_shard` of dialogs. Those that do not fit a row are counted, not cut.

    Raises:
      DataError: the source is unreadable, or no dialog of it fits a row.
      DialogError: a row of it is no conversation to learn from.
    """
    num_dialogs = text_bytes = num_tokens = num_targets = num_too_long = 0

    def encoded() -> Iterator[Example]:
        nonlocal num_dialogs, text_bytes, num_tokens, num_targets, num_too_long
        for messages, learn in dialogs:
            example = encode_example(tokenizer, messages, learn=learn)
            if len(example.tokens) > row_length + 1:
                num_too_long += 1
                continue
            num_dialogs += 1
            answers = messages[-1:] if learn == "last" else messages
            text_bytes += sum(
                len(message["content"].encode("utf-8"))
                for message in answers
                if message["role"] == "assistant"
            )
            num_tokens += len(example.tokens)
            num_targets += sum(example.loss_mask)
            yield example

    dtype = record_type("dialogs", id_type(tokenizer.vocab_size))
    with _Writer(path, dtype) as rows:
        for row in pack_whole(encoded(), row_length=row_length):
            rows.write(_record(row, dtype))
    if not num_dialogs:
        raise DataError(
            f"{dialogs.name} holds no dialogs that fit a row of {row_length} tokens "
            f"({num_too_long} are longer, {dialogs.num_skipped} lines were skipped): "
            "leave it out, give it dialogs, or make rows longer."
        )
    return rows.shard(
        source=dialogs.name,
        num_documents=num_dialogs,
        num_skipped=dialogs.num_skipped,
        text_bytes=text_bytes,
        num_tokens=num_tokens,
        num_targets=num_targets,
        num_too_long=num_too_long,
    )


def _record(examples: Sequence[Example], dtype: np.dtype) -> np.ndarray:
    tokens = np.zeros(sum(len(example.tokens) for example in examples), dtype)
    tokens["id"] = np.concatenate([example.tokens for example in examples])
    tokens["is_learnt"] = np.concatenate([example.loss_mask for example in examples])
    lengths = [len(example.tokens) for example in examples]
    tokens["is_first"][np.cumsum([0, *lengths[:-1]])] = True
    return tokens


class _Writer:
    """A file of rows, with the digest of what is written; a context that closes it."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._path = path
        self._dtype = dtype
        self._digest = hashlib.sha256()
        self._num_rows = 0
        # Groups of one row: any row can be read without its neighbours.
        self._writer = ArrayRecordWriter(str(path), "group_size:1")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, row: np.ndarray) -> None:
        record = row.astype(self._dtype).tobytes()
        self._writer.write(record)
        self._digest.update(record)
        self._num_rows += 1

    def shard(self, **counts: Any) -> Shard:
        """What has been written; `counts` are what only the caller knows."""
        return Shard(
            file=self._path.name,
            file_bytes=self._path.stat().st_size,
            sha256=self._digest.hexdigest(),
            num_rows=self._num_rows,
            **counts,
        )


def _write_split(
    name: str,
    sources: Sequence[Any],
    directory: Path,
    row_length: int,
    write: Callable[[str, Any, Path], Shard],
) -> Split:
    if not sources:
        raise DataError(
            f"the split {name!r} has no sources: give one, or leave it out."
        )
    files = f"-of-{len(sources):05}.array_record"
    split = Split(
        tuple(
            write(name, source, directory / f"{name}-{i:05}{files}")
            for i, source in enumerate(sources)
        )
    )
    if not split.num_rows:
        raise DataError(
            f"the split {name!r} does not fill one row: it has {split.num_tokens} "
            f"tokens, and row_length is {row_length}. Give more text or shorter rows."
        )
    return split


def _existing(target: Path) -> Prepared:
    if not (target / MANIFEST).exists():
        raise DataError(
            f"{target} exists and holds other files: choose a directory that does not "
            "exist yet."
        )
    return Prepared.load(target)


def _require_same(
    prepared: Prepared,
    kind: Kind,
    splits: Mapping[str, Sequence[Any]],
    tokenizer: Tokenizer,
    row_length: int,
) -> None:
    prepared.require_tokenizer(tokenizer.digest)
    if prepared.kind != kind:
        raise DataError(
            f"{prepared.path} was prepared from {prepared.kind}, not {kind}: choose "
            "another directory, or remove this one."
        )
    if prepared.row_length != row_length:
        raise DataError(
            f"{prepared.path} was prepared with row_length {prepared.row_length}, not "
            f"{row_length}: choose another directory, or remove this one."
        )
    before = {
        name: [shard.source for shard in split.shards]
        for name, split in prepared.splits.items()
    }
    now = {name: [source.name for source in splits[name]] for name in splits}
    if before != now:
        raise DataError(
            f"{prepared.path} was prepared from {before}, not {now}: choose another "
            "directory, or remove this one."
        )
