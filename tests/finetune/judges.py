"""A policy and reward models, random but sure of themselves, for tests of RLHF."""

import dataclasses
import functools

import jax
import numpy as np

from llama_jax.build import build
from llama_jax.data import Prompt
from llama_jax.finetune.reward import RewardModel
from llama_jax.finetune.rollout import Judge
from llama_jax.generate import Engine, Generator
from llama_jax.generate.weights import from_params
from llama_jax.model.count import abstract_params
from llama_jax.model.decoder import Weights
from llama_jax.text import Tokenizer
from sharding import MeshConfig, decoding_rules, make_mesh
from tests.generate import models
from tests.generate.models import LONG, ONE, tokenizer

EOS = 2
PROMPTS = [
    Prompt([{"role": "user", "content": f"{a} {b}"}], about_safety=a == "ba")
    for a in ("ba", "ce", "di")
    for b in ("fo", "gu")
]


@functools.cache
def policy_params() -> dict:
    """A model that ends about every tenth answer with each token."""
    params = models.params_of(LONG)
    kernel = params["unembed"]["kernel"].copy()
    kernel[:, EOS] *= 3
    return {**params, "unembed": {"kernel": kernel}}


def policy(mesh: MeshConfig = ONE, *, slots: int | None = 128) -> Generator:
    """The policy on a mesh for decoding."""
    sharded, _ = models.model(mesh, config=LONG)
    return Generator(Engine(sharded, _weights(mesh), slots=slots), tokenizer())


@functools.cache
def _weights(mesh: MeshConfig) -> Weights:
    sharded, _ = models.model(mesh, config=LONG)
    params = jax.device_put(policy_params(), sharded.param_shardings)
    return from_params(sharded, params, int8=False)


@functools.cache
def reward(seed: int = 0, *, max_length: int = 1024) -> RewardModel:
    """A reward model on one device."""
    return reward_of(tokenizer(), seed, max_length=max_length)


def reward_of(reads: Tokenizer, seed: int, *, max_length: int) -> RewardModel:
    """A reward model with another tokenizer."""
    config = dataclasses.replace(LONG, max_length=max_length)
    mesh = make_mesh(ONE, jax.devices()[:1])
    sharded = build(
        config, mesh, decoding_rules(), dtype="float32", remat="none", head="scalar"
    )
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: rng.normal(scale=0.15, size=leaf.shape).astype(np.float32),
        abstract_params(config, "scalar"),
    )
    return RewardModel(sharded, jax.device_put(params, sharded.param_shardings), reads)


def judge(*, threshold: float = 0.15) -> Judge:
    """Two reward models that do not agree."""
    return Judge(reward(1), reward(2), threshold=threshold)
