"""Llama's tokenizer: a SentencePiece BPE, used as Meta uses it, and trained alike.

The layout is the family's: `<unk>` 0, `<s>` 1, `</s>` 2, the 256 bytes at 3 to 258,
learnt pieces after them. A character without a piece is written as its bytes, so every
text can be encoded (paper, section 2.2).
"""

import codecs
import hashlib
import io
import logging
import operator
import os
import re
from collections.abc import Iterable, Iterator

import sentencepiece
from etils import epath

from llama_jax.errors import TokenizerError

_FIRST_BYTE = 3
_NUM_BYTES = 256
_PRINTABLE_ASCII = "".join(map(chr, range(0x21, 0x7F)))
# <unk>, <s>, </s>, the bytes, the printable characters and the space.
_SMALLEST_VOCABULARY = _FIRST_BYTE + _NUM_BYTES + len(_PRINTABLE_ASCII) + 1

# What the trainer reads as one sentence: a line, or 1,024 characters of a longer one,
# cut at a space where there is one. That is at most 4,096 bytes, so nothing exceeds
# Llama's limit of 4,192, beyond which the trainer would drop the sentence unsaid. It
# would also drop one that holds NUL or U+2585, which therefore separate.
_SEPARATORS = "\n\0\u2585"
_SENTENCE = re.compile(
    f"[^{_SEPARATORS}]{{1,1024}}(?=[ {_SEPARATORS}]|\\Z)|[^{_SEPARATORS}]{{1,1024}}"
)

logger = logging.getLogger(__name__)


class Tokenizer:
    """Text to ids and back, by the SentencePiece model in a file.

    Two tokenizers are equal when their files are; they pickle, with the file inside.

    Args:
      path: the `tokenizer.model`, on a disk or in a bucket (`gs://...`).

    Raises:
      TokenizerError: the file is missing, is not a SentencePiece model, or belongs to
        another family than Llama's.
    """

    def __init__(self, path: epath.PathLike) -> None:
        self.__setstate__((str(path), _read(path)))

    def __getstate__(self) -> tuple[str, bytes]:
        return self._origin, self._model_bytes

    def __setstate__(self, state: tuple[str, bytes]) -> None:
        self._origin, self._model_bytes = state
        self._model = _parse(self._model_bytes, origin=self._origin)
        self._digest = hashlib.sha256(self._model_bytes).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        return f"Tokenizer({self._origin!r}, {self.vocab_size} pieces)"

    @property
    def vocab_size(self) -> int:
        """Pieces, control pieces included."""
        return self._model.get_piece_size()

    @property
    def bos_id(self) -> int:
        """The id of `<s>`, which opens a document."""
        return self._model.bos_id()

    @property
    def eos_id(self) -> int:
        """The id of `</s>`, which closes a document or an answer."""
        return self._model.eos_id()

    @property
    def pad_id(self) -> int:
        """Meta's -1: Llama has no padding piece, and this id has no embedding."""
        return self._model.pad_id()

    @property
    def model_bytes(self) -> bytes:
        """The file's content."""
        return self._model_bytes

    @property
    def digest(self) -> str:
        """The file's sha256 in hex: the same digest, the same ids for any text."""
        return self._digest

    def save(self, path: epath.PathLike) -> None:
        """Write the file, whole or not at all.

        Raises:
          TokenizerError: the place cannot be written.
        """
        _write(path, self._model_bytes)

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """The ids of a text, as Meta's `Tokenizer.encode` gives them.

        Control ids come from `bos` and `eos` alone: a literal `<s>` in the text is
        spelt out like any other characters. Llama's model puts a space before the
        text, which `decode` takes away.

        Raises:
          TokenizerError: the text holds a lone surrogate, which is no character.
        """
        ids = self._model.encode(_utf8(text))
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; control ids have none, an unknown id is written " ⁇ ".

        For Llama's model `decode(encode(text)) == text`, NUL and leading spaces
        included, with one exception: U+2581, by which SentencePiece writes a space
        inside a piece, comes back as a space. (A model made to remove extra whitespace
        does not return that either.) Bytes that are not UTF-8 become U+FFFD.

        Raises:
          TokenizerError: an id has no piece.
        """
        ids = [operator.index(i) for i in ids]
        for position, i in enumerate(ids):
            self._require_piece(i, f" at position {position}")
        return self._model.decode_ids(ids)

    def piece(self, id: int) -> str:
        """How the model writes an id: "▁the", "<0x0A>", "</s>".

        Raises:
          TokenizerError: the id has no piece.
        """
        self._require_piece(id, "")
        return self._model.id_to_piece(id)

    def _require_piece(self, id: int, where: str) -> None:
        if not 0 <= id < self.vocab_size:
            raise TokenizerError(
                f"id {id}{where} has no piece: {self._origin} has the ids 0 to "
                f"{self.vocab_size - 1}. Leave out padding, and decode with the "
                "tokenizer that made the ids."
            )


class StreamDecoder:
    """Decodes ids as they come, one text at a time.

    The parts that `feed` and a last `flush` return, joined, are `decode` of all the
    ids. A character that is spelt in several bytes comes with its last byte, whole.

    Args:
      tokenizer: made the ids.
      continues: whether other ids, with a text, come before; then the parts are what
        these add to it, and a first space, which `decode` takes away, is there.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []
        self._started = continues
        # Only asked whether a character is still incomplete: SentencePiece decodes.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """The text that this id settles; "" while a character lacks bytes.

        Raises:
          TokenizerError: the id has no piece.
        """
        self._held.append(id)
        byte = id - _FIRST_BYTE
        if 0 <= byte < _NUM_BYTES:
            self._utf8.decode(bytes([byte]))
            incomplete, _ = self._utf8.getstate()
            if incomplete:
                return ""
        return self.flush()

    def flush(self) -> str:
        """The text of the ids still held, to be called after the last id."""
        self._utf8.reset()
        # SentencePiece drops the space before the first text. What stands in for the
        # text so far shows it that this is not the first.
        before = [_FIRST_BYTE + ord(".")] if self._started else []
        text = self._tokenizer.decode(before + self._held)[len(before) :]
        self._started = self._started or bool(text)
        if self._started:
            self._held.clear()
        return text


def require_fit(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Check that a model with `vocab_size` embeddings has one for every piece.

    More embeddings than pieces are accepted, with a warning in the log: they are
    padding, to make the vocabulary divide over devices.

    Raises:
      TokenizerError: the tokenizer has more pieces than the model has embeddings.
    """
    pieces = tokenizer.vocab_size
    if pieces > vocab_size:
        raise TokenizerError(
            f"{tokenizer} does not fit the model, whose vocabulary is {vocab_size}: "
            f"{pieces - vocab_size} of its ids, from {vocab_size} on, have no "
            "embedding. (32001 against 32000 happens when a padding piece is added to "
            "Llama's tokenizer and the embedding of another copy of the weights is "
            "resized for it.) Use the tokenizer that came with these weights, or the "
            "weights that were resized."
        )
    if pieces < vocab_size:
        logger.warning(
            "The model's vocabulary is %d and the tokenizer has %d pieces: the last "
            "%d embeddings are taken for padding.",
            vocab_size,
            pieces,
            vocab_size - pieces,
        )


def train_tokenizer(
    documents: Iterable[str], path: epath.PathLike, *, vocab_size: int
) -> Tokenizer:
    """Train a tokenizer with Llama's settings and write it to `path`.

    The settings are those recorded in Llama's own file, and printable ASCII is always
    among the pieces: in a small corpus "<" or "/" may be too rare to earn one. The
    same documents in the same order give the same file. All of the text is held in
    memory, so give a sample of a large corpus.

    Args:
      documents: the texts; line ends separate sentences and are encoded as bytes.
      path: the file to write; one that exists is replaced when training has succeeded.
      vocab_size: pieces in all: 3 control, 256 bytes, characters, and what is learnt.

    Raises:
      TokenizerError: there is no text, it is too small or too varied for `vocab_size`,
        a document holds a lone surrogate, or `path` cannot be written.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise TokenizerError(
            f"vocab_size {vocab_size} is too small: the control pieces, the bytes and "
            f"printable ASCII alone are {_SMALLEST_VOCABULARY}."
        )
    feed = _Sentences(documents)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(feed),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.99995,
            required_chars=_PRINTABLE_ASCII,
            max_sentence_length=4192,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            # Recorded in the file: a number that followed the machine would give
            # another digest on each.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if feed.failure is not None:
            raise feed.failure from None
        raise _training_error(error, vocab_size=vocab_size, feed=feed) from error
    _write(path, model.getvalue())
    return Tokenizer(path)


class _Sentences:
    """Documents as the trainer's sentences; remembers what the trainer forgets.

    SentencePiece turns an exception of its iterator into a text: the original stays in
    `failure`.
    """

    def __init__(self, documents: Iterable[str]) -> None:
        self._documents = documents
        self.num_sentences = 0
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for number, document in enumerate(self._documents, start=1):
                _utf8(document, where=f"document {number}: ")
                for sentence in _SENTENCE.findall(document):
                    if sentence.strip():
                        self.num_sentences += 1
                        yield sentence
        except (Exception, KeyboardInterrupt) as error:
            self.failure = error
            raise


def _training_error(
    error: RuntimeError, *, vocab_size: int, feed: _Sentences
) -> TokenizerError:
    """SentencePiece's refusal, in words and with the number that would do."""
    if not feed.num_sentences:
        return TokenizerError(
            "There is no text to train on: every document is empty or blank."
        )
    if most := re.search(r"set it to a value <= (\d+)", str(error)):
        return TokenizerError(
            f"vocab_size {vocab_size} is more than this corpus holds: give at most "
            f"{most[1]}, or more text."
        )
    if least := re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error)):
        return TokenizerError(
            f"vocab_size {vocab_size} has no room for the characters of this corpus: "
            f"give at least {least[1]}."
        )
    return TokenizerError(f"SentencePiece could not train a tokenizer: {error}")


def _utf8(text: str, *, where: str = "") -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{where}{text[error.start]!r} at character {error.start} is a lone "
            "surrogate, half of a character: the text was cut or decoded wrongly. "
            "Decode it again, as UTF-8 or UTF-16, or remove it."
        ) from None


def _parse(model_bytes: bytes, *, origin: str) -> sentencepiece.SentencePieceProcessor:
    if not model_bytes:
        raise TokenizerError(f"{origin} is empty: copy it again.")
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    except RuntimeError:
        raise TokenizerError(
            f"{origin} is not a SentencePiece model (it begins {model_bytes[:24]!r}). "
            "Llama 1 and 2 keep theirs in tokenizer.model; Llama 3's file of that name "
            "and tokenizer.json are of other kinds, and a Git LFS pointer stands in "
            "for a file not downloaded yet."
        ) from None
    expected = {"unk": 0, "bos": 1, "eos": 2}
    found = {"unk": model.unk_id(), "bos": model.bos_id(), "eos": model.eos_id()}
    differences = [
        f"{name} is {'absent' if found[name] < 0 else found[name]}, not {id}"
        for name, id in expected.items()
        if found[name] != id
    ]
    for byte in range(_NUM_BYTES):
        id, piece = _FIRST_BYTE + byte, f"<0x{byte:02X}>"
        actual = model.id_to_piece(id) if id < model.get_piece_size() else "absent"
        if actual != piece:
            differences.append(f"piece {id} is {actual}, not {piece}")
            break
    if differences:
        raise TokenizerError(
            f"{origin} is another family's tokenizer: {', '.join(differences)}, as in "
            "Llama's. Give the tokenizer.model that belongs to the weights."
        )
    return model


def _read(path: epath.PathLike) -> bytes:
    try:
        return epath.Path(path).read_bytes()
    except FileNotFoundError:
        raise TokenizerError(
            f"{path} does not exist: give the tokenizer.model that came with the "
            "weights, or train one."
        ) from None
    except IsADirectoryError:
        raise TokenizerError(
            f"{path} is a directory: give the tokenizer.model in it."
        ) from None
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error}.") from error
    except ImportError as error:
        raise _bucket_error(path, error) from error


def _write(path: epath.PathLike, content: bytes) -> None:
    try:
        target = epath.Path(path)
        partial = target.parent / f".{target.name}.{os.getpid()}.partial"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise TokenizerError(f"{path} cannot be written: {error}.") from error
    except ImportError as error:
        raise _bucket_error(path, error) from error


def _bucket_error(path: epath.PathLike, error: ImportError) -> TokenizerError:
    return TokenizerError(
        f"{path} is in a bucket, and the package that reads it is not installed "
        f"({error}): pip install 'llama-jax[gcs]'."
    )
