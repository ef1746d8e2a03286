"""`tokenizer.json` read by plain code gives SentencePiece's ids.

Hugging Face's own code reads it in test_transformers.py.
"""

import io
import json
import random
import re

import pytest
import sentencepiece

from llama_jax.conversion.tokenizer_json import tokenizer_json
from llama_jax.text import Tokenizer

WORDS = "the of and fill coffee == ==== aaaa café 12 (x) éé x_1 -- ---".split()
PLAIN = {"model_type": "bpe", "normalization_rule_name": "identity"}
FEWER_SPACES = PLAIN | {"remove_extra_whitespaces": True}


def train(**settings) -> bytes:
    """A small model of Llama's layout."""
    draw = random.Random(0)
    model = io.BytesIO()
    settings = {"remove_extra_whitespaces": False, "vocab_size": 330} | settings
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(draw.choices(WORDS, k=9)) for _ in range(300)),
        model_writer=model,
        byte_fallback=True,
        hard_vocab_limit=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


def encoder(content):
    """From text to ids as `tokenizer.json` says, in the plainest way."""
    vocab = content["model"]["vocab"]
    ranks = {
        tuple(pair.split(" ")): n for n, pair in enumerate(content["model"]["merges"])
    }

    def encode(text: str) -> list[int]:
        for step in content["normalizer"]["normalizers"]:
            match step:
                case {"type": "Prepend", "prepend": first}:
                    text = first + text if text else text
                case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                    text = text.replace(old, new)
                case {"type": "Replace", "pattern": {"Regex": old}, "content": new}:
                    text = re.sub(old.replace(r"\z", r"\Z"), new, text)
        parts: list[str] = []
        for character in text:
            spelt = [f"<0x{byte:02X}>" for byte in character.encode()]
            parts += [character] if character in vocab else spelt
        while True:
            pairs = enumerate(zip(parts, parts[1:], strict=False))
            ranked = [(ranks[pair], at) for at, pair in pairs if pair in ranks]
            if not ranked:
                return [1] + [vocab[part] for part in parts]
            _, at = min(ranked)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    return encode


@pytest.mark.parametrize("settings", [PLAIN, FEWER_SPACES], ids=["plain", "fewer"])
def test_ids_are_sentencepieces(settings, tmp_path):
    model = train(**settings)
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    content = tokenizer_json(model)
    assert content is not None and len(content["model"]["merges"]) > 20
    encode = encoder(content)
    draw = random.Random(0)
    pieces = [tokenizer.piece(id) for id in range(259, tokenizer.vocab_size)]
    kinds = [piece.replace("\u2581", " ") for piece in pieces]
    kinds += [" ", "  ", "     ", "\n", "\t", "\u2581", "=" * 7, "a" * 9, "é", "猫"]
    for _ in range(1000):
        text = "".join(draw.choices(kinds, k=draw.randint(0, 8)))
        assert encode(text) == tokenizer.encode(text, bos=True, eos=False)


def test_ids_are_metas(reference):
    """In whose model all runs of spaces have the same score."""
    folder = reference / "tokenizer"
    tokenizer = Tokenizer(folder / "tokenizer.model")
    encode = encoder(tokenizer_json(tokenizer.model_bytes))
    vectors = json.loads((folder / "llama_cpp_vectors.json").read_text())["vectors"]
    for vector in vectors:
        assert encode(vector["text"]) == [1, *vector["ids"]]
    for number in range(40):
        text = " " * number + "a"
        assert encode(text) == tokenizer.encode(text, bos=True, eos=False)


@pytest.mark.parametrize(
    "settings",
    [
        PLAIN | {"model_type": "unigram"},
        PLAIN | {"normalization_rule_name": "nmt_nfkc"},
        PLAIN | {"add_dummy_prefix": False},
        PLAIN | {"treat_whitespace_as_suffix": True},
        PLAIN | {"user_defined_symbols": ["<sep>"]},
    ],
    ids=lambda settings: next(reversed(settings)),
)
def test_what_it_cannot_say_is_not_said(settings):
    assert tokenizer_json(train(**settings)) is None


def test_special_tokens_are_the_control_pieces():
    content = tokenizer_json(train(**PLAIN, control_symbols=["<turn>"]))
    assert content is not None
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    assert special == {"<unk>": 0, "<s>": 1, "</s>": 2, "<turn>": 3}
