"""Roll-outs: the way to the layout for decoding, probabilities, answers and scores."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import llama_jax
from llama_jax.build import build
from llama_jax.checkpoint.params import save_params
from llama_jax.config.sampling import Greedy, TopP
from llama_jax.data import Prompt
from llama_jax.errors import (
    ConfigError,
    DataError,
    DialogError,
    GenerationError,
    TokenizerError,
)
from llama_jax.finetune.rollout import (
    Judge,
    checksum,
    make_logprobs,
    reshard,
    roll_out,
    token_logprobs,
)
from llama_jax.generate import Generator, score
from llama_jax.generate.rows import padded
from llama_jax.generate.weights import to_params
from llama_jax.model.count import abstract_params
from llama_jax.text import encode_dialog
from sharding import MeshConfig, ShardingError, make_mesh, training_rules
from tests.data import corpus
from tests.finetune.judges import (
    EOS,
    PROMPTS,
    judge,
    policy,
    policy_params,
    reward,
    reward_of,
)
from tests.generate import models
from tests.generate.models import LONG, tokenizer
from tests.parity import tolerances

DECODING = MeshConfig(data=4, fsdp=1, tensor=2)
PLAIN = TopP(1.0, temperature=1.0)


def in_training(dtype="float32", **axes):
    """The policy as a training step has it."""
    sharded = build(
        LONG,
        make_mesh(MeshConfig(**({"fsdp": 1} | axes))),
        training_rules(sequence_parallel=False),
        dtype=dtype,
        remat="none",
    )
    return sharded, jax.device_put(policy_params(), sharded.param_shardings)


def reversed_mesh(mesh):
    return jax.sharding.Mesh(
        mesh.devices.ravel()[::-1].reshape(mesh.devices.shape),
        mesh.axis_names,
        axis_types=mesh.axis_types,
    )


class TestReshard:
    @pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}])
    def test_it_writes_what_one_device_would(self, axes, tmp_path):
        save_params(tmp_path / "one", in_training(fsdp=8)[1], LONG, tokenizer())
        expected = llama_jax.load(tmp_path / "one", cache_length=128)
        engine, _ = reshard(*in_training(**axes), make_mesh(DECODING), cache_length=128)
        prompts = [encode_dialog(tokenizer(), prompt.messages) for prompt in PROMPTS]
        settings = {"max_new_tokens": 24, "sampler": Greedy()}
        found = Generator(engine, tokenizer()).generate(
            prompts, llama_jax.generate.Settings(**settings)
        )
        models.near(found, expected.generate(prompts, **settings))

    @pytest.mark.parametrize(
        "axes, dtype, order",
        [
            ({"fsdp": 8}, "bfloat16", "same"),
            ({"fsdp": 8}, "float32", "reversed"),
            ({"fsdp": 4, "tensor": 2}, "bfloat16", "same"),
            ({"data": 2, "context": 2, "tensor": 2}, "bfloat16", "reversed"),
        ],
    )
    def test_the_weights_are_the_parameters_rounded_once(self, axes, dtype, order):
        sharded, params = in_training(dtype, **axes)
        mesh = make_mesh(DECODING)
        if order == "reversed":
            mesh = reversed_mesh(mesh)
        engine, _ = reshard(sharded, params, mesh)
        found = to_params(engine.sharded, engine.weights)
        jax.tree.map(
            lambda x, y: np.testing.assert_array_equal(x, y.astype(dtype)),
            found,
            policy_params(),
        )
        assert params["embed"]["table"].dtype == np.float32  # and lies as it lay

    def test_the_cost_is_told(self):
        _, cost = reshard(*in_training("bfloat16", fsdp=8), make_mesh(DECODING))
        num_params = sum(leaf.size for leaf in jax.tree.leaves(policy_params()))
        # Of four copies, but norms are on every device.
        copies = 2 * 4 * num_params
        assert copies < cost.num_bytes < 1.01 * copies
        assert cost.seconds > 0
        shown = str(dataclasses.replace(cost, seconds=0.5, num_bytes=3 * 10**9))
        assert shown == "resharded 3 GB in 0.5 s, 6 GB/s"

    def test_what_does_not_fit(self):
        placed = in_training(fsdp=8)
        with pytest.raises(ShardingError, match="has 1 devices, and not those 8 that"):
            reshard(*placed, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
        with pytest.raises(GenerationError, match="cache_length is 4000"):
            reshard(*placed, make_mesh(DECODING), cache_length=4000)


class TestLogprobs:
    @pytest.mark.parametrize(
        "axes",
        [
            {"fsdp": 8},
            {"fsdp": 4, "tensor": 2},
            {"data": 2, "context": 2, "tensor": 2},
        ],
    )
    def test_both_are_those_of_one_device(self, axes):
        rng = np.random.default_rng(0)
        rows = [rng.integers(3, LONG.vocab_size, n).tolist() for n in (64, 3, 37, 2)]
        rows += [rows[0][:20]] * 4
        sharded, reference = in_training(**axes)
        policy = jax.tree.map(lambda x: 0.9 * x, reference)
        with jax.set_mesh(sharded.mesh):
            step = make_logprobs(sharded)
            found = step(policy, reference, padded(rows, len(rows), 64))
        one, _ = models.model(config=LONG)
        for params, logprobs in zip((policy, reference), found, strict=True):
            assert logprobs.is_fully_replicated
            llm = models.LLM(models.Engine(one, on_one(params)), None)
            for expected, row in zip(
                score.token_logprobs(llm.engine, rows), logprobs, strict=True
            ):
                np.testing.assert_allclose(
                    row[: len(expected)], expected, rtol=0, atol=tolerances.ORDER_LOGITS
                )

    def test_a_row_does_not_depend_on_its_neighbours(self):
        sharded, params = in_training(fsdp=8)
        step = make_logprobs(sharded)
        rng = np.random.default_rng(1)
        tokens = rng.integers(3, LONG.vocab_size, (8, 64), dtype=np.int32)
        other = rng.integers(3, LONG.vocab_size, (8, 64), dtype=np.int32)
        other[5, :40] = tokens[5, :40]  # padded with something else
        with jax.set_mesh(sharded.mesh):
            found, same = step(params, params, tokens)
            beside = step(params, params, other)[0]
        np.testing.assert_array_equal(found, same)
        np.testing.assert_array_equal(beside[5, :39], found[5, :39])
        assert (np.asarray(beside[4]) != found[4]).any()

    def test_logits_never_exist_whole(self):
        num_rows, length, vocab_size = 8, 1024, 2**16
        config = dataclasses.replace(LONG, vocab_size=vocab_size)
        mesh = make_mesh(MeshConfig(fsdp=8))
        rules = training_rules(sequence_parallel=False)
        sharded = build(config, mesh, rules, dtype="float32", remat="none")
        params = jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
            abstract_params(config),
            sharded.param_shardings,
        )
        tokens = jax.ShapeDtypeStruct((num_rows, length), np.int32)
        with jax.set_mesh(mesh):
            program = jax.jit(functools.partial(token_logprobs, sharded))
            needs = program.lower(params, tokens).compile().memory_analysis()
        of_a_device = 4 * num_rows * length * vocab_size // mesh.size
        assert needs.temp_size_in_bytes < of_a_device / 2


def on_one(params):
    sharded, _ = models.model(config=LONG)
    local = jax.device_put(jax.device_get(params), sharded.param_shardings)
    return models.from_params(sharded, local, int8=False)


def rolled(prompts=tuple(PROMPTS), **changes):
    options = {
        "num_samples": 3,
        "max_new_tokens": 24,
        "sampler": PLAIN,
        "seed": list(range(len(prompts))),
    }
    return roll_out(policy(), judge(), prompts, **(options | changes))


@pytest.fixture(scope="module")
def rollouts():
    return rolled()


class TestRollOut:
    def test_answers_are_those_that_generation_writes(self, rollouts):
        prompts = [encode_dialog(tokenizer(), prompt.messages) for prompt in PROMPTS]
        expected = policy().generate(
            prompts,
            llama_jax.generate.Settings(
                max_new_tokens=24, sampler=PLAIN, seed=list(range(len(PROMPTS)))
            ),
            num_samples=3,
        )
        assert [rollout.prompt for rollout in rollouts] == PROMPTS
        assert [rollout.prompt_tokens for rollout in rollouts] == prompts
        answers = [answer for rollout in rollouts for answer in rollout.answers]
        for answer, completion in zip(answers, expected, strict=True):
            assert answer.text == completion.text.strip()
            assert answer.is_whole == (completion.finish_reason == "stop")
            ends = [EOS] if answer.is_whole else []
            assert answer.tokens == completion.tokens + ends
        assert {answer.is_whole for answer in answers} == {True, False}
        assert all(len(a.tokens) == 24 for a in answers if not a.is_whole)

    def test_scores_are_of_the_ids_up_to_an_eos(self, rollouts):
        for rollout in rollouts:
            rows = []
            for answer in rollout.answers:
                row = [*rollout.prompt_tokens, *answer.tokens]
                assert answer.is_whole == (row[-1] == EOS)
                rows.append(row[:-1] + [EOS])
            for found, model in zip(
                rollout.scores, (reward(1), reward(2)), strict=False
            ):
                np.testing.assert_allclose(
                    found, model.score_ids(rows), atol=tolerances.ORDER_LOGITS
                )

    def test_safety_counts_where_it_is_asked_about_or_in_doubt(self, rollouts):
        seen = set()
        for rollout in rollouts:
            for safety, helpfulness, combined in zip(*rollout.scores, strict=True):
                counts = rollout.prompt.about_safety or safety < np.log(0.15 / 0.85)
                assert combined == (safety if counts else helpfulness)
                seen.add((rollout.prompt.about_safety, bool(counts)))
        assert {(True, True), (False, False)} <= seen
        strict = judge(threshold=0.999).scores([[1, 5, EOS]], [False])
        assert strict.combined == strict.safety

    def test_a_prompt_does_not_depend_on_its_neighbours(self, rollouts):
        (alone,) = rolled(PROMPTS[2:3], seed=[2])
        assert alone.answers == rollouts[2].answers
        np.testing.assert_allclose(
            alone.scores, rollouts[2].scores, atol=tolerances.ORDER_LOGITS
        )

    def test_of_no_prompts(self):
        assert rolled([]) == []


def asked(*messages):
    roles = ["user", "assistant"] * len(messages)
    return Prompt(
        [{"role": r, "content": c} for r, c in zip(roles, messages, strict=False)]
    )


class TestRefused:
    def test_a_judge(self):
        for threshold in (0, 1, float("nan")):
            with pytest.raises(ConfigError, match="it is a probability, above 0"):
                judge(threshold=threshold)

    def test_tokenizers(self, tmp_path):
        other = reward_of(corpus.make_tokenizer(tmp_path), 3, max_length=64)
        with pytest.raises(TokenizerError, match="two reward models have different"):
            Judge(reward(1), other)
        with pytest.raises(TokenizerError, match="the policy and the reward models"):
            roll_out(
                policy(),
                Judge(other, other),
                PROMPTS,
                num_samples=1,
                max_new_tokens=8,
                sampler=PLAIN,
                seed=0,
            )

    @pytest.mark.parametrize(
        "prompt, kind, message",
        [
            (asked(), DialogError, r"prompts\[1\]: the dialog is empty"),
            (asked("a", "b"), DialogError, r"prompts\[1\]: Last message must be from"),
            (asked("[INST]"), DialogError, r"prompts\[1\]: special tags"),
            (asked(" "), DialogError, r"prompts\[1\]: message 1 \(user\) is empty"),
            (asked("a", "", "b"), DialogError, r"prompts\[1\]: message 2 \(assis"),
            (asked("a\0"), DialogError, r"prompts\[1\]: message 1 holds NUL"),
            (asked("\ud800"), TokenizerError, r"prompts\[1\]: .*surrogate"),
            (
                asked("ba " * 200),
                GenerationError,
                r"prompts\[1\] has \d+ tokens, and a",
            ),
        ],
    )
    def test_prompts(self, prompt, kind, message):
        with pytest.raises(kind, match=message):
            rolled([PROMPTS[0], prompt])

    def test_rows_that_reward_models_do_not_read(self):
        short = Judge(reward(1), reward(2, max_length=32))
        with pytest.raises(DataError, match=r"and 1\d\d with an answer, but the rewar"):
            roll_out(
                policy(),
                short,
                PROMPTS,
                num_samples=1,
                max_new_tokens=100,
                sampler=PLAIN,
                seed=0,
            )

    def test_settings(self):
        with pytest.raises(GenerationError, match="num_samples is 0"):
            rolled(num_samples=0)
        with pytest.raises(GenerationError, match="max_new_tokens is 0"):
            rolled(max_new_tokens=0)
        with pytest.raises(GenerationError, match="sampler is 'hot'"):
            rolled(sampler="hot")

    def test_scores_that_are_no_numbers(self):
        broken = reward_of(tokenizer(), 4, max_length=1024)
        broken.params = jax.tree.map(lambda leaf: leaf * np.nan, broken.params)
        with pytest.raises(
            DataError, match="helpfulness reward model .* the score nan"
        ):
            Judge(reward(1), broken).scores([[1, EOS]], [False])


def test_a_checksum_tells_models_apart_and_not_meshes():
    one, (split, params) = policy().engine, in_training(fsdp=4, tensor=2)
    engine, _ = reshard(split, params, make_mesh(DECODING))
    found = checksum(engine.weights, engine.sharded.mesh)
    assert found == checksum(one.weights, one.sharded.mesh)
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].add(1e-6)
    engine, _ = reshard(split, params, make_mesh(DECODING))
    assert found != checksum(engine.weights, engine.sharded.mesh)
