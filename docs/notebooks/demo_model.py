"""The model of these notebooks: a small Llama 2 that has read Shakespeare.

It is what the environment variable `LLAMA_CHECKPOINT` names, or the run of `make demo`.
Without either, the first notebook that needs it trains one in less than two minutes, by
the steps that train.ipynb explains, and keeps it in runs/notebook-demo.
"""

import dataclasses
import os
from pathlib import Path

import tensorflow_datasets as tfds

from llama_jax.cli.progress import training_progress
from llama_jax.config.recipe import PretrainRecipe, load_recipe
from llama_jax.data import Prepared, prepare
from llama_jax.data.builders import tfds_splits
from llama_jax.text import Tokenizer, train_tokenizer
from llama_jax.train.pretrain import pretrain

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "runs/notebook-demo"


def checkpoint() -> Path:
    """Where the model is; trains it if there is none."""
    if named := os.environ.get("LLAMA_CHECKPOINT"):
        return Path(named)
    demo = ROOT / "runs/demo"
    if steps(demo):
        return demo
    recipe = short_recipe()
    if recipe.train.num_steps not in steps(RUN):
        print("There is no model yet: training one, which takes a minute or two.")
        prepared_text()
        with training_progress(recipe.train.num_steps) as watch:
            pretrain(recipe, RUN, watch=watch)
    return RUN


def short_recipe() -> PretrainRecipe:
    """The recipe of `make demo`, shorter, for a smaller model."""
    recipe = load_recipe(f"{ROOT}/configs/demo.py:small")
    assert isinstance(recipe, PretrainRecipe)
    num_steps = 500
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, dim=192, hidden_dim=512),
        data=dataclasses.replace(recipe.data, paths=(f"{RUN}/data",)),
        optimizer=dataclasses.replace(recipe.optimizer, peak_lr=2e-3, warmup_steps=50),
        train=dataclasses.replace(
            recipe.train,
            num_steps=num_steps,
            validate_every=num_steps // 2,
            checkpoint_every=num_steps // 5,
            keep_latest=5,
        ),
    )


def prepared_text() -> Prepared:
    """The plays as rows of tokens, for that recipe."""
    recipe = short_recipe()
    tfds.disable_progress_bar()
    plays = tfds_splits("shakespeare", f"{RUN}/tfds")
    vocabulary = RUN / "vocabulary.model"
    if not vocabulary.exists():
        texts = (text for source in plays["train"] for text in source)
        train_tokenizer(texts, vocabulary, vocab_size=recipe.model.vocab_size)
    return prepare(
        plays,
        Tokenizer(vocabulary),
        RUN / "data",
        row_length=recipe.data.sequence_length,
    )


def steps(run: Path) -> list[int]:
    """The steps of a run whose checkpoints are whole."""
    found = (run / "checkpoints").glob("*")
    return sorted(int(path.name) for path in found if path.name.isdecimal())
