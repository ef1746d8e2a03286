"""Experience: a policy's answers to prompts, and what they teach it (section 3.2.3).

All models of PPO share one mesh: policy and critic as any training has them; the
reference, which is the policy as it began, and both reward models in the type of the
arithmetic. While answers are written there is a copy of the policy too, see
`rollout.reshard`.

Shape suffixes: P prompts of an iteration, B rows of a step, T position, t = T - 1.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from llama_jax.build import ShardedLlama
from llama_jax.config.finetune import PpoConfig
from llama_jax.config.recipe import PpoRecipe
from llama_jax.config.sampling import TopP
from llama_jax.data import Experience, PromptBatch
from llama_jax.finetune.estimators import (
    advantages_and_returns,
    sampled_kl,
    token_rewards,
    whiten,
)
from llama_jax.finetune.rollout import Judge, LogprobsStep, Resharding, Scores, reshard
from llama_jax.generate import Generator, Settings
from llama_jax.text import Tokenizer
from llama_jax.train import faults
from llama_jax.train.compiler import compiler_options
from llama_jax.train.objective import as_written, in_order
from llama_jax.train.step import batch_sharding
from sharding import hosts
from sharding.axes import Tree

ValuesStep = Callable[[Tree, Array], Array]
# What all models say of answers, to what that teaches, and to the divergence of an
# answer; see `make_learnt`.
LearntStep = Callable[..., tuple[Experience, Array]]


@dataclasses.dataclass(frozen=True)
class Reader:
    """What reads the answers, beside the models that learn.

    Attributes:
      recipe: of the run.
      policy: the model of policy and reference.
      reference: parameters of the policy as it began.
      judge: both reward models.
      tokenizer: of all models.
      decoding: the mesh on which answers are written.
      stop_now: whether to give up, for it takes long.
      logprobs: compiled; see `rollout.make_logprobs`.
      values: compiled; see `make_values`.
      learnt: compiled; see `make_learnt`.
    """

    recipe: PpoRecipe
    policy: ShardedLlama
    reference: Tree
    judge: Judge
    tokenizer: Tokenizer
    decoding: jax.sharding.Mesh
    stop_now: Callable[[], bool]
    logprobs: LogprobsStep
    values: ValuesStep
    learnt: LearntStep


class Answers(NamedTuple):
    """What a policy wrote.

    Attributes:
      rows: ids of prompts with their answers, and EOS where it was drawn.
      starts: tokens of each prompt.
      is_whole: whether each ended with EOS, or was cut.
      resharding: what the copy of the policy for decoding cost.
    """

    rows: list[list[int]]
    starts: list[int]
    is_whole: list[bool]
    resharding: Resharding


def gather(
    reader: Reader, policy: Tree, critic: Tree, batch: PromptBatch, position: int
) -> tuple[Experience, dict[str, float]] | None:
    """Answer an iteration's prompts, and say what that teaches.

    Args:
      reader: reads the answers.
      policy: its parameters.
      critic: its parameters.
      batch: P prompts.
      position: prompts that were answered before.

    Returns:
      The experience, [P, T], whole on every device; and what is told of it, as
      `ppo` says. None if asked to stop meanwhile.
    """
    began = time.perf_counter()
    recipe, prompts = reader.recipe, ids(batch)
    # Draws follow from seed and prompt; a prompt that comes again wants others.
    first = (recipe.train.seed << 32) + position
    seeds = range(first, first + len(prompts))
    answers = answer(reader, policy, prompts, seeds)
    if answers is None:
        return None
    written = time.perf_counter()
    scores, told = score(reader, answers, batch.about_safety.tolist())

    tokens_PT, mask_PT = _laid_out(answers, len(prompts), recipe)
    parts = []
    for tokens_BT in _by_step(reader, tokens_PT):
        logprobs = reader.logprobs(policy, reader.reference, tokens_BT)
        parts.append(
            (*hosts.in_turn(logprobs), hosts.in_turn(reader.values(critic, tokens_BT)))
        )
    # Whole on every device, and so on every host, as is all that follows.
    read = map(np.concatenate, zip(*parts, strict=True))
    experience, kl = reader.learnt(tokens_PT, mask_PT, *read, scores.combined)
    return experience, {
        "iteration": position // recipe.ppo.prompts + 1,
        **told,
        "kl": float(kl),
        "answer_seconds": written - began,
        "reshard_seconds": answers.resharding.seconds,
        "read_seconds": time.perf_counter() - written,
    }


def held_out_pass(
    reader: Reader, policy: Tree, batches: Sequence[PromptBatch]
) -> dict[str, float] | None:
    """What answers to prompts are worth on average, and how far from the reference.

    Drawn as those that are learnt from, with the same luck each time.

    Args:
      reader: reads the answers.
      policy: its parameters.
      batches: all held-out prompts.

    Returns:
      What `score` tells and "kl", nats an answer, each name after "validation_". None
      if asked to stop meanwhile.
    """
    prompts = [row for batch in batches for row in ids(batch)]
    about_safety = [
        bool(about)
        for batch in batches
        for about in batch.about_safety[batch.lengths > 0]
    ]
    last = -(reader.recipe.train.seed << 32)
    answers = answer(reader, policy, prompts, range(last - len(prompts), last))
    if answers is None:
        return None
    _, told = score(reader, answers, about_safety)
    told["kl"] = _divergence(reader, policy, answers)
    return {f"validation_{name}": value for name, value in told.items()}


def _divergence(reader: Reader, policy: Tree, answers: Answers) -> float:
    """From the reference, nats an answer, as those of an iteration are measured."""
    size, total = reader.recipe.train.batch_size, 0.0
    whole_steps = -(-len(answers.rows) // size) * size
    tokens_PT, mask_PT = _laid_out(answers, whole_steps, reader.recipe)
    for step, tokens_BT in enumerate(_by_step(reader, tokens_PT)):
        logprobs = reader.logprobs(policy, reader.reference, tokens_BT)
        # Every host has them whole, and sums them by itself.
        ours_Bt, theirs_Bt = map(np.asarray, hosts.in_turn(logprobs))
        is_drawn_Bt = mask_PT[step * size : (step + 1) * size, :-1] > 0
        gaps_Bt = np.where(is_drawn_Bt, ours_Bt - theirs_Bt, 0)
        total += float(gaps_Bt.sum(dtype=np.float64))
    return total / len(answers.rows)


def _laid_out(
    answers: Answers, num_rows: int, recipe: PpoRecipe
) -> tuple[Int[np.ndarray, "P T"], Float[np.ndarray, "P T"]]:
    """Ids, and where an answer's tokens are predicted; further rows have no answer.

    `num_rows` is at least that of the answers, and steps divide it, see `_by_step`.
    """
    shape = num_rows, recipe.data.sequence_length
    tokens_PT, mask_PT = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for i, (row, start) in enumerate(zip(answers.rows, answers.starts, strict=True)):
        tokens_PT[i, : len(row)] = row
        mask_PT[i, start - 1 : len(row) - 1] = 1
    return tokens_PT, mask_PT


def _by_step(
    reader: Reader, tokens_PT: Int[np.ndarray, "P T"]
) -> Iterator[Int[Array, "B T"]]:
    """As many rows at a time as a step has, laid out as for it."""
    size = reader.recipe.train.batch_size
    for start in range(0, len(tokens_PT), size):
        yield placed(tokens_PT[start : start + size], batch_sharding(reader.policy))


def answer(
    reader: Reader, policy: Tree, prompts: Sequence[list[int]], seeds: Sequence[int]
) -> Answers | None:
    """One answer to each prompt; None if asked to stop meanwhile.

    Raises:
      TrainingError: what it takes to write them does not fit into memory.
    """
    recipe, options = reader.recipe, reader.recipe.ppo
    with faults.out_of_memory("the writing of answers", _remedies(options)):
        # The copy for decoding lives as long as this function runs.
        engine, cost = reshard(
            reader.policy,
            policy,
            reader.decoding,
            cache_length=recipe.data.sequence_length,
        )
        generator = Generator(engine, reader.tokenizer)
        answers = Answers([], list(map(len, prompts)), [], cost)
        for start in range(0, len(prompts), options.decode_batch):
            if reader.stop_now():
                return None
            part = slice(start, start + options.decode_batch)
            settings = Settings(
                max_new_tokens=options.max_new_tokens,
                sampler=TopP(1.0, temperature=options.temperature),
                seed=list(seeds[part]),
            )
            for prompt, completion in zip(
                prompts[part], generator.generate(prompts[part], settings), strict=True
            ):
                is_whole = completion.finish_reason == "stop"
                end = [reader.tokenizer.eos_id] if is_whole else []
                answers.rows.append([*prompt, *completion.tokens, *end])
                answers.is_whole.append(is_whole)
        return answers


def _remedies(options: PpoConfig) -> str:
    return (
        f"cheapest first: a smaller --ppo.decode-batch (now {options.decode_batch}); "
        "more devices that share the weights, by --ppo.decode-tensor (now "
        f"{options.decode_tensor})"
    )


def score(
    reader: Reader, answers: Answers, about_safety: Sequence[bool]
) -> tuple[Scores, dict[str, float]]:
    """What the reward models say, and what is told of it.

    As in `rollout.roll_out`, an answer that was cut is scored as if it ended there.
    """
    ended = [[*row[:-1], reader.tokenizer.eos_id] for row in answers.rows]
    scores = reader.judge.scores(ended, about_safety)
    lengths = np.array(list(map(len, answers.rows))) - np.array(answers.starts)

    def mean_chance(scores: np.ndarray) -> float:
        return float(np.mean(1 / (1 + np.exp(-scores.astype(np.float64)))))

    return scores, {
        "reward": mean_chance(scores.combined),
        "helpfulness": mean_chance(scores.helpfulness),
        "safety": mean_chance(scores.safety),
        "answer_length": float(np.mean(lengths)),
        "cut": 1 - float(np.mean(answers.is_whole)),
    }


def ids(batch: PromptBatch) -> list[list[int]]:
    """Of the prompts of a batch, without what fills it up."""
    return [
        row[:length].tolist()
        for row, length in zip(batch.tokens, batch.lengths, strict=True)
        if length
    ]


def make_values(sharded: ShardedLlama) -> ValuesStep:
    """Compiled: a number after each token of rows, whole on every device."""

    def values(params: Tree, tokens_BT: Array) -> Float[Array, "B T"]:
        tokens_BT, positions_1T = in_order(sharded, tokens_BT)
        read = {"params": params}, tokens_BT, None, positions_1T
        values_BT: Any = sharded.model.apply(*read)
        return as_written(sharded, values_BT)

    return jax.jit(
        values,
        in_shardings=(sharded.param_shardings, batch_sharding(sharded)),
        out_shardings=sharded.sharding(),
        compiler_options=compiler_options(sharded.mesh),
    )


def make_learnt(sharded: ShardedLlama, options: PpoConfig) -> LearntStep:
    """Compiled: from what all models say of answers to what these teach."""

    def learnt(
        tokens_PT: Array,
        mask_PT: Array,
        logprobs_Pt: Array,
        reference_Pt: Array,
        values_PT: Array,
        scores_P: Array,
    ) -> tuple[Experience, Array]:
        logprobs_PT, reference_PT = (
            jnp.pad(x_Pt, ((0, 0), (0, 1))) for x_Pt in (logprobs_Pt, reference_Pt)
        )
        kl_PT = sampled_kl(logprobs_PT, reference_PT, mask_PT)
        rewards_PT = token_rewards(
            whiten(scores_P, jnp.ones_like(scores_P)), kl_PT, mask_PT, beta=options.beta
        )
        advantages_PT, returns_PT = advantages_and_returns(
            rewards_PT, values_PT, mask_PT, gamma=options.gamma, lam=options.lam
        )
        experience = Experience(
            tokens=tokens_PT,
            targets=jnp.roll(tokens_PT, -1, axis=1),
            mask=mask_PT,
            logprobs=jnp.where(mask_PT > 0, logprobs_PT, 0.0),
            advantages=advantages_PT,
            values=jnp.where(mask_PT > 0, values_PT, 0.0),
            returns=returns_PT,
        )
        return experience, jnp.sum(kl_PT) / len(kl_PT)

    return jax.jit(learnt, out_shardings=sharded.sharding())


def make_rows(
    sharded: ShardedLlama,
) -> Callable[[Experience, ArrayLike], Experience]:
    """Compiled: some rows of an experience, laid out for a step."""

    def rows(experience: Experience, numbers_B: Array) -> Experience:
        return jax.tree.map(lambda x_PT: x_PT[numbers_B], experience)

    return jax.jit(rows, out_shardings=batch_sharding(sharded))


def nothing_learnt(recipe: PpoRecipe, sharded: ShardedLlama) -> Experience:
    """An experience of the right form, of zeros."""
    shape = recipe.ppo.prompts, recipe.data.sequence_length

    def zeros(dtype: type) -> jax.Array:
        return placed(np.zeros(shape, dtype), sharded.sharding())

    return Experience(
        tokens=zeros(np.int32),
        targets=zeros(np.int32),
        mask=zeros(np.float32),
        logprobs=zeros(np.float32),
        advantages=zeros(np.float32),
        values=zeros(np.float32),
        returns=zeros(np.float32),
    )


def placed(x: ArrayLike, sharding: jax.sharding.Sharding) -> jax.Array:
    """What every host has, as one array that is laid out so."""
    local = np.asarray(x)
    return jax.make_array_from_callback(
        local.shape, sharding, lambda index: local[index]
    )
