"""Rejection sampling: the best, the pool, the curve; killed and gone on with."""

import dataclasses
import itertools
import json
import os

import jax
import numpy as np
import pytest

import llama_jax
from llama_jax.build import build
from llama_jax.checkpoint.params import save_params
from llama_jax.config.sampling import TopP
from llama_jax.data import DialogLines, Prompt, prepare_dialogs
from llama_jax.errors import ConfigError, DataError, GenerationError, TokenizerError
from llama_jax.finetune import rejection
from llama_jax.finetune.rejection import (
    Iteration,
    best_of,
    pool,
    reward_curve,
    sample,
    write_dialogs,
)
from llama_jax.finetune.rollout import (
    Answer,
    Judge,
    Rollout,
    Scores,
    roll_out,
)
from llama_jax.finetune.sft import sft
from llama_jax.generate import Generator
from sharding import MeshConfig, make_mesh, training_rules
from tests import runs
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
from tests.generate.models import LONG

OPTIONS = {
    "max_new_tokens": 24,
    "num_samples": 2,
    "sampler": TopP(1.0, temperature=1.0),
    "seed": 7,
    "batch_size": 2,
}


def rollout(question, *answers):
    """Of texts with their combined scores; a text that ends with ... was cut."""
    made = [
        Answer(text, [5, 6] if (cut := text.endswith("...")) else [5, EOS], not cut)
        for text, _ in answers
    ]
    scores = np.array([score for _, score in answers], np.float32)
    prompt = Prompt([{"role": "user", "content": question}])
    return Rollout(prompt, [1, 9], made, Scores(scores, scores, scores))


def written(path, *rollouts, batch_size=2, **plan):
    """An iteration as `sample` writes it."""
    plan = {
        "num_prompts": len(rollouts),
        "batch_size": batch_size,
        "tokenizer": judge().tokenizer.digest,
        "safety_model": "a",
        "helpfulness_model": "b",
        "threshold": 0.15,
    } | plan
    path.mkdir()
    (path / "iteration.json").write_text(json.dumps(plan))
    num_shards = -(-len(rollouts) // batch_size)
    for i in range(num_shards):
        own = rollouts[i * batch_size : (i + 1) * batch_size]
        name = f"rollouts-{i:05}-of-{num_shards:05}.jsonl"
        (path / name).write_text("".join(map(rejection._to_line, own)))
    return Iteration.open(path)


class TestBestOf:
    def test_the_highest_score(self):
        assert best_of(rollout("q", ("a", 0.1), ("b", 0.7), ("c", -3.0))) == 1

    def test_of_equals_the_first(self):
        assert best_of(rollout("q", ("a", 0.1), ("b", 0.7), ("c", 0.7))) == 1

    def test_none_that_cannot_be_learnt(self):
        answers = ("cut ...", 9.0), ("", 8.0), ("[INST]", 7.0), ("a\0", 6.0)
        assert best_of(rollout("q", *answers, ("b", -5.0))) == 4
        assert best_of(rollout("q", *answers)) is None


class TestPool:
    @pytest.fixture
    def two(self, tmp_path):
        return [
            written(
                tmp_path / "1",
                rollout("rhyme", ("moon, June", 2.0), ("moon", 1.0)),
                rollout("sum", ("3", -1.0), ("4...", 5.0)),
                rollout("say", ("...", 1.0)),
            ),
            written(
                tmp_path / "2",
                rollout("new", ("x", 0.0)),
                rollout("sum", ("4", 0.5), ("5", 0.25)),
                rollout("rhyme", ("dog", 1.5), ("tree", 2.0)),
            ),
        ]

    def texts(self, winners):
        return {w.prompt.messages[0]["content"]: (w.text, w.score) for w in winners}

    def test_the_latest_forgets(self, two):
        winners = pool(two, keep="latest")
        expected = {"new": ("x", 0.0), "sum": ("4", 0.5), "rhyme": ("tree", 2.0)}
        assert self.texts(winners) == expected
        assert list(self.texts(winners)) == list(expected)

    def test_all_remember(self, two, caplog):
        """Per prompt the best of any iteration, of equals the earliest."""
        winners = pool(two, keep="all")
        expected = {"rhyme": ("moon, June", 2.0), "sum": ("4", 0.5), "new": ("x", 0.0)}
        assert self.texts(winners) == expected
        assert list(self.texts(winners)) == list(expected)
        paths = [os.path.basename(winner.path) for winner in winners]
        assert paths == ["1", "2", "2"]
        assert winners[0].tokens == [1, 9, 5, EOS]
        assert "1 of 4 prompts have no answer that can be learnt" in caplog.text

    def test_of_one_iteration_both_are_the_same(self, two):
        assert pool(two[:1], keep="all") == pool(two[:1], keep="latest")

    def test_other_reward_models_score_again(self, two, tmp_path):
        other = written(
            tmp_path / "3", rollout("rhyme", ("cat", 50.0)), safety_model="c"
        )
        with pytest.raises(DataError, match="other reward models scored them"):
            pool([*two, other], keep="all")
        apart = written(tmp_path / "4", rollout("?", ("!", 1.0)), threshold=0.5)
        assert len(pool([*two, apart], keep="all")) == 4

        judged = judge()
        again = pool([*two, other], keep="all", judge=judged)
        scores = judged.scores([[1, 9, 5, EOS]], [False]).combined
        # All ids are the same here, so all scores are, and the earliest stays.
        assert {winner.score for winner in again} == {float(scores[0])}
        assert self.texts(again).keys() == self.texts(pool(two, keep="all")).keys()

    def test_it_is_what_data_reads(self, two, tmp_path):
        path = tmp_path / "selected.jsonl"
        write_dialogs(path, pool(two, keep="all"))
        rows = list(DialogLines(path))
        assert {row.learn for row in rows} == {"last"}
        assert rows[0].messages == [
            {"role": "user", "content": "rhyme"},
            {"role": "assistant", "content": "moon, June"},
        ]
        assert len(rows) == 3

    def test_refused(self, two, tmp_path):
        with pytest.raises(ConfigError, match="keep is 'some'"):
            pool(two, keep="some")
        with pytest.raises(DataError, match="there are no iterations"):
            pool([], keep="all")
        reads = corpus.make_tokenizer(tmp_path)
        other = reward_of(reads, 1, max_length=64)
        with pytest.raises(TokenizerError, match="1 was sampled with another tokeni"):
            pool(two, keep="all", judge=Judge(other, other))
        silent = written(tmp_path / "3", rollout("say", ("...", 1.0)))
        with pytest.raises(DataError, match="no answer can be learnt, so .*none.jsonl"):
            write_dialogs(tmp_path / "none.jsonl", pool([silent], keep="all"))
        assert not (tmp_path / "none.jsonl").exists()


class TestCurve:
    def test_by_hand(self):
        curve = reward_curve([[1.0, 4.0, 2.0], [0.0, 0.0, 3.0]])
        # Of pairs: (4 + 4 + 2) / 3 and (3 + 3 + 0) / 3.
        np.testing.assert_allclose(curve.max, [5 / 3, 8 / 3, 3.5])
        np.testing.assert_allclose(curve.median, [5 / 3, 5 / 3, 1.0])

    def test_it_is_the_mean_over_all_subsets(self):
        scores = np.random.default_rng(0).gumbel(size=(5, 7))
        scores[0, :3] = 1.0  # some are equal
        curve = reward_curve(scores)
        for size in range(1, 8):
            chosen = [
                scores[:, list(some)] for some in itertools.combinations(range(7), size)
            ]
            for found, of in ((curve.max, np.max), (curve.median, np.median)):
                expected = np.mean([of(some, axis=1) for some in chosen])
                assert found[size - 1] == pytest.approx(expected, rel=1e-12)

    def test_as_many_as_the_paper_drew(self):
        scores = np.random.default_rng(0).normal(size=(400, 100))
        curve = reward_curve(scores)
        assert (np.diff(curve.max) > 0).all()
        assert np.abs(curve.median).max() < 0.05
        assert curve.max[-1] == pytest.approx(scores.max(axis=1).mean())

    @pytest.mark.parametrize("scores", [[], [[]], [1.0, 2.0], [[1.0, np.nan]]])
    def test_refused(self, scores):
        with pytest.raises(DataError, match="give finite numbers, a row for each prom"):
            reward_curve(scores)


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("iterations") / "1"
    told = []
    iteration = sample(
        path, policy(), judge(), PROMPTS[:5], **OPTIONS, watch=lambda *x: told.append(x)
    )
    assert told == [(2, 5), (4, 5), (5, 5)]
    return iteration


class TestSample:
    def test_all_that_was_sampled_is_read_back(self, whole):
        found = list(Iteration.open(whole.path).rollouts())
        expected = roll_out(
            policy(),
            judge(),
            PROMPTS[2:4],
            num_samples=2,
            max_new_tokens=24,
            sampler=OPTIONS["sampler"],
            seed=[(7 << 32) + 2, (7 << 32) + 3],
        )
        assert [rollout.prompt for rollout in found] == PROMPTS[:5]
        for one, other in zip(found[2:4], expected, strict=True):
            assert one[:3] == other[:3]
            np.testing.assert_array_equal(one.scores, other.scores)
        assert whole.rewards().shape == (5, 2)
        rewards = 1 / (1 + np.exp(-expected[1].scores.combined))
        np.testing.assert_allclose(whole.rewards()[3], rewards, rtol=1e-6)

    def test_killed_at_any_place_it_ends_as_it_would_have(
        self, whole, tmp_path, monkeypatch
    ):
        """In the midst of a file, or behind the first or second one."""

        class KilledError(Exception):
            pass

        real, calls = os.fsync, 0

        def killed(descriptor):
            nonlocal calls
            calls += 1
            if calls == place:
                raise KilledError
            real(descriptor)

        for place in (1, 3, 5, 6):
            path, calls = tmp_path / str(place), 0
            with monkeypatch.context() as patch, pytest.raises(KilledError):
                patch.setattr(os, "fsync", killed)
                sample(path, policy(), judge(), PROMPTS[:5], **OPTIONS)
            seen = {name for name in content(path) if not name.startswith(".")}
            assert seen < content(whole.path).keys()
            for name in seen:
                assert content(path)[name] == content(whole.path)[name]
            if "iteration.json" in seen:
                with pytest.raises(DataError, match=r"is not done: \d of its 3 files"):
                    Iteration.open(path)
            sample(path, policy(), judge(), PROMPTS[:5], **OPTIONS)
            assert content(path) == content(whole.path)

    def test_what_is_there_is_not_sampled_again(self, whole, monkeypatch):
        monkeypatch.setattr(rejection, "roll_out", None)
        before = {file: os.stat(file).st_mtime_ns for file in whole.path.iterdir()}
        again = sample(whole.path, policy(), judge(), PROMPTS[:5], **OPTIONS)
        assert again == Iteration.open(whole.path) == whole
        assert before == {f: os.stat(f).st_mtime_ns for f in whole.path.iterdir()}

    def test_equal_prompts_have_answers_of_their_own(self, tmp_path):
        twice = [PROMPTS[0]] * 2
        found = sample(tmp_path, policy(), judge(), twice, **OPTIONS).rollouts()
        one, other = found
        assert one.answers != other.answers
        assert len({tuple(a.tokens) for a in (*one.answers, *other.answers)}) == 4


@pytest.mark.slow
def test_fine_tuning_on_what_was_selected_raises_the_reward(tmp_path):
    """An iteration from end to end; of 768 answers the mean score is known to 0.01."""
    prompts = [
        Prompt([{"role": "user", "content": f"{one} {other}"}])
        for one in corpus.WORDS[:8]
        for other in corpus.WORDS[:6]
    ]
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    rules = training_rules(sequence_parallel=False)
    one = build(LONG, mesh, rules, dtype="float32", remat="none")
    params = jax.device_put(policy_params(), one.param_shardings)
    save_params(tmp_path / "v0", params, LONG, judge().tokenizer)

    def sampled(version, model):
        llm = llama_jax.load(model, cache_length=128)
        generator = Generator(llm.engine, llm.tokenizer)
        options = OPTIONS | {"num_samples": 16, "batch_size": 24}
        return sample(tmp_path / version, generator, judge(), prompts, **options)

    first = sampled("1", tmp_path / "v0")
    winners = pool([first], keep="latest")
    write_dialogs(tmp_path / "train.jsonl", winners)
    write_dialogs(tmp_path / "validation.jsonl", winners[:8])
    data = prepare_dialogs(
        {
            split: [DialogLines(tmp_path / f"{split}.jsonl")]
            for split in ("train", "validation")
        },
        judge().tokenizer,
        tmp_path / "rows",
        row_length=64,
    )
    recipe = dataclasses.replace(runs.sft_recipe(data.path, 64), model=LONG, epochs=6)
    assert sft(recipe, tmp_path / "v1", init_from=tmp_path / "v0")
    second = sampled("2", tmp_path / "v1")
    assert second.plan["policy"] != first.plan["policy"]
    assert second.rewards().mean() > first.rewards().mean() + 0.01


class TestRefused:
    def refused(self, path, message, *, kind=DataError, prompts=PROMPTS[:5], **changes):
        models = {"generator": policy(), "judge": judge()}
        models |= {name: changes.pop(name) for name in models if name in changes}
        with pytest.raises(kind, match=message):
            sample(path, *models.values(), prompts, **(OPTIONS | changes))

    def test_settings(self, tmp_path):
        path = tmp_path / "new"
        self.refused(path, "num_samples is 0", kind=ConfigError, num_samples=0)
        self.refused(path, "batch_size is 1.5", kind=ConfigError, batch_size=1.5)
        self.refused(path, "max_new_tokens is", kind=GenerationError, max_new_tokens=0)
        self.refused(path, "sampler is 'hot'", kind=GenerationError, sampler="hot")
        self.refused(path, "there are no prompts", prompts=[])
        assert not path.exists()

    def test_an_iteration_that_was_begun_otherwise(self, whole):
        before = content(whole.path)
        self.refused(whole.path, "num_prompts was 5 and is 4", prompts=PROMPTS[:4])
        self.refused(whole.path, "prompts was .* and is", prompts=PROMPTS[1:6])
        self.refused(whole.path, "seed was 7 and is 8", seed=8)
        self.refused(whole.path, "batch_size was 2 and is 3", batch_size=3)
        self.refused(
            whole.path, "sampler was 'TopP", sampler=TopP(1.0, temperature=1.3)
        )
        self.refused(whole.path, "cache_length was 128", generator=policy(slots=64))
        other = Judge(reward(1), reward(3))
        self.refused(whole.path, "helpfulness_model was", judge=other)
        self.refused(whole.path, "threshold was 0.15", judge=judge(threshold=0.2))
        generator = policy()
        weights = generator.engine.weights
        generator.engine.weights = type(weights)(
            weights.embed * 2, weights.layers, weights.final_norm, weights.unembed
        )
        self.refused(whole.path, "policy was .* Choose another", generator=generator)
        assert content(whole.path) == before

    def test_a_directory_of_something_else(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        self.refused(
            tmp_path, "holds other files: give each iteration of rejection sampling a"
        )
        with pytest.raises(
            DataError, match="is no iteration of rejection sampling: it has no"
        ):
            Iteration.open(tmp_path)

    def test_a_place_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        self.refused(tmp_path / "file" / "1", "iteration.json cannot be written")

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text[: len(text) // 2],
            lambda text: text.splitlines()[0] + "\n",
            lambda text: "\n".join(text.splitlines()).replace("answers", "replies"),
            lambda text: "[1, 2]\n" * 2,
            lambda text: "",
        ],
    )
    def test_damaged_files(self, tmp_path, damage):
        iteration = written(tmp_path / "1", *[rollout("q", ("a", 0.0))] * 4)
        shard = iteration.path / "rollouts-00001-of-00002.jsonl"
        shard.write_text(damage(shard.read_text()))
        with pytest.raises(DataError, match="00001-of-00002.jsonl is damaged .* remov"):
            pool([iteration], keep="all")

    @pytest.mark.parametrize(
        "change",
        [None, [], {"batch_size": 0}, {"num_prompts": "2"}, {"threshold": ...}],
    )
    def test_a_damaged_manifest(self, tmp_path, change):
        iteration = written(tmp_path / "1", rollout("q", ("a", 0.0)))
        plan = {**iteration.plan, **(change or {})}
        plan = {name: value for name, value in plan.items() if value is not ...}
        text = json.dumps(change if change == [] else plan)
        manifest = iteration.path / "iteration.json"
        manifest.write_text(text if change is not None else text[:-5])
        with pytest.raises(
            DataError, match="iteration.json is damaged .* remove .*1, and"
        ):
            Iteration.open(iteration.path)

    def test_an_iteration_that_is_not_done(self, tmp_path):
        iteration = written(tmp_path / "1", *[rollout("q", ("a", 0.0))] * 5)
        (iteration.path / "rollouts-00001-of-00003.jsonl").unlink()
        with pytest.raises(DataError, match="1 of its 3 files are missing. Sample it"):
            Iteration.open(iteration.path)
