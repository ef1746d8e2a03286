"""Plans of PPO: five models on a chip, while they learn and while answers come."""

import dataclasses
import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llama_jax.build import build
from llama_jax.cli import main
from llama_jax.config.recipe import load_recipe
from llama_jax.model.count import abstract_params
from llama_jax.planning.compile import bytes_per_chip
from llama_jax.planning.estimate import beside_bytes
from llama_jax.planning.passes import PassPlan, passes
from llama_jax.planning.plan import estimated, resolve
from llama_jax.planning.ppo import PpoPlan, plan_ppo
from llama_jax.planning.report import PpoReport, ppo_to_json, ppo_verdict
from sharding import MeshConfig, make_mesh, training_rules
from tests import runs
from tests.architecture.tree import ROOT
from tests.planning.recipes import POWER
from tests.planning.test_report import text

CHAT = ROOT / "configs" / "chat"
LARGEST = f"{CHAT}/llama2_70b.py:ppo"


def planned(place: str, **ppo: object) -> PpoPlan:
    """By arithmetic, with fields of `ppo` changed."""
    recipe = runs.changed(load_recipe(place), "ppo", **ppo)
    recipe, topology = resolve(recipe, None, None)
    return plan_ppo(estimated(recipe, topology, POWER), compiles=False)


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=8), MeshConfig(fsdp=4, tensor=2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_models_beside_the_policy_are_exact(mesh, dtype):
    recipe = runs.ppo_recipe("data", 64, helpfulness="a", safety="b")
    recipe = runs.changed(recipe, "train", compute_dtype=dtype)
    recipe = dataclasses.replace(recipe, mesh=mesh)
    rules = training_rules(sequence_parallel=False)

    def held(head, dtype) -> int:
        sharded = build(
            recipe.model,
            make_mesh(mesh),
            rules,
            dtype="float32",
            remat="none",
            head=head,
        )
        numbers = sum(
            math.prod(place.shard_shape(leaf.shape))
            for leaf, place in zip(
                jax.tree.leaves(abstract_params(recipe.model, head)),
                jax.tree.leaves(sharded.param_shardings),
                strict=True,
            )
        )
        return numbers * jnp.dtype(dtype).itemsize

    assert beside_bytes(recipe, 8) == {
        "critic and its optimizer": 3 * held("scalar", "float32"),
        "reference and reward models": held("unembed", dtype)
        + 2 * held("scalar", dtype),
    }


def test_nothing_is_beside_other_stages():
    assert beside_bytes(runs.recipe("data"), 8) == {}


def test_writing_comes_to_all_that_stays():
    plan = planned(LARGEST)
    stays = plan.learning.memory["parameters"] + plan.learning.memory["optimizer"]
    stays += sum(beside_bytes(plan.recipe, 64).values())
    copy = plan.writing.weight_bytes + plan.writing.cache_bytes
    assert plan.writing_bytes == stays + copy
    assert plan.fits
    assert f"answering fits: {plan.writing_bytes / 2**30:.2f} of 95.73" in ppo_verdict(
        plan
    )
    # 70B in bfloat16 over 8 chips; keys and values of 64 rows to each group of them.
    assert plan.writing.weight_bytes == pytest.approx(138e9 / 8, rel=0.02)
    cache = 2 * 80 * 8 * 128 * 2 * 2048 * 64 / 8
    assert plan.writing.cache_bytes == cache


def test_time_to_read_prompts_and_answer_them():
    """1,024 tokens of each, in chunks of 512; 512 prompts, 256 at a time."""
    plan = planned(LARGEST, decode_batch=256)
    assert plan.writing_seconds is None
    writing = dataclasses.replace(plan.writing, chunk_seconds=3.0, token_seconds=0.01)
    plan = dataclasses.replace(plan, writing=writing)
    assert plan.writing_seconds == pytest.approx(2 * (2 * 3.0 + 1024 * 0.01))


def test_more_than_a_chip_holds():
    crowded = planned(LARGEST, decode_tensor=2, decode_batch=512)
    assert crowded.learning.fits and not crowded.fits
    assert "does not fit" in ppo_verdict(crowded)
    assert "--ppo.decode-tensor" in ppo_verdict(crowded)
    assert ppo_to_json(crowded)["fits"] is False


READINGS = (
    PassPlan(what="log-probabilities", working_bytes=3 * 2**30, seconds=12.0),
    PassPlan(what="scores", working_bytes=2 * 2**30, seconds=17.0),
)


class TestPasses:
    def test_the_fullest_pass_comes_to_all_that_stays(self):
        plan = planned(LARGEST)
        assert plan.reading_bytes is None and plan.reading_seconds is None
        plan = dataclasses.replace(plan, reading=READINGS)
        assert plan.reading_bytes == plan.kept_bytes + 3 * 2**30
        assert plan.reading_seconds == 29
        assert plan.fits
        said = (
            f"Reading the answers fits: {plan.reading_bytes / 2**30:.2f} of 95.73 GiB."
        )
        assert said in ppo_verdict(plan)
        told = ppo_to_json(plan)
        assert told["reading_bytes"] == plan.reading_bytes
        assert told["predicted_iteration"]["reading_seconds"] == 29
        assert told["reading"][1]["what"] == "scores"

    def test_a_pass_that_is_more_than_a_chip_holds(self):
        refused = PassPlan(what="values", working_bytes=90 * 2**30, seconds=None)
        plan = dataclasses.replace(planned(LARGEST), reading=(*READINGS, refused))
        assert plan.learning.fits and not plan.fits
        assert plan.reading_seconds is None
        assert "Reading the answers does not fit" in ppo_verdict(plan)
        assert "--data.sequence-length" in ppo_verdict(plan)

    def test_a_critic_that_is_more_than_a_chip_holds(self):
        """The critic's step comes to all that stays, and its time is no part of that
        of the passes that read."""
        plan = dataclasses.replace(planned(LARGEST), reading=READINGS)
        assert plan.critic_bytes is None and plan.critic_seconds is None
        steps = PassPlan(what="steps", working_bytes=20 * 2**30, seconds=21.0)
        fits = dataclasses.replace(plan, critic=steps)
        assert fits.fits and fits.critic_bytes == plan.kept_bytes + 20 * 2**30
        told = ppo_to_json(fits)
        assert told["critic_bytes"] == fits.critic_bytes
        assert told["predicted_iteration"]["critic_seconds"] == 21
        assert told["predicted_iteration"]["reading_seconds"] == 29
        crowded = dataclasses.replace(steps, working_bytes=90 * 2**30, seconds=None)
        plan = dataclasses.replace(plan, critic=crowded)
        assert plan.learning.fits and not plan.fits
        assert "A step of the critic does not fit" in ppo_verdict(plan)
        assert "--train.remat" in ppo_verdict(plan)

    def test_what_passes_take_is_what_programs_take(self):
        """Compiled here for CPUs: all that is kept and read, laid out as it says."""
        recipe = runs.ppo_recipe("data", 64, helpfulness="a", safety="b")
        recipe = dataclasses.replace(recipe, mesh=MeshConfig(fsdp=4, tensor=2))
        mesh = make_mesh(recipe.mesh)
        planned = passes(recipe, mesh)
        for each in planned:
            with jax.set_mesh(mesh):
                compiled = each.lower().compile()
            taken = compiled.memory_analysis().argument_size_in_bytes
            read: Any = each.read
            if each is planned.critic:  # which leaves alone what the policy learns from
                (batch,) = read
                read = (batch.tokens, batch.mask, batch.values, batch.returns)
            assert taken == bytes_per_chip((each.kept, read))

    def test_every_pass_reads_all_answers(self):
        """64 of an iteration, 8 a step; 8 for each device that has rows of its own."""
        recipe = runs.ppo_recipe("data", 64, helpfulness="a", safety="b")
        recipe = runs.changed(recipe, "train", batch_size=8, num_steps=8)
        recipe = runs.changed(recipe, "ppo", prompts=64)
        recipe = dataclasses.replace(recipe, mesh=MeshConfig(fsdp=4, tensor=2))
        logprobs, values, scores, critic = passes(recipe, make_mesh(recipe.mesh))
        assert logprobs.calls == values.calls == critic.calls == 8
        assert logprobs.read[0].shape == values.read[0].shape == (8, 64)
        assert critic.read[0].tokens.shape == (8, 64)
        assert scores.read[0].shape == (32, 64)
        assert scores.calls == 4  # two by each reward model


def test_the_report_adds_up_an_iteration():
    plan = planned(LARGEST)
    assert "of an iteration" not in text(PpoReport(plan))
    plan = dataclasses.replace(
        plan,
        learning=dataclasses.replace(plan.learning, seconds={"matmul": 2.0}),
        critic=PassPlan(what="the critic's steps", working_bytes=2**30, seconds=15.5),
        writing=dataclasses.replace(
            plan.writing, chunk_seconds=3.0, token_seconds=0.01
        ),
        reading=READINGS,
    )
    said = " ".join(text(PpoReport(plan)).split())
    assert re.search(r"log-probabilities +3.00 +12.0", said)
    assert re.search(r"the critic's steps +1.00 +15.5", said)
    assert (
        "16 s for 512 answers of 1,024 tokens to prompts as long as may be, 29 s for "
        "reading them, and for 8 steps 16 s of the policy and 16 s of the critic."
    ) in said


def test_the_command(without_compiler, capsys):
    assert main(["plan", LARGEST]) == 0
    said = capsys.readouterr().out
    assert "critic and its optimizer" in said
    assert "Beside all else that a chip holds, answering fits" in said
    assert main(["plan", LARGEST, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] and told["writing"]["batch"] == 512
    assert told["memory"]["reference and reward models"] > 0
