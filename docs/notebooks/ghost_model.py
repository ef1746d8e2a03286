"""What ghost_attention.ipynb begins with: a small world, and a model that has read it.

The model is the base model of `scripts/chat.sh --tiny`, where that has made one. Else
it is trained by the same recipes, in about four minutes, and kept in
runs/notebook-ghost.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llama_jax.cli.progress import training_progress
from llama_jax.config.recipe import PretrainRecipe, load_recipe
from llama_jax.data import JsonLines, prepare
from llama_jax.text import Tokenizer, train_tokenizer
from llama_jax.train.pretrain import pretrain

# What is in scripts/ is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts import small_world

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "runs/notebook-ghost"
RECIPES = ROOT / "configs/chat/small.py"


def base_model() -> Path:
    """Where the base model is; trains it if there is none."""
    first, second = _recipe("base"), _recipe("base_long")
    first_run, base = RUN / "base-256", RUN / "base"
    of_chat = ROOT / "runs/chat/seed-0/base"
    if not first_run.exists() and _is_trained(of_chat, second):
        return of_chat
    if not _is_trained(base, second):
        print("There is no base model yet: training one, which takes a few minutes.")
        _train(first, first_run, init_from=None)
        _train(second, base, init_from=first_run)
    return base


def world_files() -> Path:
    """The world's documents and dialogs, as `scripts/chat.sh --tiny` has them."""
    files, partial = RUN / "world", RUN / ".world.partial"
    if not files.exists():
        with contextlib.redirect_stdout(None):
            small_world.main([str(partial)])
        partial.replace(files)
    return files


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    partial.replace(path)


def _recipe(name: str) -> PretrainRecipe:
    recipe = load_recipe(f"{RECIPES}:{name}")
    assert isinstance(recipe, PretrainRecipe)
    rows = f"{RUN}/rows-base-{recipe.data.sequence_length}"
    data = dataclasses.replace(recipe.data, paths=(rows,))
    return dataclasses.replace(recipe, data=data)


def _is_trained(run: Path, recipe: PretrainRecipe) -> bool:
    return (run / f"checkpoints/{recipe.train.num_steps}").is_dir()


def _train(recipe: PretrainRecipe, run: Path, *, init_from: Path | None) -> None:
    """Train on the world's documents, or go on with that."""
    files = world_files()
    vocabulary = RUN / "tokenizer.model"
    if not vocabulary.exists():
        spelling = JsonLines(files / "spelling.jsonl")
        train_tokenizer(spelling, vocabulary, vocab_size=recipe.model.vocab_size)
    prepare(
        {
            "train": [JsonLines(files / "documents.jsonl")],
            "validation": [JsonLines(files / "documents_validation.jsonl")],
        },
        Tokenizer(vocabulary),
        recipe.data.paths[0],
        row_length=recipe.data.sequence_length,
    )
    with training_progress(recipe.train.num_steps) as watch:
        if not pretrain(recipe, run, init_from=init_from, watch=watch):
            raise KeyboardInterrupt  # as it was asked to stop; called again, it goes on
