"""Conversations for tests, and files of them."""

import json
import random
from pathlib import Path

from llama_jax.data import DialogLines, Prepared, prepare_dialogs
from llama_jax.text import Tokenizer
from tests.data.corpus import WORDS

LENGTH = 64


def dialogs(num: int, *, seed: int = 0) -> list[list[dict[str, str]]]:
    """Of one to three turns, some with a system message; answers repeat a word."""
    draw = random.Random(seed)
    made = []
    for _ in range(num):
        messages = []
        if draw.random() < 0.3:
            messages.append({"role": "system", "content": draw.choice(WORDS)})
        for _ in range(draw.randint(1, 2)):
            word = draw.choice(WORDS)
            messages.append({"role": "user", "content": word})
            messages.append({"role": "assistant", "content": f"{word} {word}"})
        made.append(messages)
    return made


def write(path: Path, rows: list) -> Path:
    """As JSON Lines; what is no text yet becomes a dialog's line."""
    lines = [
        row if isinstance(row, str) else json.dumps({"messages": row}) for row in rows
    ]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def prepare_chats(
    directory: Path, tokenizer: Tokenizer, *, num: int = 60, length: int = LENGTH
) -> Prepared:
    """Two files to train on, one held out."""
    directory.mkdir(parents=True, exist_ok=True)
    made = dialogs(num)
    files = [write(directory / f"{i}.jsonl", made[i::2]) for i in range(2)]
    held_out = write(directory / "validation.jsonl", dialogs(10, seed=1))
    return prepare_dialogs(
        {
            "train": [DialogLines(file) for file in files],
            "validation": [DialogLines(held_out)],
        },
        tokenizer,
        directory / "rows",
        row_length=length,
    )
