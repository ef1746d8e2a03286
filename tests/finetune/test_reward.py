"""Reward models: what they learn and report, from where they begin, how they score."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest

import llama_jax
from llama_jax.build import build
from llama_jax.config import LlamaConfig
from llama_jax.config.recipe import RewardRecipe, load_recipe, paper_reward
from llama_jax.data.batch import batch_comparisons
from llama_jax.data.prepared import RATINGS
from llama_jax.errors import CheckpointError, ConfigError, DataError, DialogError
from llama_jax.finetune.preference import MARGINS
from llama_jax.finetune.reward import Preferences, load_reward, train_reward
from llama_jax.finetune.sft import sft
from llama_jax.train.metrics import METRICS, read_metrics
from sharding import MeshConfig, make_mesh, training_rules
from tests import runs
from tests.architecture.tree import ROOT
from tests.data import corpus
from tests.data.comparisons import LENGTH, comparisons, prepare_pairs
from tests.data.dialogs import prepare_chats
from tests.finetune.conftest import chat_model, save_untrained
from tests.parity import tolerances

MESH = MeshConfig(fsdp=4, tensor=2)
USER = {"role": "user", "content": "ba"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tokenizer):
    return prepare_pairs(tmp_path_factory.mktemp("pairs"), tokenizer, num=300)


def recipe(data, **changes) -> RewardRecipe:
    return dataclasses.replace(runs.reward_recipe(data.path, LENGTH), **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pairs, untrained):
    workdir = tmp_path_factory.mktemp("whole")
    assert train_reward(recipe(pairs), workdir, init_from=untrained)
    return workdir


def reports(workdir) -> list[dict]:
    return [r for r in read_metrics(workdir / METRICS) if "accuracy" in r]


def held_out() -> list[dict]:
    """The comparisons of the validation split."""
    return [
        pair
        for pair in comparisons(40, seed=1)
        if (pair.get("chosen_is_safe"), pair.get("rejected_is_safe")) != (False, True)
    ]


def scores_alone(workdir) -> tuple[np.ndarray, np.ndarray]:
    """Of each held-out answer by itself."""
    model = load_reward(workdir)
    return tuple(
        model.score(
            [
                [*pair["messages"], {"role": "assistant", "content": pair[answer]}]
                for pair in held_out()
            ]
        ).astype(np.float64)
        for answer in ("chosen", "rejected")
    )


def test_it_learns_which_answer_is_better(whole):
    first, *_, last = reports(whole)
    assert last["accuracy"] >= 0.95
    assert last["validation_loss"] < first["validation_loss"]
    chosen, rejected = scores_alone(whole)
    assert np.mean(chosen > rejected) == pytest.approx(last["accuracy"])


def test_what_is_reported_is_that_of_each_answer_alone(whole):
    """Packed rows against each dialog by itself, and the formulas in float64."""
    chosen, rejected = scores_alone(whole)
    pairs, told = held_out(), reports(whole)[-1]
    ratings = np.array([RATINGS.index(pair.get("rating")) for pair in pairs])

    def cross_entropy(x):
        return np.log1p(np.exp(-x))

    gap = chosen - rejected
    loss = cross_entropy(gap - MARGINS["small"].astype(np.float64)[ratings]).sum()
    for pair, *both in zip(pairs, chosen, rejected, strict=True):
        for name, score in zip(("chosen", "rejected"), both, strict=True):
            if (safe := pair.get(f"{name}_is_safe")) is not None:
                loss += 0.5 * cross_entropy(score if safe else -score)
    assert told["validation_loss"] == pytest.approx(
        loss / len(pairs), abs=tolerances.ORDER_LOSS
    )

    right = gap > 0
    by_rating = {
        rating or "not rated": right[ratings == number].mean()
        for number, rating in enumerate(RATINGS)
        if (ratings == number).any()
    }
    assert told["accuracy_by_rating"] == pytest.approx(by_rating)
    kinds = {
        (True, False): "safe and unsafe",
        (True, True): "both safe",
        (False, False): "both unsafe",
    }
    labels = [(p.get("chosen_is_safe"), p.get("rejected_is_safe")) for p in pairs]
    by_safety = {
        name: right[[label == kind for label in labels]].mean()
        for kind, name in kinds.items()
        if kind in labels
    }
    assert told["accuracy_by_safety"] == pytest.approx(by_safety)
    unsafe = [
        score < 0
        for label, *both in zip(labels, chosen, rejected, strict=True)
        for safe, score in zip(label, both, strict=True)
        if safe is False
    ]
    assert told["unsafe_recall"] == pytest.approx(np.mean(unsafe))

    sure = 1 / (1 + np.exp(-np.abs(gap)))
    bins = np.minimum(((2 * sure - 1) * 20).astype(int), 19)
    assert told["calibration"]["pairs"] == [
        (bins == b).sum() for b in range(20) if (bins == b).any()
    ]
    error = sum(
        abs((sure[bins == b] - right[bins == b]).sum()) for b in range(20)
    ) / len(pairs)
    assert told["calibration_error"] == pytest.approx(error, abs=1e-5)
    for name, score in (("chosen", chosen), ("rejected", rejected)):
        shares, _ = np.histogram(1 / (1 + np.exp(-score)), bins=20, range=(0, 1))
        assert told["scores"][name] == pytest.approx(shares / len(pairs))


def test_it_begins_as_the_chat_model(pairs, untrained, tmp_path):
    begun = runs.changed(recipe(pairs), "train", checkpoint_every=1, keep_latest=99)
    assert train_reward(begun, tmp_path, init_from=untrained)
    # The first learning rate of a warm-up is 0: the parameters are those given.
    body = runs.saved(tmp_path, 1)
    assert body.pop("/scalar/kernel").shape == (begun.model.dim,)
    leaves, _ = jax.tree_util.tree_flatten_with_path(chat_model().init(seed=3))
    given = {
        f"/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
        for path, leaf in leaves
    }
    del given["/unembed/kernel"]
    runs.require_equal(body, given)


def test_larger_margins_widen_the_scores(pairs, untrained, tmp_path):
    gaps = []
    for margin in ("none", "small", "large"):
        changed = runs.changed(recipe(pairs), "reward", margin=margin)
        assert train_reward(changed, tmp_path / margin, init_from=untrained)
        chosen, rejected = scores_alone(tmp_path / margin)
        gaps.append((chosen - rejected).mean())
    assert gaps[0] < gaps[1] < gaps[2]


def test_stopped_and_resumed_is_bit_exact(whole, pairs, untrained, tmp_path):
    def stop(record):
        if record["step"] == 5 and "loss" in record:
            os.kill(os.getpid(), signal.SIGTERM)

    assert not train_reward(recipe(pairs), tmp_path, init_from=untrained, watch=stop)
    assert train_reward(recipe(pairs), tmp_path)
    last = read_metrics(whole / METRICS)[-1]["step"]
    for item in ("params", "optimizer"):
        runs.require_equal(
            runs.saved(tmp_path, last, item), runs.saved(whole, last, item)
        )


@pytest.mark.parametrize(
    "axes",
    [
        {"fsdp": 8},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"data": 2, "context": 2, "tensor": 2},
    ],
)
def test_every_mesh_gives_the_loss_and_gradient_of_one_device(pairs, axes):
    batch = batch_comparisons(list(pairs.rows("train"))[:8], length=LENGTH)
    rules = training_rules(sequence_parallel=False)
    objective = Preferences(margin="large", safety_weight=0.5)

    def loss_and_grads(mesh):
        sharded = build(
            runs.recipe("data").model,
            mesh,
            rules,
            dtype="float32",
            remat="none",
            head="scalar",
        )
        params = sharded.init(seed=0)
        with jax.set_mesh(mesh):
            return jax.device_get(
                jax.jit(
                    jax.value_and_grad(
                        lambda params: objective.loss(sharded, params, batch)[0]
                    )
                )(params)
            )

    one = loss_and_grads(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    loss, grads = loss_and_grads(make_mesh(MeshConfig(**axes)))
    assert loss == pytest.approx(one[0], rel=tolerances.ORDER_RELATIVE)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerances.ORDER_GRADIENT_RELATIVE * np.abs(b).max()
        ),
        grads,
        one[1],
    )


def test_scores_do_not_depend_on_what_is_scored_beside(whole):
    model = load_reward(whole)
    dialogs = [
        [*pair["messages"], {"role": "assistant", "content": pair["chosen"]}]
        for pair in comparisons(30, seed=5)
    ]
    together = model.score(dialogs)
    alone = np.concatenate([model.score([dialog]) for dialog in dialogs])
    near = {"rtol": 0, "atol": tolerances.ORDER_LOGITS}
    np.testing.assert_allclose(together, alone, **near)
    split = load_reward(whole, mesh=make_mesh(MESH))
    np.testing.assert_allclose(split.score(dialogs), alone, **near)
    assert model.score([]).shape == (0,)


def test_the_papers_numbers():
    def made(about):
        return paper_reward(
            LlamaConfig.llama2_7b(),
            about=about,
            peak_lr=1e-5,
            topology="v5e:8x8",
            mesh=MeshConfig(fsdp=64),
            remat="full",
        )

    helpful, safe = made("helpfulness"), made("safety")
    for recipe in (helpful, safe):
        assert recipe.epochs == 1
        assert recipe.optimizer.final_lr_fraction == 0.1
        assert recipe.optimizer.warmup_fraction == 0.03
        assert recipe.optimizer.warmup_steps == 5
        # Table 6: 798.5 tokens an answer with its dialog.
        num_pairs = recipe.train.batch_size * 4096 / (2 * 798.5)
        assert num_pairs == pytest.approx(512, rel=0.05)
    assert helpful.data.weights == (1, 1)
    assert safe.data.weights == (9, 1)
    for size, peak_lr in (("7b", 1e-5), ("13b", 1e-5), ("34b", 1e-5), ("70b", 5e-6)):
        for about in ("helpfulness", "safety"):
            recipe = load_recipe(f"{ROOT}/configs/chat/llama2_{size}.py:{about}")
            assert recipe.optimizer.peak_lr == peak_lr


class TestErrors:
    def test_it_needs_a_model(self, pairs, tmp_path):
        with pytest.raises(CheckpointError, match="reward modelling goes on from a mo"):
            train_reward(recipe(pairs), tmp_path)

    def test_of_another_tokenizer(self, pairs, tmp_path):
        other = corpus.make_tokenizer(tmp_path, vocab_size=390)
        chat = save_untrained(tmp_path / "chat", other)
        with pytest.raises(DataError, match="was made with another tokenizer"):
            train_reward(recipe(pairs), tmp_path / "run", init_from=chat)

    def test_of_dialogs(self, tokenizer, untrained, tmp_path):
        chats = prepare_chats(tmp_path / "chats", tokenizer, length=LENGTH)
        with pytest.raises(DataError, match="holds dialogs, and reward .* comparisons"):
            train_reward(recipe(chats), tmp_path / "run", init_from=untrained)

    def test_a_reward_model_does_not_write(self, whole, tokenizer, tmp_path):
        with pytest.raises(CheckpointError, match="is a reward model, which scores"):
            llama_jax.load(whole)
        chats = prepare_chats(tmp_path / "chats", tokenizer)
        with pytest.raises(CheckpointError, match="is a reward model, and supervised"):
            sft(
                runs.sft_recipe(chats.path, chats.row_length),
                tmp_path / "run",
                init_from=whole,
            )

    def test_a_model_that_writes_does_not_score(self, untrained):
        with pytest.raises(CheckpointError, match="writes, and no reward model"):
            load_reward(untrained)

    def test_without_its_tokenizer(self, whole):
        kept = (whole / "tokenizer.model").rename(whole / "elsewhere")
        try:
            with pytest.raises(CheckpointError, match="has lost its tokenizer"):
                load_reward(whole)
        finally:
            kept.rename(whole / "tokenizer.model")

    def test_what_cannot_be_scored(self, whole):
        model = load_reward(whole)
        with pytest.raises(DialogError, match="Last message must be from assistant"):
            model.score([[USER]])
        long = {"role": "assistant", "content": "ba " * 400}
        with pytest.raises(DataError, match=r"dialog 0 has \d+ tokens, and the reward"):
            model.score([[USER, long]])

    def test_settings(self, pairs):
        with pytest.raises(ConfigError, match="reward.margin is 'wide'"):
            runs.changed(recipe(pairs), "reward", margin="wide")
        with pytest.raises(ConfigError, match="safety_weight is -1"):
            runs.changed(recipe(pairs), "reward", safety_weight=-1)
        with pytest.raises(ConfigError, match="answers of one row would see each oth"):
            runs.changed(recipe(pairs), "data", segments=False)
        with pytest.raises(ConfigError, match="has no logits to divide"):
            runs.changed(recipe(pairs), "train", loss_chunks=4)
