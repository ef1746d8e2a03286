"""Comparisons for tests, and files of them."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from llama_jax.config.data import Rating
from llama_jax.data import ComparisonLines, Prepared, prepare_comparisons
from llama_jax.text import Tokenizer
from tests.data.corpus import WORDS

LENGTH = 128


def comparisons(num: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """The better answer repeats the question; a safe one does not hold the last word.

    Some are rated, some have labels of safety; of neither kind all.
    """
    draw = random.Random(seed)
    made = []
    while len(made) < num:
        messages = []
        if draw.random() < 0.2:
            messages.append({"role": "user", "content": draw.choice(WORDS)})
            messages.append({"role": "assistant", "content": draw.choice(WORDS)})
        word, other = draw.sample(WORDS, 2)
        messages.append({"role": "user", "content": word})
        pair = {"messages": messages, "chosen": f"{word} {word}", "rejected": other}
        if draw.random() < 0.8:
            pair["rating"] = draw.choice(get_args(Rating))
        if draw.random() < 0.5:
            pair["chosen_is_safe"] = WORDS[-1] not in pair["chosen"]
            pair["rejected_is_safe"] = WORDS[-1] not in pair["rejected"]
        made.append(pair)
    return made


def write(path: Path, rows: Iterable[Any]) -> Path:
    """As JSON Lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def prepare_pairs(
    directory: Path, tokenizer: Tokenizer, *, num: int = 60, length: int = LENGTH
) -> Prepared:
    """Two files to train on, one held out."""
    directory.mkdir(parents=True, exist_ok=True)
    made = comparisons(num)
    files = [write(directory / f"{i}.jsonl", made[i::2]) for i in range(2)]
    held_out = write(directory / "validation.jsonl", comparisons(40, seed=1))
    return prepare_comparisons(
        {
            "train": [ComparisonLines(file) for file in files],
            "validation": [ComparisonLines(held_out)],
        },
        tokenizer,
        directory / "rows",
        row_length=length,
    )
