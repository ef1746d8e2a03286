"""Tokenise a corpus once, and pack it into rows."""

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter

from llama_jax.data.pack import pack
from llama_jax.data.prepared import (
    MANIFEST,
    TOKENIZER,
    Prepared,
    Shard,
    Split,
    id_type,
    local,
)
from llama_jax.data.sources import Documents
from llama_jax.errors import DataError
from llama_jax.text import Tokenizer

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
    if row_length < 1:
        raise DataError(f"row_length is {row_length}: it has to be positive.")
    target = local(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        prepared = _existing(target)
        _require_same(prepared, splits, tokenizer, row_length)
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
                name: _write_split(name, sources, tokenizer, partial, row_length)
                for name, sources in splits.items()
            },
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
    num_documents = text_bytes = num_tokens = num_rows = num_targets = 0

    def encoded() -> Iterator[list[int]]:
        nonlocal num_documents, text_bytes, num_tokens
        for text in documents:
            tokens = tokenizer.encode(text, bos=True, eos=True)
            num_documents += 1
            text_bytes += len(text.encode("utf-8"))
            num_tokens += len(tokens)
            yield tokens

    dtype = id_type(tokenizer.vocab_size)
    digest = hashlib.sha256()
    # Groups of one row: any row can be read without its neighbours.
    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        for row in pack(encoded(), row_length=row_length):
            if len(row) > row_length or keep_tail:
                record = row.astype(dtype).tobytes()
                writer.write(record)
                digest.update(record)
                num_rows += 1
                num_targets += len(row) - 1
    finally:
        writer.close()
    if not num_documents:
        raise DataError(
            f"{documents.name} holds no documents ({documents.num_skipped} rows were "
            "skipped): leave it out, or give its text."
        )
    return Shard(
        file=path.name,
        source=documents.name,
        file_bytes=path.stat().st_size,
        sha256=digest.hexdigest(),
        num_rows=num_rows,
        num_documents=num_documents,
        num_skipped=documents.num_skipped,
        text_bytes=text_bytes,
        num_tokens=num_tokens,
        num_targets=num_targets,
    )


def _write_split(
    name: str,
    sources: Sequence[Documents],
    tokenizer: Tokenizer,
    directory: Path,
    row_length: int,
) -> Split:
    if not sources:
        raise DataError(
            f"the split {name!r} has no sources: give one, or leave it out."
        )
    split = Split(
        tuple(
            write_shard(
                documents,
                tokenizer,
                directory / f"{name}-{i:05}-of-{len(sources):05}.array_record",
                row_length=row_length,
                keep_tail=name != TRAIN,
            )
            for i, documents in enumerate(sources)
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
    splits: Mapping[str, Sequence[Documents]],
    tokenizer: Tokenizer,
    row_length: int,
) -> None:
    prepared.require_tokenizer(tokenizer.digest)
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
