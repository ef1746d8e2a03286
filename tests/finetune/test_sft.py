"""Supervised fine-tuning: what is learnt, from where it begins, for how long."""

import dataclasses
import json
import math
import os
import signal

import numpy as np
import pytest

import llama_jax
from llama_jax.config import LlamaConfig
from llama_jax.config.recipe import SftRecipe, paper_sft
from llama_jax.data import DialogLines, prepare_dialogs
from llama_jax.errors import CheckpointError, ConfigError, DataError
from llama_jax.finetune.sft import sft
from llama_jax.text import encode_example
from llama_jax.train.metrics import METRICS, read_metrics
from llama_jax.train.pretrain import pretrain
from sharding import MeshConfig
from tests import runs
from tests.data import corpus
from tests.data.dialogs import LENGTH, dialogs, prepare_chats, write
from tests.parity import tolerances

MESH = MeshConfig(fsdp=4, tensor=2)


@pytest.fixture(scope="module")
def chats(tmp_path_factory, tokenizer):
    return prepare_chats(tmp_path_factory.mktemp("chats"), tokenizer, num=200)


def recipe(data, **changes) -> SftRecipe:
    return dataclasses.replace(runs.sft_recipe(data.path, LENGTH), **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, chats, untrained):
    workdir = tmp_path_factory.mktemp("whole")
    assert sft(recipe(chats), workdir, init_from=untrained)
    return workdir


def validation_losses(workdir) -> list[float]:
    records = read_metrics(workdir / METRICS)
    return [r["validation_loss"] for r in records if "validation_loss" in r]


def test_a_base_model_learns_to_answer_and_to_stop(whole):
    losses = validation_losses(whole)
    assert losses[-1] < 0.7 * losses[0], losses
    answer = llama_jax.load(whole).chat(
        [{"role": "user", "content": "ba"}], sampler=llama_jax.Greedy()
    )
    assert answer.finish_reason == "stop"
    assert set(answer.text.split()) <= set(corpus.WORDS)


def test_the_loss_is_that_of_answers_each_dialog_by_itself(whole, tokenizer, chats):
    """Packed rows against every dialog alone, in the reference's float64."""
    llm = llama_jax.load(whole)
    total = count = 0.0
    for dialog in dialogs(10, seed=1):
        tokens, learnt = map(np.array, encode_example(tokenizer, dialog))
        logits = llm.logits(tokens[None])[0].astype(np.float64)
        normaliser = np.log(np.exp(logits).sum(-1))
        surprise = normaliser[:-1] - logits[np.arange(len(tokens) - 1), tokens[1:]]
        total += surprise[learnt[1:]].sum()
        count += learnt.sum()
    assert count == chats.splits["validation"].num_targets
    told = validation_losses(whole)[-1]
    assert told == pytest.approx(total / count, abs=tolerances.ORDER_LOSS)


def test_epochs_become_steps(whole, chats):
    num_rows = chats.splits["train"].num_rows
    resolved = recipe(chats).with_steps(num_rows)
    assert resolved.train.num_steps == math.ceil(3 * num_rows / 8) > 8
    assert resolved.with_steps(1) == resolved
    last = read_metrics(whole / METRICS)[-1]["step"]
    assert last == resolved.train.num_steps
    saved = whole / "checkpoints" / str(last) / "recipe" / "metadata"
    assert json.loads(saved.read_text())["train"]["num_steps"] == last


def test_stopped_and_resumed_is_bit_exact(whole, chats, untrained, tmp_path):
    def stop(record):
        if record["step"] == 5 and "loss" in record:
            os.kill(os.getpid(), signal.SIGTERM)

    assert not sft(recipe(chats), tmp_path, init_from=untrained, watch=stop)
    assert sft(recipe(chats), tmp_path)
    last = read_metrics(whole / METRICS)[-1]["step"]
    for item in ("params", "optimizer"):
        runs.require_equal(
            runs.saved(tmp_path, last, item), runs.saved(whole, last, item)
        )


def test_it_needs_a_model(chats, tmp_path):
    with pytest.raises(CheckpointError, match=r"fine-tuning goes on from a model: .*"):
        sft(recipe(chats), tmp_path)


def test_a_run_of_another_stage_is_not_gone_on_with(whole, chats, tokenizer, tmp_path):
    documents = corpus.prepare_corpus(tmp_path / "rows", tokenizer)
    pretraining = runs.recipe(documents.path, mesh=MESH)
    with pytest.raises(CheckpointError, match=r"stage was supervised .*, now pretr"):
        pretrain(pretraining, whole)
    assert pretrain(runs.changed(pretraining, "train", num_steps=1), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"stage was pretraining, now supervised"):
        sft(recipe(chats), tmp_path / "run", init_from=whole)


def test_something_has_to_be_held_out(tokenizer, untrained, tmp_path):
    file = write(tmp_path / "a.jsonl", dialogs(40))
    prepared = prepare_dialogs(
        {"train": [DialogLines(file)]}, tokenizer, tmp_path / "rows", row_length=LENGTH
    )
    with pytest.raises(DataError, match=r"has no split 'validation': it has 'train'"):
        sft(recipe(prepared), tmp_path / "run", init_from=untrained)


def test_each_stage_refuses_the_data_of_the_other(
    chats, tokenizer, untrained, tmp_path
):
    pretraining = runs.changed(
        runs.recipe(chats.path, mesh=MESH), "data", sequence_length=LENGTH
    )
    with pytest.raises(DataError, match="holds dialogs, and pretraining reads docum"):
        pretrain(pretraining, tmp_path / "run")
    documents = corpus.prepare_corpus(tmp_path / "rows", tokenizer)
    tuning = recipe(documents)
    tuning = runs.changed(tuning, "data", sequence_length=corpus.LENGTH)
    with pytest.raises(DataError, match=r"holds documents, and supervised fine-tuning"):
        sft(tuning, tmp_path / "run", init_from=untrained)


@pytest.mark.parametrize("epochs, steps", [(None, 0), (1, 10)])
def test_steps_or_epochs(chats, epochs, steps):
    train = dataclasses.replace(recipe(chats).train, num_steps=steps)
    with pytest.raises(ConfigError, match="give the one, and None or 0 for the other"):
        recipe(chats, epochs=epochs, train=train)
    with pytest.raises(ConfigError, match="epochs is 0: it has to be positive"):
        recipe(chats, epochs=0)


def test_epochs_are_those_of_the_first_data_set(chats):
    """Of the others as many rows are drawn as their weights say."""
    data = dataclasses.replace(recipe(chats).data, paths=("a", "b"), weights=(9.0, 1.0))
    mixed = dataclasses.replace(recipe(chats), data=data).with_steps(720)
    assert mixed.train.num_steps * 8 == 3 * 720 * 10 / 9
    # In floats 3 * 8 * 0.1 / 0.1 is a little more than 24.
    alone = runs.changed(recipe(chats), "data", weights=(0.1,)).with_steps(8)
    assert alone.train.num_steps == 3


def test_pretraining_counts_steps(chats):
    with pytest.raises(ConfigError, match=r"train.num_steps is 0: pretraining has no"):
        runs.changed(runs.recipe(chats.path), "train", num_steps=0)


def test_the_papers_numbers():
    made = paper_sft(
        LlamaConfig.llama2_7b(), topology="v5e:8x8", mesh=MESH, remat="full"
    )
    optimizer = made.optimizer
    assert (optimizer.peak_lr, optimizer.weight_decay) == (2e-5, 0.1)
    assert (made.train.batch_size, made.data.sequence_length) == (64, 4096)
    assert made.epochs == 2 and made.data.segments
