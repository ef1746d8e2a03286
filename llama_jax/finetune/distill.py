"""Context distillation: safe answers without what brought them forth (section 4.2.4).

Under a safety pre-prompt a model answers adversarial questions more safely. Such
answers are learnt as answers to the question alone, so that the model gives them
without being told. That is done where it helps: the distilled answer has to score above
the one that the model gives by itself.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, get_args

import numpy as np
from etils import epath
from jaxtyping import Float

from llama_jax.config.data import Risk
from llama_jax.config.sampling import Sampler
from llama_jax.errors import ConfigError, DataError, DialogError
from llama_jax.finetune import shards
from llama_jax.finetune.answers import (
    encode,
    require_one_each,
    sampled_answers,
    tokenizer_of,
)
from llama_jax.finetune.reward import RewardModel
from llama_jax.finetune.rollout import checksum, finite_scores, require_one_tokenizer
from llama_jax.finetune.shards import Kind, Watch, Written
from llama_jax.llm import LLM
from llama_jax.text import encode_example
from llama_jax.text.chat import Message

# Scores the last answers of dialogs.
Score = Callable[[Sequence[Sequence[Message]]], Float[np.ndarray, " dialogs"]]

# Directories of such rows.
KIND = Kind(
    article="a",
    noun="set of rows",
    manifest="distilled.json",
    files="rows",
    count="num_dialogs",
)

# What a pre-prompt calls the model. The paper prints such words; the sentence is ours.
ADJECTIVES = (
    "careful",
    "considerate",
    "honest",
    "law-abiding",
    "respectful",
    "responsible",
    "safe",
    "thoughtful",
    "wise",
)
_PREPROMPT = "You are a {} and {} assistant, and your answers do no harm."

# What an answer should do, step by step, by category (the paper's answer templates
# have two to four such steps; these are ours).
ANSWER_TEMPLATES: dict[Risk, str] = {
    "illicit and criminal activities": (
        "First, say that you will not help with what is against the law. Then explain "
        "whom it would hurt. Then name a lawful way to what is wanted, if there is one."
    ),
    "hateful and harmful activities": (
        "First, speak to the harm that the question would do. Then say why you do not "
        "take part in it. Then point to help, if someone may be in danger."
    ),
    "unqualified advice": (
        "First, say that you are no expert and know little of the case. Then give what "
        "is generally held to be true. Then name who could advise."
    ),
}


def preprompts(rng: random.Random, num: int) -> list[str]:
    """Draw safety pre-prompts, each with two of `ADJECTIVES`."""
    return [_PREPROMPT.format(*rng.sample(ADJECTIVES, 2)) for _ in range(num)]


def answer_template(risk: Risk) -> str:
    """What to put before a question of a category, instead of a general pre-prompt.

    Raises:
      ConfigError: there is no such category.
    """
    if risk not in get_args(Risk):
        raise ConfigError(f"risk is {risk!r}: give one of {get_args(Risk)}.")
    return ANSWER_TEMPLATES[risk]


class Distilled(NamedTuple):
    """An adversarial dialog, answered with and without a pre-prompt.

    Attributes:
      dialog: ends with the question.
      answer: under the pre-prompt.
      before: without it.
      score: of `answer`, raw, after the dialog without the pre-prompt.
      score_before: of `before`.
    """

    dialog: Sequence[Message]
    answer: str
    before: str
    score: float
    score_before: float

    @property
    def is_better(self) -> bool:
        """Whether the pre-prompt made a safer answer: else it is not learnt."""
        return self.score > self.score_before

    @property
    def row(self) -> dict[str, object]:
        """A line of a file that `data.DialogLines` reads."""
        said = {"role": "assistant", "content": self.answer}
        return {"messages": [*self.dialog, said], "learn": "last"}


def distil(
    llm: LLM,
    score: Score,
    dialogs: Sequence[Sequence[Message]],
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampler: Sampler,
    seed: int = 0,
    batch_size: int = 32,
) -> Iterator[Distilled]:
    """Answer adversarial dialogs with and without a pre-prompt, and compare.

    Rows of those that are better are learnt (`finetune.sft`); of the others the paper
    keeps the model's own answer, which teaches nothing new. A dialog whose answers do
    not both end by themselves is left out. What one becomes depends on its number and
    the seed, not on those beside it.

    Args:
      llm: the model, which will learn from itself.
      score: how safe the last answers are: the safety model's `RewardModel.score`.
      dialogs: adversarial ones alone, each ends with a question: the paper saw answers
        become evasive where it distilled others.
      prompts: of each dialog, what is put before it: from `preprompts`, or an
        `answer_template`. A system message that it has stays behind that.
      max_new_tokens: of an answer.
      sampler: how answers are written.
      seed: of the samples.
      batch_size: dialogs at a time.

    Raises:
      ConfigError: `batch_size` is not positive.
      DataError: there is not one prompt for each dialog.
      DialogError: a dialog is none; the message says which.
      GenerationError: the model has no tokenizer, or a setting is none.
    """
    make = _maker(
        llm,
        score,
        dialogs,
        prompts,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        seed=seed,
        batch_size=batch_size,
    )

    def batches() -> Iterator[Distilled]:
        for start in range(0, len(dialogs), batch_size):
            yield from make(range(len(dialogs))[start : start + batch_size])

    return batches()


def write_distilled(
    directory: epath.PathLike,
    llm: LLM,
    safety: RewardModel,
    dialogs: Sequence[Sequence[Message]],
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampler: Sampler,
    seed: int = 0,
    batch_size: int = 32,
    watch: Watch = lambda done, total: None,
) -> Written:
    """Write the rows of `distil` that are better, or go on, or find it done.

    A file for each batch: see `shards`. An answer that makes the dialog longer than
    the reward model reads is not scored, and such a dialog gives no row.

    Args:
      directory: for these rows, and no other.
      llm: as for `distil`.
      safety: the newest safety reward model.
      dialogs: as for `distil`.
      prompts: likewise.
      max_new_tokens: likewise.
      sampler: likewise.
      seed: likewise.
      batch_size: dialogs at a time, and in a file.
      watch: told the dialogs that are done, and how many there are.

    Raises:
      CheckpointError: the directory is in a bucket that cannot be reached.
      ConfigError, DialogError, GenerationError: as `distil`.
      DataError: there are no dialogs, or none gave a row; the directory has rows of
        other models, dialogs or settings; it cannot be written, or is damaged.
      ShardingError: hosts see different files.
      TokenizerError: model and reward models have different tokenizers.
    """
    if not dialogs:
        raise DataError("there are no dialogs: give at least one.")
    require_one_tokenizer(tokenizer_of(llm), safety.tokenizer)
    make = _maker(
        llm,
        _readable_scores(safety),
        dialogs,
        prompts,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        seed=seed,
        batch_size=batch_size,
    )
    plan = {
        "num_dialogs": len(dialogs),
        "dialogs": shards.digest_dialogs(dialogs),
        "prompts": shards.digest(list(prompts)),
        "sampler": repr(sampler),
        "max_new_tokens": max_new_tokens,
        "cache_length": llm.engine.slots,
        "seed": seed,
        "batch_size": batch_size,
        "tokenizer": safety.tokenizer.digest,
        "policy": checksum(llm.engine.weights, llm.engine.sharded.mesh),
        "safety_model": checksum(safety.params, safety.sharded.mesh),
    }

    def better(numbers: range) -> list[dict[str, object]]:
        return [one.row for one in make(numbers) if one.is_better]

    written = shards.write_rows(KIND, directory, plan, better, watch)
    if not written.num_rows:
        raise DataError(
            f"none of the {len(dialogs)} answers is safer under its pre-prompt, so "
            "there is nothing to learn: let answers be longer (max_new_tokens) if they "
            f"are cut, and remove {directory}; else leave this out."
        )
    return written


def _readable_scores(safety: RewardModel) -> Score:
    """`RewardModel.score`, where dialogs that are too long for it get NaN."""

    def score(dialogs: Sequence[Sequence[Message]]) -> np.ndarray:
        rows = [encode_example(safety.tokenizer, dialog).tokens for dialog in dialogs]
        longest = safety.sharded.config.max_length
        fits = [i for i, row in enumerate(rows) if len(row) <= longest]
        scores = np.full(len(rows), np.nan, np.float32)
        scores[fits] = finite_scores("safety", safety, [rows[i] for i in fits])
        return scores

    return score


def _maker(
    llm: LLM,
    score: Score,
    dialogs: Sequence[Sequence[Message]],
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampler: Sampler,
    seed: int,
    batch_size: int,
) -> Callable[[range], list[Distilled]]:
    """From the numbers of some dialogs to their answers; all arguments are checked."""
    shards.require_counts(batch_size=batch_size)
    require_one_each("prompts", prompts, "dialogs", dialogs)
    for number, dialog in enumerate(dialogs):
        try:
            encode(llm, dialog)
        except DialogError as error:
            raise DialogError(f"dialogs[{number}]: {error}") from None

    def answers(
        numbers: Sequence[int], asked: Sequence[Sequence[Message]]
    ) -> list[list[str]]:
        return sampled_answers(
            llm,
            asked,
            num_samples=1,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            seed=[(seed << 32) + number for number in numbers],
        )

    def make(numbers: range) -> list[Distilled]:
        plain = answers(numbers, [dialogs[number] for number in numbers])
        told = answers(
            numbers, [_told(dialogs[number], prompts[number]) for number in numbers]
        )
        both = [
            (dialogs[number], after[0], before[0])
            for number, after, before in zip(numbers, told, plain, strict=True)
            if after and before
        ]
        return list(_scored(score, both))

    return make


def _scored(
    score: Score,
    answered: Sequence[tuple[Sequence[Message], str, str]],
) -> Iterator[Distilled]:
    whole = [
        [*dialog, {"role": "assistant", "content": answer}]
        for dialog, *both in answered
        for answer in both
    ]
    scores = score(whole).reshape(-1, 2).tolist()
    for (dialog, after, before), of_both in zip(answered, scores, strict=True):
        yield Distilled(dialog, after, before, *of_both)


def _told(dialog: Sequence[Message], prompt: str) -> list[Message]:
    """The dialog under a pre-prompt, which is its system message, or in front of it."""
    first, *rest = dialog
    if first["role"] == "system":
        return [{"role": "system", "content": f"{prompt}\n{first['content']}"}, *rest]
    return [{"role": "system", "content": prompt}, first, *rest]
