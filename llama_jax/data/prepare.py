"""Tokenise a corpus once, and pack it into rows."""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from llama_jax.data.pack import pack, pack_whole
from llama_jax.data.prepared import (
    CHOSEN,
    MANIFEST,
    RATINGS,
    REJECTED,
    SAFE,
    TOKENIZER,
    UNSAFE,
    Kind,
    Prepared,
    Shard,
    Split,
    id_type,
    local,
    record_type,
)
from llama_jax.data.sources import (
    Comparison,
    Comparisons,
    Dialog,
    Dialogs,
    Documents,
    Prompt,
    Prompts,
)
from llama_jax.errors import DataError
from llama_jax.text import Example, Tokenizer, encode_dialog, encode_example

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


def prepare_comparisons(
    splits: Mapping[str, Sequence[Comparisons]],
    tokenizer: Tokenizer,
    target: str | Path,
    *,
    row_length: int,
) -> Prepared:
    """Write pairs of answers, each after its dialog, several pairs in a row, none cut.

    Arguments and the rest are as `prepare` has them.

    Raises:
      DataError: as `prepare`; or no pair of a source fits a row.
      DialogError: a row of a source is no dialog with answers.
    """

    def write(split: str, source: Comparisons, path: Path) -> Shard:
        return write_comparison_shard(source, tokenizer, path, row_length=row_length)

    return _prepare("comparisons", splits, tokenizer, target, row_length, write)


def prepare_prompts(
    splits: Mapping[str, Sequence[Prompts]],
    tokenizer: Tokenizer,
    target: str | Path,
    *,
    row_length: int,
    max_new_tokens: int,
) -> Prepared:
    """Write prompts in the chat format, one a row.

    Args:
      splits: as `prepare` has them; and so are tokenizer and target.
      tokenizer: likewise.
      target: likewise.
      row_length: tokens that the model reads at once, of a prompt with its answer.
      max_new_tokens: those of them that are for the answer.

    Raises:
      DataError: as `prepare`; no prompt of a source leaves an answer so much room.
      DialogError: a row of a source is no dialog that ends with the user.
    """
    longest = row_length - max_new_tokens
    if min(longest, max_new_tokens) < 1:
        raise DataError(
            f"max_new_tokens is {max_new_tokens} of a row_length of {row_length}: "
            "leave prompt and answer at least one token each."
        )

    def write(split: str, source: Prompts, path: Path) -> Shard:
        return write_prompt_shard(source, tokenizer, path, longest=longest)

    return _prepare(
        "prompts", splits, tokenizer, target, row_length, write, room=max_new_tokens
    )


def _prepare(
    kind: Kind,
    splits: Mapping[str, Sequence[Any]],
    tokenizer: Tokenizer,
    target: str | Path,
    row_length: int,
    write: Callable[[str, Any, Path], Shard],
    *,
    room: int = 0,
) -> Prepared:
    if row_length < 1:
        raise DataError(f"row_length is {row_length}: it has to be positive.")
    target = local(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        prepared = _existing(target)
        _require_same(prepared, kind, splits, tokenizer, row_length, room)
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
            room=room,
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
    dtype = record_type("dialogs", id_type(tokenizer.vocab_size))

    def encode(dialog: Dialog) -> _Piece:
        messages, learn = dialog
        example = encode_example(tokenizer, messages, learn=learn)
        tokens = _record([example], dtype)
        tokens["is_learnt"] = example.loss_mask
        answers = messages[-1:] if learn == "last" else messages
        return _Piece(
            tokens,
            text_bytes=_num_bytes(
                message["content"]
                for message in answers
                if message["role"] == "assistant"
            ),
            num_targets=sum(example.loss_mask),
        )

    # The last token of a row is a target and no input.
    room = row_length + 1
    return _write_whole(
        "dialogs", map(encode, dialogs), dialogs, path, dtype, room=room
    )


def write_comparison_shard(
    comparisons: Comparisons, tokenizer: Tokenizer, path: Path, *, row_length: int
) -> Shard:
    """`write_shard` of comparisons: both answers, each after the dialog, in one row.

    Pairs that do not fit a row are counted, not cut; and so are those of which the
    chosen answer is unsafe and the other safe, which the paper leaves out.

    Raises:
      DataError: the source is unreadable, or no comparison of it fits a row.
      DialogError: a row of it is no dialog with answers.
    """
    dtype = record_type("comparisons", id_type(tokenizer.vocab_size))
    num_unsafe_chosen = 0

    def encode(comparison: Comparison) -> _Piece:
        answers = (comparison.chosen, comparison.rejected)
        examples = [
            encode_example(
                tokenizer,
                [*comparison.messages, {"role": "assistant", "content": answer}],
            )
            for answer in answers
        ]
        tokens = _record(examples, dtype)
        lasts = np.cumsum([len(example.tokens) for example in examples]) - 1
        tokens["answer"][lasts] = CHOSEN, REJECTED
        tokens["rating"][lasts] = RATINGS.index(comparison.rating)
        if comparison.is_safe is not None:
            tokens["safety"][lasts] = np.where(comparison.is_safe, SAFE, UNSAFE)
        return _Piece(tokens, text_bytes=_num_bytes(answers), num_targets=1)

    def encoded() -> Iterator[_Piece]:
        nonlocal num_unsafe_chosen
        for comparison in comparisons:
            if comparison.is_safe == (False, True):
                num_unsafe_chosen += 1
            else:
                yield encode(comparison)

    shard = _write_whole(
        "comparisons", encoded(), comparisons, path, dtype, room=row_length
    )
    return dataclasses.replace(shard, num_unsafe_chosen=num_unsafe_chosen)


def write_prompt_shard(
    prompts: Prompts, tokenizer: Tokenizer, path: Path, *, longest: int
) -> Shard:
    """`write_shard` of prompts, one a row. Those of more tokens are counted, not cut.

    Raises:
      DataError: the source is unreadable, or has no prompt that is short enough.
      DialogError: a row of it is no dialog that ends with the user.
    """
    dtype = record_type("prompts", id_type(tokenizer.vocab_size))

    def encode(prompt: Prompt) -> _Piece:
        ids = encode_dialog(tokenizer, prompt.messages)
        tokens = np.zeros(len(ids), dtype)
        tokens["id"] = ids
        tokens["about_safety"] = prompt.about_safety
        return _Piece(
            tokens,
            text_bytes=_num_bytes(message["content"] for message in prompt.messages),
            num_targets=1,
        )

    pieces = map(encode, prompts)
    return _write_whole(
        "prompts", pieces, prompts, path, dtype, room=longest, alone=True
    )


class _Piece(NamedTuple):
    """What stays whole: its records, and what `Shard` counts of it."""

    tokens: np.ndarray
    text_bytes: int
    num_targets: int


def _write_whole(
    what: str,
    pieces: Iterable[_Piece],
    source: Dialogs | Comparisons | Prompts,
    path: Path,
    dtype: np.dtype,
    *,
    room: int,
    alone: bool = False,
) -> Shard:
    """Write pieces into rows of `room` tokens; those that are longer are counted.

    Several share a row, unless each is to be `alone`.
    """
    num_pieces = text_bytes = num_tokens = num_targets = num_too_long = 0

    def fitting() -> Iterator[np.ndarray]:
        nonlocal num_pieces, text_bytes, num_tokens, num_targets, num_too_long
        for piece in pieces:
            if len(piece.tokens) > room:
                num_too_long += 1
                continue
            num_pieces += 1
            text_bytes += piece.text_bytes
            num_tokens += len(piece.tokens)
            num_targets += piece.num_targets
            yield piece.tokens

    with _Writer(path, dtype) as rows:
        for row in fitting() if alone else pack_whole(fitting(), room=room):
            rows.write(row)
    if not num_pieces:
        raise DataError(
            f"{source.name} holds no {what} that fit a row of {room} tokens "
            f"({num_too_long} are longer, {source.num_skipped} lines were skipped): "
            f"leave it out, give it {what}, or make rows longer."
        )
    return rows.shard(
        source=source.name,
        num_documents=num_pieces,
        num_skipped=source.num_skipped,
        text_bytes=text_bytes,
        num_tokens=num_tokens,
        num_targets=num_targets,
        num_too_long=num_too_long,
    )


def _record(examples: Sequence[Example], dtype: np.dtype) -> np.ndarray:
    """Examples one after another; the first token of each is marked."""
    lengths = [len(example.tokens) for example in examples]
    tokens = np.zeros(sum(lengths), dtype)
    tokens["id"] = np.concatenate([example.tokens for example in examples])
    tokens["is_first"][np.cumsum([0, *lengths[:-1]])] = True
    return tokens


def _num_bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode("utf-8")) for text in texts)


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
    room: int,
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
    if prepared.room != room:
        raise DataError(
            f"{prepared.path} was prepared with max_new_tokens {prepared.room}, not "
            f"{room}: choose another directory, or remove this one."
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
