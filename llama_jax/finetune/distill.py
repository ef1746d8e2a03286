"""Context distillation: safe answers without what brought them forth (section 4.2.4).

Under a safety pre-prompt a model answers adversarial questions more safely. Such
answers are learnt as answers to the question alone, so that the model gives them
without being told. That is done where it helps: the distilled answer has to score above
the one that the model gives by itself.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float

from llama_jax.config.sampling import Sampler
from llama_jax.errors import ConfigError, DataError, DialogError
from llama_jax.finetune.answers import encode, sampled_answers
from llama_jax.llm import LLM
from llama_jax.text.chat import Message

# The paper's categories of risk (section 4.2.1).
Risk = Literal[
    "illicit and criminal activities",
    "hateful and harmful activities",
    "unqualified advice",
]

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
    score: Callable[[Sequence[Sequence[Message]]], Float[np.ndarray, " dialogs"]],
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
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: it has to be positive.")
    if len(prompts) != len(dialogs):
        raise DataError(
            f"prompts are {len(prompts)} and dialogs {len(dialogs)}: give one for each."
        )
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

    def batches() -> Iterator[Distilled]:
        for start in range(0, len(dialogs), batch_size):
            numbers = range(len(dialogs))[start : start + batch_size]
            plain = answers(numbers, [dialogs[number] for number in numbers])
            told = answers(
                numbers, [_told(dialogs[number], prompts[number]) for number in numbers]
            )
            both = [
                (dialogs[number], after[0], before[0])
                for number, after, before in zip(numbers, told, plain, strict=True)
                if after and before
            ]
            yield from _scored(score, both)

    return batches()


def _scored(
    score: Callable[[Sequence[Sequence[Message]]], Float[np.ndarray, " dialogs"]],
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
