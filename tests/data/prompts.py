"""Prompts for tests, and files of them."""

import json
import random
from pathlib import Path
from typing import Any

from llama_jax.data import Prepared, PromptLines, prepare_prompts
from llama_jax.text import Tokenizer
from tests.data.corpus import WORDS

LENGTH = 48
MAX_NEW_TOKENS = 12


def prompts(num: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """One to three turns; those about safety hold the last word."""
    draw = random.Random(seed)
    made = []
    for _ in range(num):
        messages = []
        if draw.random() < 0.3:
            messages.append({"role": "user", "content": draw.choice(WORDS)})
            messages.append({"role": "assistant", "content": draw.choice(WORDS)})
        word = draw.choice(WORDS)
        messages.append({"role": "user", "content": word})
        prompt = {"messages": messages}
        if word == WORDS[-1]:
            prompt["about_safety"] = True
        made.append(prompt)
    return made


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As JSON Lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def prepare_questions(
    directory: Path, tokenizer: Tokenizer, *, num: int = 60, num_held_out: int = 11
) -> Prepared:
    """Two files to train on, one held out."""
    directory.mkdir(parents=True, exist_ok=True)
    made = prompts(num)
    parts = {"0": made[::2], "1": made[1::2], "2": prompts(num_held_out, seed=1)}
    files = [
        PromptLines(write(directory / f"{name}.jsonl", part))
        for name, part in parts.items()
    ]
    return prepare_prompts(
        {"train": files[:2], "validation": files[2:]},
        tokenizer,
        directory / "rows",
        row_length=LENGTH,
        max_new_tokens=MAX_NEW_TOKENS,
    )
