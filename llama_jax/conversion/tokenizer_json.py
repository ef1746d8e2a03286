"""A SentencePiece model in the form of Hugging Face's `tokenizer.json`.

transformers 5 reads `tokenizer.model` itself, but puts no space before a text that
begins with one and merges pieces in another order, so that " Hello" has other ids than
in Meta's code. From `tokenizer.json` both it and the fast tokenizers of earlier
versions do as SentencePiece does.
"""

import dataclasses
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SPACE = "\u2581"  # how SentencePiece writes a space

# In SentencePiece's `sentencepiece_model.proto`.
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _TYPE = 1, 2, 3
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_MODEL_TYPE, _BPE, _SPACE_AFTER = 3, 2, 24
_CHARACTER_MAP, _SPACE_BEFORE, _FEWER_SPACES, _ESCAPED = 2, 3, 4, 5

# Spaces at either end, and those that follow another.
_SUPERFLUOUS = rf"\A +|(?<= ) +|[ {SPACE}]+\z"


@dataclasses.dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    type: int


def tokenizer_json(model: bytes) -> Mapping[str, Any] | None:
    """The content of `tokenizer.json` for a `tokenizer.model`.

    None if the model does what this form cannot say: is no BPE, changes characters, or
    has pieces of the user's.
    """
    messages = [(number, value) for number, value in _fields(model)]
    trainer = _message(messages, _TRAINER)
    normalizer = _message(messages, _NORMALIZER)
    pieces = [_piece(value) for number, value in messages if number == _PIECE]
    plain = (
        trainer.get(_MODEL_TYPE) == _BPE
        and not trainer.get(_SPACE_AFTER)
        and not normalizer.get(_CHARACTER_MAP)
        and normalizer.get(_SPACE_BEFORE, 1)
        and normalizer.get(_ESCAPED, 1)
        and {piece.type for piece in pieces} <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}
    )
    if not plain:
        return None
    steps: list[dict[str, Any]] = [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ]
    leading = 1  # spaces that decoding takes away
    if normalizer.get(_FEWER_SPACES, 1):
        leading = 2**16
        fewer = {"type": "Replace", "pattern": {"Regex": _SUPERFLUOUS}, "content": ""}
        steps.insert(0, fewer)
    bos = pieces[1].text
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    second = {"SpecialToken": {"id": bos, "type_id": 1}}
    a, b = ({"Sequence": {"id": id, "type_id": n}} for n, id in enumerate("AB"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, **special_token(piece.text), "special": True}
            for id, piece in enumerate(pieces)
            if piece.type in (_UNKNOWN, _CONTROL)
        ],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, a],
            "pair": [first, a, second, b],
            "special_tokens": {bos: {"id": bos, "ids": [1], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": leading, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[0].text,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece.text: id for id, piece in enumerate(pieces)},
            "merges": [f"{left} {right}" for left, right in _merges(pieces)],
        },
    }


def special_token(text: str) -> Mapping[str, Any]:
    """A piece that stands for no text, as Hugging Face describes it."""
    return {
        "content": text,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
    }


def _merges(pieces: Sequence[_Piece]) -> list[tuple[str, str]]:
    """Every pair that makes a piece, the one merged first being the first.

    SentencePiece merges for the best score, and of equal ones the leftmost. Here no
    two are equal. Runs of spaces are, in Llama's model, and there it means that what
    has been merged grows, so that longer left parts are first.
    """
    scores = {piece.text: piece.score for piece in pieces if piece.type == _NORMAL}
    pairs = [
        (text[:cut], text[cut:])
        for text in scores
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]

    def rank(pair: tuple[str, str]) -> tuple[float, int, int]:
        left, right = pair
        return -scores[left + right], -len(left), -len(right)

    return sorted(pairs, key=rank)


def _piece(message: int | bytes) -> _Piece:
    assert isinstance(message, bytes)
    fields = dict(_fields(message))
    text, score = fields[_TEXT], fields.get(_SCORE, bytes(4))
    type = fields.get(_TYPE, _NORMAL)
    assert isinstance(text, bytes) and isinstance(score, bytes)
    assert isinstance(type, int)
    return _Piece(text.decode(), struct.unpack("<f", score)[0], type)


def _message(
    fields: Sequence[tuple[int, int | bytes]], wanted: int
) -> Mapping[int, int | bytes]:
    """The fields of the message in a field; none if it is absent."""
    for number, value in fields:
        if number == wanted and isinstance(value, bytes):
            return dict(_fields(value))
    return {}


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protocol buffer, in order."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}[kind] if kind != 2 else varint()
        yield number, message[at : at + size]
        at += size
