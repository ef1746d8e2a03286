"""A small corpus of numbered documents, and the same prepared."""

import random
from pathlib import Path

from llama_jax.config.data import DataConfig
from llama_jax.data import Prepared, Records, prepare
from llama_jax.text import Tokenizer, train_tokenizer

WORDS = "ba ce di fo gu han kel mir nos tur wex yal".split()
LENGTH = 16


def texts(num: int, *, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [
        f"{i}: " + " ".join(draw.choices(WORDS, k=draw.randint(5, 60)))
        for i in range(num)
    ]


def source(documents: list[str], name: str = "corpus") -> Records:
    return Records(name, [{"text": text} for text in documents])


def make_tokenizer(directory: Path, *, vocab_size: int = 400) -> Tokenizer:
    return train_tokenizer(
        texts(50), directory / "tokenizer.model", vocab_size=vocab_size
    )


def prepare_corpus(
    directory: Path, tokenizer: Tokenizer, *, seed: int = 0, num_shards: int = 3
) -> Prepared:
    """A training split of several shards, and a validation split of two."""
    train, held_out = texts(40, seed=seed), texts(7, seed=seed + 1)
    return prepare(
        {
            "train": [
                source(train[i::num_shards], f"train {i}") for i in range(num_shards)
            ],
            "validation": [source(held_out[:4], "a"), source(held_out[4:], "b")],
        },
        tokenizer,
        directory,
        row_length=LENGTH,
    )


def data_config(*sets: Prepared, **changes: object) -> DataConfig:
    settings: dict = {
        "paths": tuple(str(prepared.path) for prepared in sets),
        "weights": tuple(1.0 for _ in sets),
        "sequence_length": LENGTH,
        "seed": 5,
    }
    return DataConfig(**(settings | changes))
