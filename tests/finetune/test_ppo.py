"""PPO: what a step learns, what a run does, how it goes on, when it ends."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import llama_jax
from llama_jax.build import build
from llama_jax.checkpoint.params import save_params
from llama_jax.cli import main
from llama_jax.config.recipe import PpoRecipe, load_recipe
from llama_jax.data import Experience
from llama_jax.data.pipeline import ValidationData
from llama_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    TokenizerError,
    TrainingError,
)
from llama_jax.finetune import estimators, ppo, ppo_state
from llama_jax.finetune.experience import make_learnt
from llama_jax.finetune.ppo import PolicyObjective, ValueObjective
from llama_jax.finetune.ppo_state import Best
from llama_jax.finetune.reward import load_reward
from llama_jax.finetune.rollout import Judge, Scores, make_logprobs
from llama_jax.generate import Generator, score
from llama_jax.model.heads import MODELS
from llama_jax.train.metrics import METRICS, read_metrics
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.state import fresh_state
from llama_jax.train.step import make_train_step
from sharding import MeshConfig, ShardingError, make_mesh, training_rules
from tests import runs
from tests.architecture.tree import ROOT
from tests.data import corpus
from tests.data.comparisons import write
from tests.data.dialogs import prepare_chats
from tests.data.prompts import LENGTH, MAX_NEW_TOKENS, prepare_questions, prompts
from tests.finetune.conftest import save_untrained
from tests.parity import tolerances

MODEL = runs.recipe("data").model
ONE = MeshConfig(fsdp=1)


def on(axes: MeshConfig, head="unembed", dtype="float32"):
    """A model on a mesh, and parameters whose probabilities are far from even."""
    devices = jax.devices()[:1] if axes == ONE else None
    sharded = build(
        MODEL,
        make_mesh(axes, devices),
        training_rules(sequence_parallel=False),
        dtype=dtype,
        remat="none",
        head=head,
    )
    return sharded, jax.tree.map(lambda x: 3 * x, sharded.init(seed=1))


def experience(seed=0, num_rows=8) -> Experience:
    """Answers of all lengths that nobody gave, with whatever they teach."""
    rng = np.random.default_rng(seed)
    shape = num_rows, LENGTH
    mask = np.zeros(shape, np.float32)
    for row in mask:
        start = rng.integers(1, LENGTH - 2)
        row[start : rng.integers(start + 1, LENGTH)] = 1
    tokens = rng.integers(3, MODEL.vocab_size, shape, dtype=np.int32)
    normal = [rng.normal(size=shape).astype(np.float32) for _ in range(3)]
    advantages, values, returns = (mask * x for x in normal)
    return Experience(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        mask=mask,
        logprobs=mask * (np.log(1 / 400) + rng.normal(size=shape)).astype(np.float32),
        advantages=advantages,
        values=values,
        returns=returns,
    )


OBJECTIVES = {
    "unembed": PolicyObjective(clip=0.2),
    "scalar": ValueObjective(clip=0.2),
}


def loss_and_grads(axes, head, *, loss_chunks=1):
    sharded, params = on(axes, head)
    sharded = dataclasses.replace(sharded, loss_chunks=loss_chunks)
    batch = experience()
    with jax.set_mesh(sharded.mesh):
        program = jax.jit(
            jax.value_and_grad(
                lambda params: OBJECTIVES[head].loss(sharded, params, batch),
                has_aux=True,
            )
        )
        return jax.device_get(program(params))


@functools.cache
def explicit(head):
    """Without a mesh, and with logits that exist whole: estimators of the result."""
    _, params = on(ONE, head)
    params, batch = jax.device_get(params), experience()

    def loss(params):
        made = MODELS[head](MODEL).apply({"params": params}, batch.tokens)
        if head == "scalar":
            like = made, batch.values, batch.returns, batch.mask
            return estimators.clipped_value_loss(*like, clip=0.2).loss, made
        logprobs = jnp.take_along_axis(
            jax.nn.log_softmax(made), batch.targets[..., None], axis=-1
        )[..., 0]
        like = logprobs, batch.logprobs, batch.advantages, batch.mask
        return estimators.clipped_policy_loss(*like, clip=0.2).loss, logprobs

    return jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))


def require_explicit(head, axes, **options):
    (loss, weight), grads = loss_and_grads(axes, head, **options)
    (expected, _), expected_grads = explicit(head)
    assert weight == experience().mask.sum()
    assert loss == pytest.approx(expected, rel=tolerances.ORDER_GRADIENT_RELATIVE)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a,
            b,
            rtol=0,
            atol=tolerances.ORDER_GRADIENT_RELATIVE * np.abs(b).max(),
        ),
        grads,
        expected_grads,
    )


@pytest.mark.parametrize("head", OBJECTIVES)
@pytest.mark.parametrize(
    "axes",
    [
        {"data": 2, "fsdp": 1, "context": 2, "tensor": 2},
        pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_loss_and_gradient_on_every_mesh(axes, head):
    require_explicit(head, MeshConfig(**axes))


@functools.cache
def updated(axes: MeshConfig, head):
    """Parameters after two steps on answers that stay the same."""
    sharded, params = on(axes, head)
    recipe = runs.ppo_recipe("data", LENGTH, helpfulness="h", safety="s")
    recipe = runs.changed(recipe, "optimizer", peak_lr=1e-3)
    optimizer = make_optimizer(recipe.optimizer, recipe.train.num_steps)
    step = make_train_step(
        sharded,
        optimizer,
        make_schedule(recipe.optimizer, recipe.train.num_steps),
        accumulate=1,
        spike_norm=recipe.train.spike_norm,
        objective=OBJECTIVES[head],
    )
    rows, batches = ppo.make_rows(sharded), experience(num_rows=16)
    state = fresh_state(sharded, optimizer, params)
    with jax.set_mesh(sharded.mesh):
        for numbers in (range(8), range(8, 16)):
            state, measured = step(state, rows(batches, np.array(numbers)))
            assert bool(measured.applied)
    return jax.device_get(state.params)


@pytest.mark.parametrize("head", OBJECTIVES)
@pytest.mark.parametrize(
    "axes",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"data": 2, "context": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_updates_are_those_of_one_device(axes, head):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerances.ORDER_PARAMS_RELATIVE * np.abs(b).max()
        ),
        updated(MeshConfig(**axes), head),
        updated(ONE, head),
    )


def test_loss_and_gradient_of_logits_that_never_exist_whole():
    require_explicit("unembed", ONE, loss_chunks=4)


def test_the_policys_loss_in_float64():
    sharded, params = on(ONE)
    batch, objective = experience(), OBJECTIVES["unembed"]
    (_, logprobs), _ = explicit("unembed")
    ratio = np.exp(logprobs.astype(np.float64) - batch.logprobs)
    gains = np.minimum(
        ratio * batch.advantages, np.clip(ratio, 0.8, 1.2) * batch.advantages
    )
    with jax.set_mesh(sharded.mesh):
        sums = jax.jit(lambda params: objective.measure(sharded, params, batch))(params)
    expected = -(gains * batch.mask).sum()
    assert float(sums["loss"]) == pytest.approx(expected, rel=1e-5)
    # What has no gradient: beyond the clip, on the side that the advantage wants.
    clipped = (ratio > 1.2) & (batch.advantages > 0)
    clipped |= (ratio < 0.8) & (batch.advantages < 0)
    assert float(sums["clipped"]) == (clipped * batch.mask).sum() > 0
    report = objective.report(jax.device_get(sums))
    assert report["clipped"] == pytest.approx(clipped.sum() / batch.mask.sum())
    kl = ((ratio - 1 - np.log(ratio)) * batch.mask).sum() / batch.mask.sum()
    assert report["update_kl"] == pytest.approx(kl, rel=1e-4)


def test_the_critics_loss_in_float64():
    (loss, values), _ = explicit("scalar")
    batch, values = experience(), values.astype(np.float64)
    near = np.clip(values, batch.values - 0.2, batch.values + 0.2)
    errors = np.maximum((values - batch.returns) ** 2, (near - batch.returns) ** 2)
    assert loss == pytest.approx((errors * batch.mask).sum() / 2, rel=1e-5)


def test_before_the_first_update_nothing_is_clipped():
    """The old probabilities are those of the step, so that their ratio is 1."""
    sharded, params = on(MeshConfig(fsdp=4, tensor=2))
    batch = experience()
    with jax.set_mesh(sharded.mesh):
        logprobs, reference = make_logprobs(sharded)(params, params, batch.tokens)
    np.testing.assert_array_equal(logprobs, reference)
    padded = np.pad(np.asarray(logprobs), ((0, 0), (0, 1)))
    batch = dataclasses.replace(batch, logprobs=padded * batch.mask)
    objective = PolicyObjective(clip=0.2)
    with jax.set_mesh(sharded.mesh):
        sums = jax.jit(lambda params: objective.measure(sharded, params, batch))(params)
    assert float(sums["clipped"]) == 0
    assert abs(float(sums["kl"])) < 1e-6
    assert float(sums["loss"]) == pytest.approx(-batch.advantages.sum(), abs=1e-4)


def test_the_reference_is_what_the_policy_began_as_to_the_bit():
    """Though it is kept in the type of the arithmetic."""
    sharded, params = on(MeshConfig(fsdp=8), dtype="bfloat16")
    params["final_norm"]["scale"] *= 1.01  # norms are ones at first
    reference = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    with jax.set_mesh(sharded.mesh):
        both = make_logprobs(sharded)(params, reference, experience().tokens)
    np.testing.assert_array_equal(*both)


def test_what_answers_teach_is_what_the_estimators_say():
    sharded, _ = on(MeshConfig(fsdp=8))
    options = runs.ppo_recipe("data", LENGTH, helpfulness="h", safety="s").ppo
    options = dataclasses.replace(options, beta=0.3, gamma=0.9, lam=0.7)
    like, rng = experience(), np.random.default_rng(3)
    scores = rng.normal(size=8).astype(np.float32)
    reference = rng.normal(size=like.mask.shape).astype(np.float32)[:, :-1]
    learnt, kl = make_learnt(sharded, options)(
        like.tokens, like.mask, like.logprobs[:, :-1], reference, like.values, scores
    )
    mask, old = np.float64(like.mask), np.float64(like.logprobs)
    divergence = mask * (old - np.pad(reference, ((0, 0), (0, 1))))
    white = (scores - scores.mean()) / scores.std()
    assert float(kl) == pytest.approx(divergence.sum() / 8, rel=1e-5)
    for row in range(8):
        (places,) = np.nonzero(mask[row])
        rewards = -0.3 * divergence[row, places]
        rewards[-1] += white[row]
        values = np.append(like.values[row, places], 0)
        advantage = 0.0
        for i in range(len(places))[::-1]:
            error = rewards[i] + 0.9 * values[i + 1] - values[i]
            advantage = error + 0.9 * 0.7 * advantage
            found = np.asarray(learnt.advantages)[row, places[i]]
            assert found == pytest.approx(advantage, rel=1e-6, abs=1e-6)
    np.testing.assert_allclose(
        learnt.returns, learnt.advantages + like.values, atol=1e-6
    )
    assert learnt.tokens.is_fully_replicated


# Runs. Compiling is what costs: runs that differ in nothing that is compiled share it.


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    made = {}

    def make(recipe, policy, critic):
        key = json.dumps(
            [repr(recipe.optimizer), recipe.ppo.critic_lr, repr(recipe.mesh)]
        )
        if key not in made:
            made[key] = original(recipe, policy, critic)
        return dataclasses.replace(made[key], learnt=make_learnt(policy, recipe.ppo))

    original = ppo.make_programs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "make_programs", make)
        yield


@pytest.fixture(scope="module")
def questions(tmp_path_factory, tokenizer):
    return prepare_questions(tmp_path_factory.mktemp("questions"), tokenizer)


def save_reward(path, tokenizer, *, seed=4, **sizes):
    """The checkpoint of a reward model that nobody trained."""
    config = dataclasses.replace(MODEL, **sizes)
    mesh, rules = make_mesh(MeshConfig(fsdp=8)), training_rules(sequence_parallel=False)
    model = build(config, mesh, rules, dtype="float32", remat="none", head="scalar")
    save_params(path, model.init(seed=seed), config, tokenizer)
    return path


@pytest.fixture(scope="module")
def rewards(tmp_path_factory, tokenizer):
    directory = tmp_path_factory.mktemp("rewards")
    return {
        "helpfulness": save_reward(directory / "helpfulness", tokenizer),
        "safety": save_reward(directory / "safety", tokenizer, seed=5),
    }


@pytest.fixture(scope="module")
def recipe(questions, rewards) -> PpoRecipe:
    return runs.ppo_recipe(questions.path, LENGTH, **rewards)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, recipe, untrained):
    workdir = tmp_path_factory.mktemp("whole")
    assert ppo.ppo(recipe, workdir, init_from=untrained)
    return workdir


def told(workdir, name) -> list:
    return [r[name] for r in read_metrics(workdir / METRICS) if name in r]


def test_each_iteration_and_each_step_are_told(whole):
    assert told(whole, "iteration") == [1, 2]
    assert told(whole, "kl")[0] == 0  # the policy is the reference still
    assert told(whole, "kl")[1] != 0
    for name in ("loss", "value_loss", "value_grad_norm"):
        assert len(told(whole, name)) == 8
    for name in ("clipped", "update_kl", "validation_reward", "cut", "reshard_seconds"):
        assert len(told(whole, name)) == 2
    assert 1 < told(whole, "answer_length")[0] <= MAX_NEW_TOKENS
    for name in ("reward", "helpfulness", "safety"):
        assert 0 < told(whole, name)[0] < 1


def test_what_is_saved_is_the_policy(whole):
    answer = llama_jax.load(whole).chat([{"role": "user", "content": "ba"}])
    assert answer.finish_reason in ("stop", "length")


def test_stopped_within_an_iteration_and_resumed_is_bit_exact(
    whole, recipe, untrained, tmp_path
):
    def stop(record):
        if record["step"] == 5 and "loss" in record:
            os.kill(os.getpid(), signal.SIGTERM)

    assert not ppo.ppo(recipe, tmp_path, init_from=untrained, watch=stop)
    (stopped,) = {6, 7} & set(map(int, os.listdir(tmp_path / "checkpoints")))
    assert stopped % 4
    assert ppo.ppo(recipe, tmp_path)  # which knows where the policy came from
    for item in ("params", "optimizer"):
        runs.require_equal(runs.saved(tmp_path, 8, item), runs.saved(whole, 8, item))
    for name in ("loss", "value_loss", "reward", "validation_reward"):
        assert told(tmp_path, name) == told(whole, name)


def test_stopped_while_answering_and_resumed_is_bit_exact(
    whole, recipe, untrained, tmp_path, monkeypatch
):
    rare = runs.changed(recipe, "train", checkpoint_every=1000)

    def answer_and_stop(self, rows, about_safety):
        if told(tmp_path, "iteration"):  # the first one is over
            os.kill(os.getpid(), signal.SIGTERM)
        return scores(self, rows, about_safety)

    scores = Judge.scores
    monkeypatch.setattr(Judge, "scores", answer_and_stop)
    assert not ppo.ppo(rare, tmp_path, init_from=untrained)
    monkeypatch.undo()
    assert ppo.ppo(rare, tmp_path)
    for item in ("params", "optimizer"):
        runs.require_equal(runs.saved(tmp_path, 8, item), runs.saved(whole, 8, item))


def by_rule(self, rows, about_safety):
    """In place of reward models: how many of the last tokens are of the first ids."""
    del about_safety
    score = np.array(
        [np.mean(np.array(row[-MAX_NEW_TOKENS:-1]) < 100) * 8 - 4 for row in rows],
        np.float32,
    )
    return Scores(score, score, score)


@pytest.fixture(scope="module")
def longer(recipe):
    """Six iterations."""
    longer = runs.changed(
        recipe, "train", num_steps=24, checkpoint_every=24, validate_every=24
    )
    return runs.changed(longer, "ppo", beta=0.0)


@pytest.mark.parametrize("kind", ["helpfulness", "safety"])
def test_the_critic_begins_as_a_reward_model(
    recipe, rewards, untrained, tmp_path, monkeypatch, kind
):
    def look(reader, policy, critic, *args):
        found.append(jax.device_get(critic))

    found = []
    monkeypatch.setattr(ppo, "gather", look)  # and is as if asked to stop
    recipe = runs.changed(recipe, "ppo", critic=kind)
    assert not ppo.ppo(recipe, tmp_path, init_from=untrained)
    jax.tree.map(
        np.testing.assert_array_equal, found[0], load_reward(rewards[kind]).params
    )


def broken_critic(reader, policy, critic, batch, position):
    """Answers whose returns are no numbers, in place of those of an iteration."""
    gathered = experience(num_rows=len(batch.lengths))
    return dataclasses.replace(gathered, returns=gathered.returns * np.nan), {}


def test_a_bad_step_of_the_critic_stops(recipe, untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "gather", broken_critic)
    with pytest.raises(TrainingError, match="of the critic: loss nan.*not applied"):
        ppo.ppo(recipe, tmp_path, init_from=untrained)
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]


def test_a_bad_step_of_the_critic_is_skipped(
    recipe, rewards, untrained, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(ppo, "gather", broken_critic)
    recipe = runs.changed(recipe, "train", on_bad_step="skip")
    assert ppo.ppo(recipe, tmp_path, init_from=untrained)
    assert caplog.text.count("of the critic: loss nan") == 8
    saved = runs.saved(tmp_path, 8, "optimizer")
    kernel = load_reward(rewards["helpfulness"]).params["scalar"]["kernel"]
    np.testing.assert_array_equal(saved["/critic/params/scalar/kernel"], kernel)
    assert len(told(tmp_path, "loss")) == 8 and not told(tmp_path, "value_loss")


def test_what_is_rewarded_becomes_more_frequent(
    longer, untrained, tmp_path, monkeypatch
):
    monkeypatch.setattr(Judge, "scores", by_rule)
    assert ppo.ppo(longer, tmp_path / "free", init_from=untrained)
    free = told(tmp_path / "free", "reward")
    assert free[-1] > free[0] + 0.1, free
    held = runs.changed(longer, "ppo", beta=1.0)
    assert ppo.ppo(held, tmp_path / "held", init_from=untrained)
    assert told(tmp_path / "held", "kl")[-1] < 0.5 * told(tmp_path / "free", "kl")[-1]


def test_it_stops_early(recipe, untrained, tmp_path, monkeypatch, caplog):
    """Once held-out prompts have not been rewarded better for long."""
    calls = iter(np.linspace(3, -3, 1000))

    def worse_and_worse(self, rows, about_safety):
        score = np.full(len(rows), next(calls), np.float32)
        score[0] += 1
        return Scores(score, score, score)

    monkeypatch.setattr(Judge, "scores", worse_and_worse)
    patient = runs.changed(
        recipe, "train", num_steps=40, validate_every=2, checkpoint_every=1
    )
    patient = runs.changed(patient, "train", keep_latest=1)
    patient = runs.changed(patient, "ppo", patience=2)
    assert ppo.ppo(patient, tmp_path, init_from=untrained)
    assert len(told(tmp_path, "validation_reward")) == 3
    assert told(tmp_path, "loss")[-1] is not None and len(told(tmp_path, "loss")) == 6
    assert "Stopped early at step 6" in caplog.text
    assert "after step 2, and 2 passes since" in caplog.text
    assert set(os.listdir(tmp_path / "checkpoints")) == {"2", "6"}
    best = ppo_state.best_policy(tmp_path, patience=2, max_kl=None)
    assert best == epath.Path(tmp_path / "checkpoints/2")
    assert ppo_state.best_policy(tmp_path, None, None) == epath.Path(tmp_path)
    none_within = ppo_state.best_policy(tmp_path, patience=2, max_kl=-1.0)
    assert str(none_within) == str(untrained)
    assert ppo.ppo(patient, tmp_path)  # and is at its end
    assert len(told(tmp_path, "loss")) == 6


def test_a_last_pass_that_a_signal_ended_is_made_up_for(
    recipe, untrained, tmp_path, monkeypatch
):
    short = runs.changed(
        recipe, "train", num_steps=4, validate_every=4, checkpoint_every=4
    )
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "held_out_pass", lambda *args: None)
        assert not ppo.ppo(short, tmp_path, init_from=untrained)
    assert told(tmp_path, "validation_reward") == []
    assert len(told(tmp_path, "loss")) == 4
    assert ppo.ppo(short, tmp_path)
    assert len(told(tmp_path, "validation_reward")) == 1
    assert len(told(tmp_path, "loss")) == 4


def test_a_run_that_is_past_its_last_step_is_at_its_end(
    recipe, untrained, tmp_path, monkeypatch
):
    asked = runs.changed(
        recipe, "train", num_steps=12, validate_every=8, checkpoint_every=8
    )
    with monkeypatch.context() as patch:  # a signal comes at step 8
        patch.setattr(ppo, "held_out_pass", lambda *args: None)
        assert not ppo.ppo(asked, tmp_path, init_from=untrained)
    fewer = runs.changed(asked, "train", num_steps=4, validate_every=3)
    assert ppo.ppo(fewer, tmp_path)
    assert len(told(tmp_path, "loss")) == 8


def test_far_from_the_reference_no_reward_counts(
    longer, untrained, tmp_path, monkeypatch, caplog
):
    """However well held-out prompts are rewarded, as where reward models err."""
    monkeypatch.setattr(Judge, "scores", by_rule)
    free = runs.changed(longer, "train", validate_every=4, checkpoint_every=4)
    free = runs.changed(free, "train", keep_latest=1)
    free = runs.changed(free, "ppo", patience=2)
    assert ppo.ppo(free, tmp_path / "free", init_from=untrained)
    kl, rewards = (
        told(tmp_path / "free", f"validation_{name}") for name in ("kl", "reward")
    )
    assert rewards[:3] == sorted(rewards[:3]) and kl[:3] == sorted(kl[:3])
    assert "Stopped" not in caplog.text and len(kl) > 3

    held = runs.changed(free, "ppo", max_kl=float(np.mean(kl[:2])))
    assert ppo.ppo(held, tmp_path / "held", init_from=untrained)
    assert told(tmp_path / "held", "validation_kl") == kl[:3]
    assert "Stopped early at step 12" in caplog.text
    assert f"best, with {rewards[0]:.4f}, after step 4" in caplog.text
    assert f"{kl[2]:.2f} nats from the reference, beyond ppo.max_kl" in caplog.text
    assert ppo.ppo(held, tmp_path / "held")  # and is at its end
    with pytest.raises(CheckpointError, match=r"max_kl was [\d.]+, now None"):
        ppo.ppo(free, tmp_path / "held")


def test_the_divergence_of_held_out_answers(whole, recipe, questions, untrained):
    """It is that of each answer, told by generation's own programs."""
    policy, reference = llama_jax.load(whole), llama_jax.load(untrained)
    asked = [
        row[:length].tolist()
        for batch in ValidationData(recipe.data, batch_size=recipe.ppo.decode_batch)
        for row, length in zip(batch.tokens, batch.lengths, strict=True)
        if length
    ]
    assert len(asked) % recipe.train.batch_size  # the last step has fewer
    last = -(recipe.train.seed << 32)
    answers = policy.generate(
        asked,
        max_new_tokens=MAX_NEW_TOKENS,
        sampler=llama_jax.TopP(1.0, temperature=1.0),
        seed=list(range(last - len(asked), last)),
    )
    rows = [
        [
            *ids,
            *answer.tokens,
            *[policy.tokenizer.eos_id] * (answer.finish_reason == "stop"),
        ]
        for ids, answer in zip(asked, answers, strict=True)
    ]
    ours, theirs = (
        [
            sum(logprobs[len(ids) - 1 :])
            for ids, logprobs in zip(
                asked, score.token_logprobs(model.engine, rows), strict=True
            )
        ]
        for model in (policy, reference)
    )
    expected = np.mean(np.subtract(ours, theirs))
    assert abs(expected) > 0.01
    assert told(whole, "validation_kl")[-1] == pytest.approx(expected, abs=1e-4)


def test_the_commands(recipe, questions, tokenizer, untrained, tmp_path, capsys):
    files = [
        write(tmp_path / f"{name}.jsonl", prompts(num, seed=num))
        for name, num in (("train", 40), ("validation", 9))
    ]
    words = ["data", "prompts", "--train", str(files[0]), "--validation", str(files[1])]
    words += ["--tokenizer", str(questions.path / "tokenizer.model")]
    words += ["--output", str(tmp_path / "rows"), "--row-length", str(LENGTH)]
    words += ["--max-new-tokens", str(MAX_NEW_TOKENS)]
    assert main([*words, "--dry-run"]) == 0
    assert not (tmp_path / "rows").exists()
    assert main(words) == 0
    assert re.search(
        r"train: \d+ prompts, .* tokens in \d+ rows; \d+ more are too",
        (capsys.readouterr().out),
    )
    assert main(["inspect", str(tmp_path / "rows")]) == 0
    assert "prompts" in capsys.readouterr().out

    (tmp_path / "learning.py").write_text(
        "from tests import runs\n\n\ndef tiny():\n    return runs.ppo_recipe("
        f"{str(tmp_path / 'rows')!r}, {LENGTH}, **{rewards_of(recipe)!r})\n"
    )
    words = ["train", f"{tmp_path}/learning.py:tiny", "--init-from", str(untrained)]
    words += ["--workdir", str(tmp_path / "run")]
    assert main([*words, "--dry-run"]) == 0
    assert "for the policy, as much for the critic" in capsys.readouterr().out
    assert main([*words, "--train.num-steps", "4"]) == 0
    said = capsys.readouterr().out
    assert "iteration 1: reward 0." in said and "divergence 0.00 nats" in said
    assert re.search(r"s to answer, \d+\.\d of them to copy the policy", said)
    assert "step 4: reward of held-out prompts 0." in said
    assert "Talk to it: llama-jax chat" in said


def rewards_of(recipe) -> dict[str, str]:
    return {name: getattr(recipe.ppo, name) for name in ("helpfulness", "safety")}


def test_the_best_pass():
    best = Best().after(0.5, 4).after(0.4, 8).after(0.5, 12)
    assert best == Best(np.float32(0.5), step=4, seen=12, num_worse=2)
    assert best.after(0.6, 16) == Best(np.float32(0.6), step=16, seen=16)
    assert str(best).endswith(
        "0.5000, after step 4, and 2 passes since have not beaten it"
    )
    none = Best().after(-np.inf, 4).after(-np.inf, 8)
    assert str(none).startswith("none of 2 passes over held-out prompts was within")


def test_the_papers_numbers():
    for size in ("7b", "13b", "34b", "70b"):
        made = load_recipe(f"{ROOT}/configs/chat/llama2_{size}.py:ppo")
        assert isinstance(made, PpoRecipe)
        optimizer, options = made.optimizer, made.ppo
        assert (optimizer.peak_lr, optimizer.final_lr_fraction) == (1e-6, 1.0)
        assert (optimizer.warmup_steps, optimizer.warmup_fraction) == (0, 0)
        assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.95, 1e-5)
        assert (optimizer.weight_decay, optimizer.clip_norm) == (0.1, 1.0)
        assert (options.prompts, made.train.batch_size) == (512, 64)
        assert made.iteration_steps == 8
        assert 200 <= made.train.num_steps / made.iteration_steps <= 400
        assert options.beta == (0.01 if size in ("7b", "13b") else 0.005)
        assert (options.clip, options.threshold) == (0.2, 0.15)
        assert (options.gamma, options.lam) == (1.0, 0.95)
        assert options.max_new_tokens <= 1024


class TestErrors:
    def test_it_needs_a_model(self, recipe, tmp_path):
        with pytest.raises(
            CheckpointError, match="reinforcement learning goes on from"
        ):
            ppo.ppo(recipe, tmp_path)

    def test_a_reward_model_does_not_write(self, recipe, rewards, tmp_path):
        with pytest.raises(CheckpointError, match="is a reward model, and reinforceme"):
            ppo.ppo(recipe, tmp_path, init_from=rewards["safety"])

    def test_a_model_that_writes_does_not_score(self, recipe, untrained, tmp_path):
        wrong = runs.changed(recipe, "ppo", safety=str(untrained))
        with pytest.raises(CheckpointError, match="writes, and no reward model"):
            ppo.ppo(wrong, tmp_path, init_from=untrained)

    def test_a_reward_model_that_is_not_there(self, recipe, untrained, tmp_path):
        wrong = runs.changed(recipe, "ppo", helpfulness="nowhere")
        with pytest.raises(CheckpointError, match="nowhere does not exist"):
            ppo.ppo(wrong, tmp_path, init_from=untrained)

    def test_other_tokenizers(self, recipe, untrained, tmp_path):
        other = corpus.make_tokenizer(tmp_path, vocab_size=390)
        chat = save_untrained(tmp_path / "chat", other)
        with pytest.raises(DataError, match="was made with another tokenizer"):
            ppo.ppo(recipe, tmp_path / "run", init_from=chat)
        reward = save_reward(tmp_path / "reward", other)
        for name in ("safety", "helpfulness"):
            wrong = runs.changed(recipe, "ppo", **{name: str(reward)})
            with pytest.raises(
                TokenizerError, match=r"reward model .*reward has anoth"
            ):
                ppo.ppo(wrong, tmp_path / "run", init_from=untrained)

    def test_a_reward_model_that_reads_too_little(
        self, recipe, tokenizer, untrained, tmp_path
    ):
        short = save_reward(tmp_path / "short", tokenizer, max_length=32)
        wrong = runs.changed(recipe, "ppo", safety=str(short))
        with pytest.raises(ConfigError, match="reads 32 tokens, and data.sequence_len"):
            ppo.ppo(wrong, tmp_path / "run", init_from=untrained)

    def test_of_dialogs(self, recipe, tokenizer, untrained, tmp_path):
        chats = prepare_chats(tmp_path / "chats", tokenizer, length=LENGTH)
        wrong = runs.changed(recipe, "data", paths=(str(chats.path),))
        with pytest.raises(
            DataError, match="holds dialogs, and reinforcement .* prompts"
        ):
            ppo.ppo(wrong, tmp_path / "run", init_from=untrained)

    def test_answers_that_do_not_fit(self, recipe, untrained, tmp_path, monkeypatch):
        def exhausted(*args):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 17 GiB of 16 GiB")

        monkeypatch.setattr(Generator, "generate", exhausted)
        match = r"^the writing of answers .*17 GiB.* a smaller --ppo.decode-batch"
        with pytest.raises(TrainingError, match=match):
            ppo.ppo(recipe, tmp_path, init_from=untrained)

    def test_prompts_that_leave_too_little_room(self, recipe, untrained, tmp_path):
        wrong = runs.changed(recipe, "ppo", max_new_tokens=MAX_NEW_TOKENS + 1)
        with pytest.raises(
            DataError, match="with max_new_tokens 12, and ppo.max_new_t"
        ):
            ppo.ppo(wrong, tmp_path, init_from=untrained)

    def test_devices_that_do_not_share_the_heads(self, recipe, untrained, tmp_path):
        wrong = runs.changed(recipe, "ppo", decode_tensor=3)
        with pytest.raises(
            ShardingError, match="which does not divide the 8 there are"
        ):
            ppo.ppo(wrong, tmp_path, init_from=untrained)

    def test_a_run_that_began_otherwise(self, whole, recipe, untrained, tmp_path):
        sharded, params = on(MeshConfig(fsdp=8))
        other = tmp_path / "other"
        save_params(other, params, sharded.config, None)
        with pytest.raises(CheckpointError, match="began otherwise: reference was"):
            ppo.ppo(recipe, whole, init_from=other)
        swapped = runs.changed(recipe, "ppo", safety=recipe.ppo.helpfulness)
        with pytest.raises(CheckpointError, match="began otherwise: safety was"):
            ppo.ppo(swapped, whole)
        for part, name, value in [
            ("ppo", "prompts", 16),
            ("ppo", "threshold", 0.25),
            ("ppo", "temperature", 0.5),
            ("ppo", "max_new_tokens", MAX_NEW_TOKENS - 1),
            ("train", "seed", 99),
        ]:
            before = getattr(getattr(recipe, part), name)
            with pytest.raises(
                CheckpointError, match=f"otherwise: {name} was {before}, now {value}"
            ):
                ppo.ppo(runs.changed(recipe, part, **{name: value}), whole)

    def test_a_run_that_is_none_of_ppo(self, whole, recipe, untrained, tmp_path):
        run = shutil.copytree(whole, tmp_path / "run")
        (run / "ppo.json").write_text("[]")
        with pytest.raises(CheckpointError, match="it is no object"):
            ppo.ppo(recipe, run)
        (run / "ppo.json").unlink()
        with pytest.raises(CheckpointError, match="has checkpoints and no ppo.json"):
            ppo.ppo(recipe, run, init_from=untrained)
        assert not (run / "ppo.json").exists()

    @pytest.mark.parametrize(
        "part, values, message",
        [
            ("ppo", {"prompts": 30}, "30 is no multiple of train.batch_size 8"),
            ("train", {"num_steps": 6}, "6, and an iteration has 4 steps"),
            ("train", {"num_steps": 0}, "0, and an iteration has 4 steps"),
            ("ppo", {"max_new_tokens": LENGTH}, "leaves no room for a prompt"),
            ("data", {"segments": True}, "a row holds a single prompt"),
            ("ppo", {"critic": "both"}, "ppo.critic is 'both': it must be one of"),
            ("ppo", {"clip": 1.0}, "ppo.clip is 1.0: it must be above 0 and below 1"),
            ("ppo", {"threshold": 0.0}, "ppo.threshold is 0.0"),
            ("ppo", {"gamma": 1.1}, "ppo.gamma is 1.1: it must be from 0 to 1"),
            ("ppo", {"beta": -1.0}, "ppo.beta is -1.0: it must be 0 or more"),
            (
                "ppo",
                {"temperature": 0.0},
                "ppo.temperature is 0.0: it must be positive",
            ),
            ("ppo", {"critic_lr": 0.0}, "ppo.critic_lr is 0.0"),
            ("ppo", {"patience": 1, "max_kl": -1.0}, "ppo.max_kl is -1.0: it must be"),
            ("ppo", {"max_kl": 1.0}, "no pass ends a run whose ppo.patience is None"),
            ("ppo", {"safety": ""}, "ppo.safety is '': it must be the work directory"),
        ],
        ids=lambda x: str(x)[:24],
    )
    def test_settings(self, recipe, part, values, message):
        with pytest.raises(ConfigError, match=message):
            runs.changed(recipe, part, **values)

    def test_a_best_pass_that_would_not_be_saved(self, recipe):
        rare = runs.changed(recipe, "train", validate_every=6, checkpoint_every=4)
        with pytest.raises(ConfigError, match=r"validate_every 6 a multiple of .* 4\."):
            runs.changed(rare, "ppo", patience=2)
