"""A tokenizer trained here, for the tests that need no reference data."""

import random

import pytest

from llama_jax.text import Tokenizer, train_tokenizer

SYLLABLES = "ba ce di fo gu han kel mir nos tur wex yal".split()


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Sentences of invented words, so that there is something to merge."""
    draw = random.Random(0)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(300)]
    return [
        "\n".join(
            " ".join(draw.choices(words, k=12)).capitalize()
            + f" {draw.randint(0, 999)}."
            for _ in range(5)
        )
        for _ in range(60)
    ]


@pytest.fixture(scope="session")
def trained(documents: list[str], tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("trained") / "tokenizer.model"
    return train_tokenizer(documents, path, vocab_size=512)
