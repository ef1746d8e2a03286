"""Rejection sampling: of several answers the best, to learn from (section 3.2.3).

The newest model answers each prompt several times, reward models score the answers, and
a model is fine-tuned on the best ones as on any dialogs (`finetune.sft`): the same
model, or a smaller one, as the paper's smaller models learnt from what the largest
wrote. An iteration is a directory:

    DIR/iteration.json                     what was asked, of which models
    DIR/rollouts-00000-of-00012.jsonl      a prompt a line, its answers and scores

An iteration that was killed goes on where it was, and ends as it would have: see
`shards`.

Shape suffixes: P prompts, K answers to each.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
from etils import epath
from jaxtyping import Float
from numpy.typing import ArrayLike

from llama_jax.checkpoint.params import place
from llama_jax.config.sampling import Sampler, TopP
from llama_jax.data import Prompt
from llama_jax.errors import ConfigError, DataError, TokenizerError
from llama_jax.finetune import shards
from llama_jax.finetune.answers import can_be_learnt
from llama_jax.finetune.rollout import (
    Answer,
    Judge,
    Rollout,
    Scores,
    checksum,
    encode_prompts,
    roll_out,
)
from llama_jax.finetune.shards import Kind, Shards, Watch
from llama_jax.generate import Generator, Settings
from llama_jax.text.chat import Message

Keep = Literal["latest", "all"]

MANIFEST = "iteration.json"

# Answers to a prompt. The paper does not say how many it had; its figures go from 20
# to 100.
NUM_SAMPLES = 20
# The paper found 1.2 to 1.3 the best for 10 to 100 answers of its chat model, and had
# to look anew after each iteration.
SAMPLER = TopP(1.0, temperature=1.2)

# In the manifest, what scores depend on.
_JUDGE = ("safety_model", "helpfulness_model", "threshold")

_KIND = Kind(
    article="an",
    noun="iteration of rejection sampling",
    manifest=MANIFEST,
    files="rollouts",
    count="num_prompts",
    facts=("tokenizer", *_JUDGE),
)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Iteration:
    """All answers of one iteration, on disk and whole.

    Attributes:
      path: the directory.
      plan: what was asked, of which models.
    """

    path: epath.Path
    plan: Mapping[str, Any]

    @classmethod
    def open(cls, path: epath.PathLike) -> Self:
        """An iteration that is done.

        Raises:
          CheckpointError: it is in a bucket that cannot be reached.
          DataError: it is none, or is not done.
        """
        own = shards.open_done(_KIND, path)
        return cls(own.path, own.plan)

    def rollouts(self) -> Iterator[Rollout]:
        """Every prompt with its answers, as `rollout.roll_out` gave them.

        Raises:
          DataError: a file is damaged.
        """
        own = Shards(_KIND, self.path, self.plan)
        for number in range(own.num_files):
            rollouts = own.read(number, _from_line)
            if len(rollouts) != len(own.items(number)):
                raise shards.damaged(own.file(number), f"it has {len(rollouts)} lines")
            yield from rollouts

    def rewards(self) -> Float[np.ndarray, "P K"]:
        """The combined score of every answer, as a number in (0, 1).

        Of those too that are never chosen, because they were cut.

        Raises:
          DataError: a file is damaged.
        """
        raw = np.stack([rollout.scores.combined for rollout in self.rollouts()])
        return 1 / (1 + np.exp(-raw.astype(np.float64)))


def sample(
    directory: epath.PathLike,
    generator: Generator,
    judge: Judge,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    num_samples: int = NUM_SAMPLES,
    sampler: Sampler = SAMPLER,
    seed: int = 0,
    batch_size: int = 32,
    watch: Watch = lambda done, total: None,
) -> Iteration:
    """Answer and score all prompts, or go on with that, or find it done.

    What a prompt is answered with depends on its number and the seed. On several hosts
    all of them call this, and see one directory, to which the first one writes.

    Args:
      directory: of this iteration, and of no other.
      generator: the newest model, on the mesh for decoding.
      judge: the newest reward models.
      prompts: what to answer.
      max_new_tokens: of an answer, EOS included; one that is cut is never the best.
      num_samples: answers to each prompt (ours, see `NUM_SAMPLES`).
      sampler: how they are drawn (see `SAMPLER`); greedy ones would all be the same.
      seed: of the samples.
      batch_size: prompts at a time, and in a file.
      watch: told the prompts that are done, and how many there are.

    Raises:
      CheckpointError: the directory is in a bucket that cannot be reached.
      ConfigError: `num_samples` or `batch_size` is not positive.
      DataError: there are no prompts; the directory has an iteration of other models,
        prompts or settings; it cannot be written; or as `rollout.roll_out`.
      DialogError, GenerationError, TokenizerError: as `rollout.roll_out`, before
        anything is sampled.
      ShardingError: hosts see different files.
    """
    shards.require_counts(num_samples=num_samples, batch_size=batch_size)
    if not prompts:
        raise DataError("there are no prompts: give at least one.")
    generator.choice(Settings(max_new_tokens=max_new_tokens, sampler=sampler))
    encode_prompts(generator, judge, prompts, max_new_tokens=max_new_tokens)
    engine = generator.engine
    plan = {
        "num_prompts": len(prompts),
        "prompts": shards.digest([_prompt_to_json(prompt) for prompt in prompts]),
        "num_samples": num_samples,
        "sampler": repr(sampler),
        "max_new_tokens": max_new_tokens,
        "cache_length": engine.slots,
        "seed": seed,
        "batch_size": batch_size,
        "tokenizer": judge.tokenizer.digest,
        "policy": checksum(engine.weights, engine.sharded.mesh),
        **judge.facts(),
    }

    def lines(numbers: range) -> Iterator[str]:
        rollouts = roll_out(
            generator,
            judge,
            [prompts[i] for i in numbers],
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            # Draws follow from seed and prompt, and equal prompts want others.
            seed=[(seed << 32) + i for i in numbers],
        )
        return map(_to_line, rollouts)

    own = Shards(_KIND, place(directory), plan)
    own.complete(lines, watch)
    return Iteration(own.path, plan)


def best_of(rollout: Rollout) -> int | None:
    """The number of the best answer by the combined score, of equals the first.

    None if there is none to learn from: one that was cut would teach to stop anywhere,
    and one that is empty or holds a tag of the format is no answer (ours).
    """
    usable = [
        answer.is_whole and can_be_learnt(answer.text) for answer in rollout.answers
    ]
    if not any(usable):
        return None
    return int(np.argmax(np.where(usable, rollout.scores.combined, -np.inf)))


class Winner(NamedTuple):
    """The best answer to a prompt.

    Attributes:
      prompt: what was asked.
      text: the answer.
      tokens: ids of both, to the EOS.
      score: combined, before the sigmoid.
      path: the iteration that it is from.
    """

    prompt: Prompt
    text: str
    tokens: Sequence[int]
    score: float
    path: str

    @property
    def messages(self) -> list[Message]:
        """The dialog with the answer."""
        return [*self.prompt.messages, {"role": "assistant", "content": self.text}]


class Selection(NamedTuple):
    """What is learnt of iterations.

    Attributes:
      winners: of each prompt that has any, the best answer.
      num_prompts: different ones, those without such an answer included.
    """

    winners: list[Winner]
    num_prompts: int


def pool(
    iterations: Sequence[Iteration], *, keep: Keep, judge: Judge | None = None
) -> list[Winner]:
    """For each prompt the best answer: the winners of `select`."""
    return select(iterations, keep=keep, judge=judge).winners


def select(
    iterations: Sequence[Iteration], *, keep: Keep, judge: Judge | None = None
) -> Selection:
    """For each prompt the best answer, in the order in which prompts first came.

    The paper kept the "latest" iteration's alone until RLHF-V3, which had forgotten
    how to rhyme, and from then on the best of "all" (section 3.2.3). Of equally good
    ones it is the earliest that stays. Prompts are the same if their messages are.

    Args:
      iterations: from the first to the newest.
      keep: which of them count.
      judge: scores the best of each iteration again, as scores of one reward model say
        nothing beside those of another (ours). Not needed where one scored them all,
        nor where no two iterations have a prompt in common.

    Raises:
      ConfigError: `keep` is none of these.
      DataError: there are no iterations; files are damaged; a prompt has answers that
        different reward models scored, and there is no `judge`.
      TokenizerError: the judge has another tokenizer than an iteration.
    """
    if keep not in get_args(Keep):
        raise ConfigError(f"keep is {keep!r}: give 'latest' or 'all'.")
    if not iterations:
        raise DataError("there are no iterations to choose from: sample one first.")
    best = dict[str, tuple[Winner, Iteration]]()
    keys = set[str]()
    for iteration in iterations if keep == "all" else iterations[-1:]:
        winners = list[Winner]()
        for rollout in iteration.rollouts():
            keys.add(_key(rollout.prompt))
            if (number := best_of(rollout)) is not None:
                winners.append(_winner(iteration, rollout, number))
        if judge is not None:
            winners = _scored_again(iteration, winners, judge)
        for winner in winners:
            key = _key(winner.prompt)
            if key in best:
                other, where = best[key]
                if judge is None:
                    _require_one_judge(where, iteration)
                if winner.score <= other.score:
                    continue
            best[key] = winner, iteration
    if left_out := len(keys) - len(best):
        _log.warning(
            "%d of %d prompts have no answer that can be learnt, and are left out.",
            left_out,
            len(keys),
        )
    return Selection([winner for winner, _ in best.values()], len(keys))


def write_dialogs(path: epath.PathLike, winners: Sequence[Winner]) -> None:
    """Write a file that `data.DialogLines` reads; of each dialog the answer is learnt.

    {"messages": [...], "learn": "last"} a line. On several hosts the first one writes.

    Raises:
      DataError: there is nothing to write, or it cannot be written.
    """
    if not winners:
        raise DataError(
            f"no answer can be learnt, so {path} is not written: let answers be longer "
            "(max_new_tokens), or sample more of them."
        )
    lines = [{"messages": winner.messages, "learn": "last"} for winner in winners]
    shards.write(place(path), "".join(map(shards.line, lines)))


class RewardCurve(NamedTuple):
    """What the best and the median of N answers are worth, for N = 1 ... K (Figure 7).

    Attributes:
      max: the best, on average over prompts and choices of N.
      median: the median likewise; of an even N the mean of the middle two.
    """

    max: Float[np.ndarray, " K"]
    median: Float[np.ndarray, " K"]


def reward_curve(rewards: ArrayLike) -> RewardCurve:
    """The curve of Figure 7.

    For each N it is the mean over all choices of N out of the K answers, in closed
    form: unbiased, and without the jumps of a single draw.

    Args:
      rewards: of each answer to each prompt, [P, K], see `Iteration.rewards`.

    Raises:
      DataError: they are no such table of numbers.
    """
    table = np.asarray(rewards, np.float64)
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise DataError(
            f"rewards has the shape {table.shape}: give finite numbers, a row for each "
            "prompt, with equally many answers in each."
        )
    mean = np.sort(table, axis=1).mean(axis=0)
    num = len(mean)

    def expected(size: int, rank: int) -> float:
        """What is the `rank`-th smallest of `size` answers, counted from 1."""
        ways = [
            math.comb(i, rank - 1) * math.comb(num - 1 - i, size - rank)
            for i in range(num)
        ]
        shares = [way / math.comb(num, size) for way in ways]
        return float(np.dot(shares, mean))

    sizes = range(1, num + 1)
    return RewardCurve(
        max=np.array([expected(size, size) for size in sizes]),
        median=np.array(
            [
                (expected(size, (size + 1) // 2) + expected(size, size // 2 + 1)) / 2
                for size in sizes
            ]
        ),
    )


def _require_one_judge(one: Iteration, other: Iteration) -> None:
    if any(one.plan[name] != other.plan[name] for name in _JUDGE):
        raise DataError(
            f"{one.path} and {other.path} have prompts in common, and other reward "
            "models scored them, so that their scores cannot be compared: give "
            "a judge (--helpfulness and --safety), which scores the best answers again."
        )


def _winner(iteration: Iteration, rollout: Rollout, number: int) -> Winner:
    answer = rollout.answers[number]
    return Winner(
        prompt=rollout.prompt,
        text=answer.text,
        tokens=[*rollout.prompt_tokens, *answer.tokens],
        score=float(rollout.scores.combined[number]),
        path=str(iteration.path),
    )


def _scored_again(
    iteration: Iteration, winners: Sequence[Winner], judge: Judge
) -> list[Winner]:
    if judge.tokenizer.digest != iteration.plan["tokenizer"]:
        raise TokenizerError(
            f"{iteration.path} was sampled with another tokenizer than the judge's, so "
            "that its ids mean other text: leave it out, or give reward models of its "
            "tokenizer."
        )
    scores = judge.scores(
        [winner.tokens for winner in winners],
        [winner.prompt.about_safety for winner in winners],
    )
    return [
        winner._replace(score=float(score))
        for winner, score in zip(winners, scores.combined, strict=True)
    ]


def _key(prompt: Prompt) -> str:
    return shards.digest(_prompt_to_json(prompt)["messages"])


def _prompt_to_json(prompt: Prompt) -> dict[str, Any]:
    return {
        "messages": shards.plain(prompt.messages),
        "about_safety": bool(prompt.about_safety),
    }


def _to_line(rollout: Rollout) -> str:
    row = _prompt_to_json(rollout.prompt) | {
        "prompt_tokens": list(rollout.prompt_tokens),
        "answers": [
            answer._asdict()
            | dict(zip(Scores._fields, map(float, scores), strict=True))
            for answer, *scores in zip(rollout.answers, *rollout.scores, strict=True)
        ],
    }
    return shards.line(row)


def _from_line(line: str) -> Rollout:
    row = json.loads(line)
    answers = row["answers"]
    return Rollout(
        Prompt(row["messages"], row["about_safety"]),
        row["prompt_tokens"],
        [Answer(*(answer[name] for name in Answer._fields)) for answer in answers],
        Scores(
            *(
                np.array([answer[kind] for answer in answers], np.float32)
                for kind in Scores._fields
            )
        ),
    )
