"""Ghost Attention: an instruction that holds for a whole dialog (section 3.3, A.3.5).

It is a recipe for data, and nothing in the attention changes. The instruction is put
to the model with every question, and its answer kept; the row that is learnt has the
instruction in its first turn alone, and the loss is that of the last answer. So earlier
answers, which may not have followed the instruction, are read and not learnt. Rows are
trained on as dialogs are (`finetune.sft`), in what proportion to others is
`data.weights`.

Shape suffixes: L layers, N query heads, T positions, b bins of them.
"""

import dataclasses
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, TypedDict, get_args

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

from llama_jax.config.sampling import Greedy, Sampler
from llama_jax.errors import ConfigError, DataError, DialogError
from llama_jax.finetune.answers import can_be_learnt, encode, sampled_answers
from llama_jax.llm import LLM
from llama_jax.text.chat import Learnt, Message, require_example

Resample = Literal["last", "all"]

# From a dialog that ends with a question, and answers to it, to the best one's number.
Choose = Callable[[Sequence[Message], Sequence[str]], int]

# Whether an answer to a question keeps an instruction.
Check = Callable[["Instruction", str, str], bool]

GREEDY = Greedy()

_log = logging.getLogger(__name__)


class Trait(NamedTuple):
    """A class of constraints, such as hobbies.

    Attributes:
      name: of the class.
      wording: as one says it, with {} where the value belongs.
      short: the same in few words.
    """

    name: str
    wording: str
    short: str


# The paper's classes. It prints one short wording, that of a figure; the others follow.
FIGURE = Trait("figure", "Always act as {} from now.", "Figure: {}.")
HOBBY = Trait("hobby", "You enjoy {}.", "Hobby: {}.")
LANGUAGE = Trait("language", "Always speak in {}.", "Language: {}.")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """What is to be kept to in every answer.

    Attributes:
      parts: its classes, each with the value that was drawn.
      is_short: whether it is said in few words.
    """

    parts: tuple[tuple[Trait, str], ...]
    is_short: bool

    @property
    def text(self) -> str:
        """As it is put to the model."""
        return " ".join(
            (trait.short if self.is_short else trait.wording).format(value)
            for trait, value in self.parts
        )

    @property
    def values(self) -> dict[str, str]:
        """The value of each class, by its name."""
        return {trait.name: value for trait, value in self.parts}


class GhostRow(TypedDict):
    """A line of a file that `data.DialogLines` reads."""

    messages: list[dict[str, str]]
    learn: Learnt


def synthesise(
    rng: random.Random,
    values: Mapping[Trait, Sequence[str]],
    num: int,
    *,
    short_share: float = 0.5,
) -> list[Instruction]:
    """Draw instructions that combine classes at random.

    The paper says no more than that; that every combination is as likely as any other,
    and every value, is ours. It had the lists of values written by the model itself,
    so that they name what it knows.

    Args:
      rng: draws.
      values: of each class, as {FIGURE: ["Napoleon", ...], HOBBY: [...]}.
      num: instructions.
      short_share: of them that are shortened; the paper shortens half.

    Raises:
      ConfigError: no class, a class without values or without a place for them, or a
        share that is none.
    """
    if not values:
        raise ConfigError("values is empty: give at least one class, as FIGURE.")
    for trait, choices in values.items():
        if not choices:
            raise ConfigError(f"the class {trait.name!r} has no values: give some.")
        if "{}" not in trait.wording or "{}" not in trait.short:
            raise ConfigError(
                f"{trait} has a wording without {{}}: write it where the value belongs."
            )
    if not 0 <= short_share <= 1:
        raise ConfigError(f"short_share is {short_share}: it is a share, from 0 to 1.")
    traits = list(values)
    instructions = []
    for _ in range(num):
        # One bit a class, and never none of them: each combination is one number.
        combination = rng.randrange(1, 2 ** len(traits))
        parts = tuple(
            (trait, rng.choice(values[trait]))
            for i, trait in enumerate(traits)
            if combination >> i & 1
        )
        is_short = rng.random() < short_share
        instructions.append(Instruction(parts, is_short))
    return instructions


def attach(dialog: Sequence[Message], instruction: Instruction) -> list[dict[str, str]]:
    """The dialog with the instruction in front of every question."""
    return [
        {
            "role": message["role"],
            "content": f"{instruction.text} {message['content']}"
            if message["role"] == "user"
            else message["content"],
        }
        for message in dialog
    ]


def ghost(dialog: Sequence[Message], instruction: Instruction) -> GhostRow:
    """The dialog with the instruction as its system message, the last answer learnt.

    A system message that is there already stays, in front of it.

    Raises:
      DialogError: the dialog is none that ends with an answer.
    """
    require_example(dialog)
    return {"messages": _instructed(dialog, instruction), "learn": "last"}


def ghost_rows(
    llm: LLM,
    dialogs: Sequence[Sequence[Message]],
    instructions: Sequence[Instruction],
    *,
    choose: Choose,
    num_samples: int,
    max_new_tokens: int,
    sampler: Sampler,
    resample: Resample = "last",
    seed: int = 0,
    batch_size: int = 32,
) -> Iterator[GhostRow]:
    """Answer each dialog under its instruction, and give the rows to learn from.

    A dialog gives no row if it outgrows the context, or if none of the samples ends by
    itself and can be learnt; how many did not is logged. What a dialog becomes depends
    on its number and the seed, not on those beside it.

    Args:
      llm: the newest model.
      dialogs: each ends with a question, or with an answer, which is replaced.
      instructions: one for each.
      choose: the best of the answers, seen with the dialog that they answer, in which
        every question has the instruction.
      num_samples: answers to choose from; the paper samples as for rejection sampling.
      max_new_tokens: of an answer. One that is cut there would teach to stop anywhere.
      sampler: how answers are written.
      resample: whether "all" answers are sampled, turn by turn, or the "last" alone,
        after those that the dialog has. The paper can be read either way.
      seed: of the samples.
      batch_size: dialogs at a time.

    Raises:
      ConfigError: `resample` or `batch_size` is none of these.
      DataError: there is not one instruction for each dialog, or `choose` gives no
        answer's number.
      DialogError: a dialog is none; the message says which.
      GenerationError: the model has no tokenizer, or a setting is none.
    """
    if resample not in get_args(Resample):
        raise ConfigError(f"resample is {resample!r}: give 'last' or 'all'.")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: it has to be positive.")
    _require_one_each("instructions", instructions, dialogs)
    asked = [_asked(llm, number, dialog) for number, dialog in enumerate(dialogs)]

    def answers(
        numbers: Sequence[int], prompts: Sequence[Sequence[Message]]
    ) -> list[str | None]:
        """The best answer to each of some dialogs, None where none can be learnt."""
        sampled = sampled_answers(
            llm,
            prompts,
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            seed=[(seed << 32) + number for number in numbers],
        )
        return [
            _best(choose, prompt, candidates)
            for prompt, candidates in zip(prompts, sampled, strict=True)
        ]

    def rows() -> Iterator[GhostRow]:
        num_rows = 0
        for start in range(0, len(asked), batch_size):
            numbers = range(len(asked))[start : start + batch_size]
            answered = _answered(
                {number: asked[number] for number in numbers},
                instructions,
                resample,
                answers,
            )
            for number, dialog in answered.items():
                yield ghost(dialog, instructions[number])
            num_rows += len(answered)
        if num_rows < len(asked):
            _log.warning(
                "%d of %d dialogs gave no row, as no sample of them can be learnt.",
                len(asked) - num_rows,
                len(asked),
            )

    return rows()


class Consistency(NamedTuple):
    """How well instructions were kept, turn by turn.

    Attributes:
      dialogs: all that was said.
      kept: whether each answer keeps the instruction, by dialog and turn.
    """

    dialogs: list[list[dict[str, str]]]
    kept: Bool[np.ndarray, "dialogs turns"]

    @property
    def accuracy(self) -> Float[np.ndarray, " turns"]:
        """The share of dialogs that keep it, turn by turn, as in Table 30."""
        return self.kept.mean(axis=0)


def consistency(
    llm: LLM,
    instructions: Sequence[Instruction],
    questions: Sequence[Sequence[str]],
    check: Check,
    *,
    max_new_tokens: int,
    sampler: Sampler = GREEDY,
    seed: int = 0,
) -> Consistency:
    """Hold dialogs that begin with an instruction, and see how long it is kept.

    The test of Table 30: attributes are set in the first turn, then questions follow
    that ask for them, after the model's own answers. All dialogs go on at a time.

    Args:
      llm: the model.
      instructions: one for each dialog, its system message.
      questions: of each dialog, one a turn, equally many in all.
      check: whether an answer keeps an instruction, in place of the paper's human.
      max_new_tokens: of an answer.
      sampler: how answers are written.
      seed: of the samples.

    Raises:
      DataError: there are no dialogs, or not equally many questions in each, one
        instruction for each.
      DialogError: a question holds a tag of the format.
      GenerationError: the model has no tokenizer, or the dialogs outgrow its context.
    """
    _require_one_each("instructions", instructions, questions)
    lengths = {len(asked) for asked in questions}
    if len(lengths) != 1 or lengths == {0}:
        raise DataError(
            f"questions has dialogs of {sorted(lengths)} turns: give at least one "
            "dialog, and equally many questions, one or more, in each."
        )
    dialogs: list[list[dict[str, str]]] = [
        [{"role": "system", "content": instruction.text}]
        for instruction in instructions
    ]
    kept = np.zeros((len(dialogs), *lengths), bool)
    for turn in range(kept.shape[1]):
        for dialog, asked in zip(dialogs, questions, strict=True):
            dialog.append({"role": "user", "content": asked[turn]})
        completions = llm.generate(
            [encode(llm, dialog) for dialog in dialogs],
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            seed=[(seed << 32) + number for number in range(len(dialogs))],
        )
        for number, completion in enumerate(completions):
            answer = completion.text.strip()
            question = questions[number][turn]
            kept[number, turn] = check(instructions[number], question, answer)
            # An answer that holds a tag cannot be shown to the model again.
            said = answer if can_be_learnt(answer) else ""
            dialogs[number].append({"role": "assistant", "content": said})
    return Consistency(dialogs, kept)


def attention_map(
    llm: LLM, tokens: ArrayLike, *, bin_size: int
) -> Float[np.ndarray, "b b"]:
    """How much each part of a row of ids attends to each, at the most (Figure 10).

    The highest attention probability of all layers and heads and of all pairs of
    tokens in two bins, from the bin that looks to the one that is looked at. The paper
    does not say how neighbours are put in bins; that they are of one size, the last
    being what is left, and that the highest counts, is ours.

    Args:
      llm: the model.
      tokens: int[T], as `text.encode_dialog` makes them. Memory grows with T squared,
        times layers and heads.
      bin_size: tokens in a bin.

    Raises:
      ConfigError: `bin_size` is not positive.
      GenerationError: see `LLM.attention`.
    """
    if bin_size < 1:
        raise ConfigError(f"bin_size is {bin_size}: it has to be positive.")
    most_TT = llm.attention(tokens).max(axis=(0, 1))
    starts = np.arange(0, len(most_TT), bin_size)
    most_bT = np.maximum.reduceat(most_TT, starts, axis=0)
    return np.maximum.reduceat(most_bT, starts, axis=1)


def _instructed(
    dialog: Sequence[Message], instruction: Instruction
) -> list[dict[str, str]]:
    """With the instruction in the system slot, which is part of the first turn."""
    messages = [dict(message) for message in dialog]
    before = messages.pop(0)["content"] + "\n" if _has_system(dialog) else ""
    return [{"role": "system", "content": before + instruction.text}, *messages]


def _has_system(dialog: Sequence[Message]) -> bool:
    return dialog[0]["role"] == "system"


def _asked(llm: LLM, number: int, dialog: Sequence[Message]) -> Sequence[Message]:
    """A dialog up to its last question."""
    try:
        is_answered = bool(dialog) and dialog[-1].get("role") == "assistant"
        asked = dialog[:-1] if is_answered else dialog
        encode(llm, asked)
    except DialogError as error:
        raise DialogError(f"dialogs[{number}]: {error}") from None
    return asked


def _answered(
    dialogs: Mapping[int, Sequence[Message]],
    instructions: Sequence[Instruction],
    resample: Resample,
    answers: Callable[[list[int], list[list[dict[str, str]]]], list[str | None]],
) -> dict[int, list[dict[str, str]]]:
    """The dialogs, by number, with new answers; without those that lack one."""
    answered = {
        number: [dict(message) for message in dialog]
        for number, dialog in dialogs.items()
    }
    questions = {
        number: [i for i, message in enumerate(dialog) if message["role"] == "user"]
        for number, dialog in dialogs.items()
    }
    if resample == "last":
        questions = {number: places[-1:] for number, places in questions.items()}
    for turn in range(max(map(len, questions.values()))):
        numbers = [number for number in answered if turn < len(questions[number])]
        prompts = [
            attach(
                answered[number][: questions[number][turn] + 1], instructions[number]
            )
            for number in numbers
        ]
        for number, answer in zip(numbers, answers(numbers, prompts), strict=True):
            if answer is None:
                del answered[number]
                continue
            place = questions[number][turn] + 1
            said = {"role": "assistant", "content": answer}
            answered[number][place : place + 1] = [said]
    return answered


def _best(
    choose: Choose, prompt: Sequence[Message], candidates: Sequence[str]
) -> str | None:
    if not candidates:
        return None
    number = choose(prompt, candidates)
    if not 0 <= number < len(candidates):
        raise DataError(
            f"choose gave {number!r} for {len(candidates)} answers: let it give the "
            "number of one of them, counted from 0."
        )
    return candidates[number]


def _require_one_each(
    name: str, given: Sequence[object], dialogs: Sequence[object]
) -> None:
    if len(given) != len(dialogs):
        raise DataError(
            f"{name} are {len(given)} and dialogs {len(dialogs)}: give one for each."
        )
