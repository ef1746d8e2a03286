"""What a model answers, for a card: samples, and what they are worth."""

import argparse
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from etils import epath
from jaxtyping import Float

import llama_jax
from llama_jax.data import Prompt
from llama_jax.errors import DataError
from llama_jax.finetune.rollout import (
    THRESHOLD,
    Rollout,
    encode_prompts,
    load_judge,
    roll_out,
)
from llama_jax.generate import Generator
from llama_jax.generate.score import token_logprobs
from llama_jax.llm import LLM
from scripts.card_text import Sample
from sharding.mesh import decoding_mesh

# Prompts that are answered and scored at a time. `llama-jax sample answers` has 32, and
# one model less.
_BATCH = 8
_DRAWN = llama_jax.TopP(1.0, temperature=1.0)
_SAMPLERS = {"Greedy": llama_jax.Greedy(), "Temperature 1": _DRAWN}


def load(checkpoint: epath.PathLike, args: argparse.Namespace, dtype: str) -> LLM:
    """A model on all devices, of which `--tensor` share the weights.

    Raises:
      CheckpointError: it is none that writes.
      ShardingError: `--tensor` does not divide it.
    """
    return llama_jax.load(checkpoint, dtype=dtype, mesh=decoding_mesh(args.tensor))


def shown(
    llm: LLM, prompts: Sequence[Prompt], args: argparse.Namespace
) -> list[Sample]:
    """Prompts, each with an answer of every sampler."""
    samples = list[Sample]()
    for prompt in prompts:
        answers = dict[str, str]()
        for name, sampler in _SAMPLERS.items():
            answer = llm.chat(
                prompt.messages, max_new_tokens=args.max_new_tokens, sampler=sampler
            )
            mark = cut_mark(answer.finish_reason == "stop")
            answers[name + mark] = answer.text.strip()
        samples.append((prompt.messages, answers))
    return samples


def scored(
    llm: LLM, prompts: Sequence[Prompt], args: argparse.Namespace
) -> dict[str, float]:
    """The mean over prompts of what PPO measures of its answers, one to each.

    Policy, reference and both reward models are on the devices of the card together.

    Raises:
      DataError: there are no prompts, or the reward models do not read rows so long.
      LlamaError: what `--helpfulness` or `--safety` names is no reward model of these
        tokens, or `--reference` no model; a prompt leaves no room for an answer.
    """
    if not prompts:
        raise DataError("there are no prompts to score answers to: give some.")
    sharded = llm.engine.sharded
    dtype = str(sharded.model.dtype)
    judge = load_judge(
        helpfulness=args.helpfulness,
        safety=args.safety,
        threshold=THRESHOLD,
        mesh=sharded.mesh,
        dtype=dtype,
    )
    reference = load(args.reference, args, dtype)
    generator = Generator(llm.engine, llm.tokenizer)
    # All of them first, so that an error names the prompt by its place among all.
    encode_prompts(generator, judge, prompts, max_new_tokens=args.max_new_tokens)
    told = list[Mapping[str, float]]()
    for start in range(0, len(prompts), _BATCH):
        part = prompts[start : start + _BATCH]
        rollouts = roll_out(
            generator,
            judge,
            part,
            num_samples=1,
            max_new_tokens=args.max_new_tokens,
            sampler=_DRAWN,
            seed=list(range(start, start + len(part))),
        )
        rows = [[*each.prompt_tokens, *each.answers[0].tokens] for each in rollouts]
        ours, theirs = (token_logprobs(m.engine, rows) for m in (llm, reference))
        for rollout, own, other in zip(rollouts, ours, theirs, strict=True):
            told.append(_told(rollout, np.array(own) - np.array(other)))
    return {name: float(np.mean([each[name] for each in told])) for name in told[0]}


def _told(rollout: Rollout, gaps_t: Float[np.ndarray, " t"]) -> dict[str, float]:
    """Of a prompt with one answer, and the gaps in log-probability of tokens 1 to t."""
    (answer,) = rollout.answers
    safety, helpfulness, combined = (
        float(jax.nn.sigmoid(score)) for (score,) in rollout.scores
    )
    return {
        "reward": combined,
        "helpfulness": helpfulness,
        "safety": safety,
        "kl": float(gaps_t[len(rollout.prompt_tokens) - 1 :].sum()),
        "answer_length": len(answer.tokens),
        "cut": not answer.is_whole,
    }


def cut_mark(is_whole: bool) -> str:
    """What is said of an answer that was cut."""
    return "" if is_whole else " (cut)"
