"""Runs from beginning to end: what they leave, and what a second start makes of it."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import signal

import jax
import numpy as np
import pytest

import llama_jax
from llama_jax.checkpoint.arrays import Arrays
from llama_jax.checkpoint.manager import RunCheckpoints
from llama_jax.config.recipe import load_recipe
from llama_jax.data import ValidationData
from llama_jax.errors import CheckpointError, ConfigError, DataError, TrainingError
from llama_jax.train import loop
from llama_jax.train import run as running
from llama_jax.train.layout import check_layout
from llama_jax.train.metrics import METRICS, read_metrics
from llama_jax.train.pretrain import pretrain
from sharding import MeshConfig, ShardingError
from tests import runs
from tests.compilation import compiled_anew
from tests.data import corpus
from tests.parity import tolerances

HALF = runs.NUM_STEPS // 2


def steps(workdir) -> dict[int, dict]:
    return {r["step"]: r for r in read_metrics(workdir / METRICS) if "loss" in r}


def stop_after(step: int):
    """A watcher that asks the run to stop, as a preemption does."""

    def watch(record):
        # The record of a step comes while the next one runs.
        if record["step"] == step - 1 and "loss" in record:
            os.kill(os.getpid(), signal.SIGTERM)

    return watch


@pytest.mark.smoke
def test_a_run_learns_and_says_how(whole):
    measured = steps(whole)
    assert list(measured) == list(range(1, runs.NUM_STEPS + 1))
    assert measured[8]["loss"] < measured[1]["loss"] - 0.3
    assert all(r["applied"] and r["grad_norm"] > 0 for r in measured.values())
    assert measured[2]["learning_rate"] == pytest.approx(5e-3)
    assert measured[8]["num_targets"] == 8 * 16
    assert measured[3]["tokens_per_second"] > 0
    records = read_metrics(whole / METRICS)
    assert [r["step"] for r in records if "validation_loss" in r] == [4, 8]
    (shares,) = (r["time_shares"] for r in records if "time_shares" in r)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares.keys() == {"step", "compile", "data", "save", "validate"}
    assert list((whole / "tensorboard").iterdir())


def test_validation_loss_is_the_mean_over_every_token(whole, data):
    llm = llama_jax.load(whole)
    recipe = runs.recipe(data)
    total = 0.0
    for batch in ValidationData(recipe.data, batch_size=1):
        logits = llm.logits(batch.tokens).astype(np.float64)
        normaliser = np.log(np.exp(logits).sum(-1))
        chosen = np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
        total += ((normaliser - chosen) * batch.weights).sum()
    mean = total / ValidationData(recipe.data, batch_size=1).num_targets
    records = read_metrics(whole / METRICS)
    told = [r["validation_loss"] for r in records if "validation_loss" in r][-1]
    assert told == pytest.approx(mean, abs=tolerances.ORDER_LOSS)


def test_stopped_and_resumed_is_bit_exact(whole, data, tmp_path):
    recipe = runs.recipe(data)
    assert not pretrain(recipe, tmp_path, watch=stop_after(3))
    assert max(steps(tmp_path)) < runs.NUM_STEPS
    assert pretrain(recipe, tmp_path)
    for item in ("params", "optimizer"):
        runs.require_equal(runs.saved(tmp_path, 8, item), runs.saved(whole, 8, item))
    for step, record in steps(tmp_path).items():
        assert record["loss"] == steps(whole)[step]["loss"], step
    assert list(steps(tmp_path)) == list(range(1, runs.NUM_STEPS + 1))


def test_a_finished_run_started_again_changes_nothing(whole, data, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    assert pretrain(runs.recipe(data), tmp_path / "run")
    runs.require_equal(runs.saved(tmp_path / "run", 8), runs.saved(whole, 8))
    assert steps(tmp_path / "run").keys() == steps(whole).keys()


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(fsdp=8),
        MeshConfig(fsdp=2, tensor=4),
        pytest.param(MeshConfig(fsdp=4, context=2), marks=pytest.mark.slow),
        pytest.param(MeshConfig(fsdp=1, tensor=8), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_another_mesh_goes_on_from_the_same_values(whole, data, tmp_path, mesh):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    with compiled_anew() if mesh.context > 1 else contextlib.nullcontext():
        assert pretrain(runs.recipe(data, mesh=mesh), tmp_path / "run")
    after, before = runs.saved(tmp_path / "run", 8), runs.saved(whole, 8)
    for name in before:
        largest = np.abs(before[name]).max()
        np.testing.assert_allclose(
            after[name],
            before[name],
            rtol=0,
            atol=tolerances.ORDER_PARAMS_RELATIVE * largest,
            err_msg=name,
        )


def test_accumulation_gives_the_same_losses(whole, data, tmp_path):
    recipe = runs.changed(
        runs.recipe(data, mesh=MeshConfig(fsdp=4, tensor=2)), "train", accumulate=2
    )
    assert pretrain(recipe, tmp_path)
    for step, record in steps(tmp_path).items():
        expected = steps(whole)[step]["loss"]
        assert record["loss"] == pytest.approx(expected, abs=1e-4), step


def test_init_from_begins_with_those_parameters(whole, data, tmp_path, caplog):
    llm = llama_jax.load(whole)
    llm.save(tmp_path / "params")
    recipe = runs.changed(runs.recipe(data), "train", checkpoint_every=1, keep_latest=8)
    pretrain(recipe, tmp_path / "run", init_from=tmp_path / "params")
    # The first learning rate of a warm-up is 0: the parameters are those given.
    runs.require_equal(runs.saved(tmp_path / "run", 1), runs.saved(whole, 8))
    assert steps(tmp_path / "run")[1]["loss"] < steps(whole)[2]["loss"] - 0.3
    kept = (tmp_path / "run/init_from.txt").read_text()
    assert kept == f"{tmp_path / 'params'}\n"
    # What is given when the run goes on changes nothing, which is said.
    assert "is not read" not in caplog.text
    pretrain(recipe, tmp_path / "run", init_from=whole)
    assert f"{whole} is not read" in caplog.text
    assert (tmp_path / "run/init_from.txt").read_text() == kept


def test_a_run_that_began_with_no_model_reads_none_later(whole, data, tmp_path, caplog):
    recipe = runs.changed(runs.recipe(data), "train", num_steps=1)
    (tmp_path / "init_from.txt").write_text("runs/that-never-was-saved\n")
    pretrain(recipe, tmp_path)
    assert not (tmp_path / "init_from.txt").exists()
    pretrain(recipe, tmp_path, init_from=whole)
    assert "began with no other model" in caplog.text
    assert f"{whole} is not read" in caplog.text


def test_init_from_another_model_is_refused(whole, data, tmp_path):
    recipe = runs.changed(runs.recipe(data), "model", hidden_dim=96)
    with pytest.raises(CheckpointError, match=r"model.hidden_dim is 160, now 96"):
        pretrain(recipe, tmp_path, init_from=whole)


def test_a_run_from_before_there_were_stages_is_resumed(whole, data, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / "run")
    for saved in (tmp_path / "run" / "checkpoints").glob("*/recipe/metadata"):
        content = json.loads(saved.read_text())
        assert content.pop("stage") == "pretraining"
        saved.write_text(json.dumps(content))
    assert pretrain(runs.recipe(data), tmp_path / "run")
    assert "changed recipe" not in caplog.text


@pytest.mark.parametrize("item", ["params", "optimizer"])
def test_what_is_saved_is_not_compressed(whole, item):
    arrays = Arrays(whole / "checkpoints" / str(runs.NUM_STEPS) / item)
    name = "embed.table" if item == "params" else "step"
    assert arrays.open(name).spec().to_json()["metadata"]["compressor"] is None


def test_another_model_is_not_resumed(whole, data):
    recipe = runs.changed(runs.recipe(data), "model", num_kv_heads=2)
    with pytest.raises(CheckpointError, match=r"model.num_kv_heads was 4, now 2"):
        pretrain(recipe, whole)


def test_another_learning_rate_is_allowed_and_said(whole, data, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / "run")
    recipe = runs.changed(runs.recipe(data), "optimizer", peak_lr=2e-3)
    with caplog.at_level(logging.WARNING, "llama_jax"):
        pretrain(recipe, tmp_path / "run")
    assert "optimizer.peak_lr was 0.01, now 0.002" in caplog.text


def damage(workdir, step):
    """Cut a file of arrays in half."""
    files = (workdir / "checkpoints" / str(step) / "params").rglob("d/*")
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_damaged_checkpoint_is_said(whole, data, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    damage(tmp_path / "run", 8)
    with pytest.raises(CheckpointError, match=r"step 8 .* is damaged.*fall_back"):
        pretrain(runs.recipe(data), tmp_path / "run")


def test_fall_back_goes_on_from_the_one_before(whole, data, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / "run")
    damage(tmp_path / "run", 8)
    recipe = runs.changed(runs.recipe(data), "train", on_damaged_checkpoint="fall_back")
    assert pretrain(recipe, tmp_path / "run")
    assert "Falling back" in caplog.text
    runs.require_equal(runs.saved(tmp_path / "run", 8), runs.saved(whole, 8))


def test_a_gradient_spike_stops_the_run_and_keeps_the_last_good(data, tmp_path):
    recipe = runs.changed(runs.recipe(data), "train", spike_norm=1e-3)
    with pytest.raises(TrainingError, match=r"step 1: loss .*--train.on-bad-step skip"):
        pretrain(recipe, tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_bad_steps_can_be_skipped_and_are_counted(data, tmp_path, caplog):
    recipe = runs.changed(
        runs.recipe(data), "train", spike_norm=1e-3, on_bad_step="skip"
    )
    assert pretrain(recipe, tmp_path)
    assert not any(r["applied"] for r in steps(tmp_path).values())
    assert "step 8: loss" in caplog.text and "going on with the next" in caplog.text
    counts = runs.saved(tmp_path, 8, "optimizer")
    assert counts["/num_skipped"] == counts["/step"] == 8
    runs.require_equal(runs.saved(tmp_path, 8), runs.saved(tmp_path, 4))


def test_retention_keeps_the_latest_and_the_period(data, tmp_path):
    recipe = runs.changed(
        runs.recipe(data), "train", checkpoint_every=1, keep_latest=2, keep_period=3
    )
    assert pretrain(recipe, tmp_path)
    left = sorted(int(step.name) for step in (tmp_path / "checkpoints").iterdir())
    assert left == [3, 6, 7, 8]


def test_profile_traces_the_steps_asked_for(data, tmp_path):
    assert pretrain(runs.recipe(data), tmp_path, profile=(2, 3))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_batch_that_does_not_divide_says_what_would(data, tmp_path):
    recipe = runs.changed(runs.recipe(data), "train", batch_size=6)
    with pytest.raises(ShardingError, match=r"batch_size 6 .* a multiple of 4"):
        pretrain(recipe, tmp_path)
    with pytest.raises(ShardingError, match=r"batch_size 6 .* a multiple of 4"):
        check_layout(recipe)


@pytest.mark.parametrize(
    ("part", "values", "mesh", "says"),
    [
        (
            "model",
            {"num_heads": 4, "num_kv_heads": 4},
            {"tensor": 8},
            r"8 devices of mesh axes tensor do not share num_heads 4 and num_kv_heads "
            r"4 evenly: .*one of \[1, 2, 4\]",
        ),
        (
            "model",
            {"dim": 96, "num_heads": 12, "num_kv_heads": 6},
            {"fsdp": 2, "tensor": 4},
            r"4 devices .* num_kv_heads 6 evenly: .*one of \[1, 2, 3, 6, 12\]",
        ),
        ("model", {"hidden_dim": 100}, {"tensor": 8}, r"'mlp' axis of size 100 .* 8"),
        ("model", {"vocab_size": 401}, {"tensor": 8}, r"'vocab' axis of size 401"),
        (
            "model",
            {"dim": 60, "num_heads": 2, "num_kv_heads": 2},
            {"fsdp": 8},
            r"'embed' axis of size 60 .* \[1, 2, 3, 4, 5, 6\]",
        ),
        ("data", {"sequence_length": 12}, {"context": 4, "fsdp": 2}, r"row of 12 .* 8"),
        (
            "data",
            {"sequence_length": 12},
            {"context": 2, "tensor": 4},
            r"row of 12 positions .* 8 devices of mesh axes context x tensor",
        ),
    ],
)
def test_what_does_not_divide_is_refused_before_it_runs(part, values, mesh, says):
    recipe = runs.changed(runs.recipe("data"), part, **values)
    recipe = dataclasses.replace(
        recipe,
        mesh=MeshConfig(**{"fsdp": 1} | mesh),
        sequence_parallel=mesh.get("tensor", 1) > 1 and part == "data",
    )
    with pytest.raises(ShardingError, match=says):
        check_layout(recipe)


@pytest.mark.parametrize(
    ("values", "sizes", "says"),
    [
        ({"loss_chunks": 16}, {"tensor": 2, "fsdp": 4}, r"16 .* 200 pieces .*1, 2, 4"),
        ({"attention": "splash"}, {"fsdp": 8}, r'tiles of .* or attention "dot"'),
    ],
)
def test_what_only_the_compiler_would_find_is_refused_before(values, sizes, says):
    recipe = runs.changed(runs.recipe("data"), "train", **values)
    recipe = dataclasses.replace(recipe, mesh=MeshConfig(**sizes))
    with pytest.raises(ValueError, match=says):
        check_layout(recipe)


def test_a_kernel_for_another_device_is_refused(data, tmp_path):
    recipe = runs.changed(runs.recipe(data), "train", attention="splash")
    with pytest.raises(ConfigError, match="for TPUs, .* cpu: use --train"):
        pretrain(recipe, tmp_path)


def test_data_of_a_larger_vocabulary_are_refused(data, tmp_path):
    recipe = runs.changed(runs.recipe(data), "model", vocab_size=399)
    with pytest.raises(DataError, match=r"400 pieces, and model.vocab_size is 399"):
        pretrain(recipe, tmp_path)


def test_a_run_keeps_its_tokenizer(whole, data, tmp_path):
    """Data of another tokenizer are refused, and nothing of the run is touched."""
    (tmp_path / "made").mkdir()
    other = corpus.make_tokenizer(tmp_path / "made", vocab_size=380)
    rows = corpus.prepare_corpus(tmp_path / "rows", other).path
    before = (whole / "tokenizer.model").read_bytes()
    with pytest.raises(CheckpointError, match="holds a run with another tokenizer"):
        pretrain(runs.recipe(rows), whole)
    with pytest.raises(DataError, match="made with another tokenizer"):
        pretrain(runs.recipe(rows), tmp_path / "run", init_from=whole)
    assert (whole / "tokenizer.model").read_bytes() == before


def test_a_workdir_that_cannot_be_made_is_said(data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be"):
        pretrain(runs.recipe(data), tmp_path / "file")


def test_layout_of_a_pod_is_checked_without_one():
    recipe = load_recipe("configs/pretrain/llama2_70b.py:v5p_256")
    text = check_layout(recipe)
    assert "fsdp 128" in text
    norms = (2 * 80 + 1) * 8192  # whole on every chip
    held = (68_976_648_192 - norms) / 128 + norms
    assert float(text.split("; ")[1].split()[0]) == pytest.approx(
        12 * held / 2**30, abs=0.006
    )
    # Two devices for each of the 8 key/value heads, whose weights are then whole.
    assert "tensor 16" in check_layout(runs.changed(recipe, "mesh", tensor=16, fsdp=8))
    assert math.isclose(recipe.train.num_steps * 256 * 4096, 2e12, rel_tol=1e-5)


@pytest.mark.parametrize("moment", ["compile", "validate", "save"])
def test_a_signal_at_any_moment_saves_and_loses_nothing(
    whole, data, tmp_path, monkeypatch, moment
):
    """SIGTERM comes inside the named work, for the first time that it is done."""
    owner, name = {
        "compile": (running, "make_train_step"),
        "validate": (loop, "validate"),
        "save": (RunCheckpoints, "save"),
    }[moment]
    work = getattr(owner, name)

    def interrupted(*args, **kwargs):
        monkeypatch.setattr(owner, name, work)
        if moment == "compile":
            step = work(*args, **kwargs)

            def first(*inputs):
                os.kill(os.getpid(), signal.SIGTERM)
                return step(*inputs)

            return first
        os.kill(os.getpid(), signal.SIGTERM)
        return work(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    assert not pretrain(runs.recipe(data), tmp_path)
    assert (tmp_path / "checkpoints").exists()
    assert pretrain(runs.recipe(data), tmp_path)
    runs.require_equal(runs.saved(tmp_path, 8), runs.saved(whole, 8))
    assert [steps(tmp_path)[s]["loss"] for s in range(1, 9)] == [
        steps(whole)[s]["loss"] for s in range(1, 9)
    ]


def test_a_last_validation_that_a_signal_ended_is_made_up_for(
    data, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", lambda run, state: None)
        assert not pretrain(runs.recipe(data), tmp_path)
    runs.saved(tmp_path, 8)

    def validated() -> list[int]:
        records = read_metrics(tmp_path / METRICS)
        return [r["step"] for r in records if "validation_loss" in r]

    assert validated() == []
    for _ in range(2):  # once is enough
        assert pretrain(runs.recipe(data), tmp_path)
        assert validated() == [8]


def test_out_of_memory_names_the_remedies(data, tmp_path, monkeypatch):
    def exhausted(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 17 GiB of 16 GiB\nmore")

    monkeypatch.setattr(loop, "train", exhausted)
    match = r"^the training step .*16 GiB\).*--train.remat full"
    with pytest.raises(TrainingError, match=match):
        pretrain(runs.recipe(data), tmp_path)


def test_another_runtime_error_is_not_called_memory(data, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(loop, "train", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: a bug"):
        pretrain(runs.recipe(data), tmp_path)
