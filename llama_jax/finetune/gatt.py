"""Ghost Attention: an instruction that holds for a whole dialog (section 3.3, A.3.5).

It is a recipe for data, and nothing in the attention changes. The instruction is put
to the model with every question, and its answer kept; the row that is learnt has the
instruction in its first turn alone, and the loss is that of the last answer. So earlier
answers, which may not have followed the instruction, are read and not learnt. Rows are
trained on as dialogs are (`finetune.sft`), in what proportion to others is
`data.weights`.
"""

import dataclasses
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import numpy as np
from etils import epath

from llama_jax.config.sampling import Sampler
from llama_jax.errors import ConfigError, DataError, DialogError
from llama_jax.finetune import shards
from llama_jax.finetune.answers import (
    can_be_learnt,
    encode,
    require_one_each,
    sampled_answers,
    tokenizer_of,
)
from llama_jax.finetune.rollout import Judge, checksum, require_one_tokenizer
from llama_jax.finetune.shards import Kind, Watch, Written
from llama_jax.llm import LLM
from llama_jax.text import encode_example
from llama_jax.text.chat import Learnt, Message, require_example

Resample = Literal["last", "all"]

# From a dialog that ends with a question, and answers to it, to the best one's number,
# or None if none of them is to be learnt.
Choose = Callable[[Sequence[Message], Sequence[str]], int | None]

# Directories of such rows.
KIND = Kind(
    article="a",
    noun="set of rows",
    manifest="ghost.json",
    files="rows",
    count="num_dialogs",
)

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
_TRAITS = {trait.name: trait for trait in (FIGURE, HOBBY, LANGUAGE)}


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


def read_values(path: epath.PathLike) -> dict[Trait, list[str]]:
    """The classes of constraints, and the values of each, that a JSON file names.

    {"figure": ["Napoleon", ...], "ending": {"wording": "End every answer with {}.",
    "short": "Ending: {}.", "values": ["a proverb", ...]}}: the paper's classes by name
    (figure, hobby, language), any other one with its wordings.

    Raises:
      DataError: it cannot be read, is not JSON, or does not say these.
    """
    try:
        content = json.loads(epath.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no JSON that can be read: {error}.") from error
    if not isinstance(content, dict) or not content:
        raise DataError(
            f'{path} names no class: write an object, as {{"hobby": ["chess", ...]}}.'
        )
    return dict(_class_of(f"{path}: {name!r}", name, content[name]) for name in content)


def _class_of(where: str, name: str, given: Any) -> tuple[Trait, list[str]]:
    if isinstance(given, list) and name in _TRAITS:
        trait, values = _TRAITS[name], given
    elif isinstance(given, dict) and given.keys() == {"wording", "short", "values"}:
        trait, values = Trait(name, given["wording"], given["short"]), given["values"]
    else:
        raise DataError(
            f"{where} is {given!r:.60}: write a list of values for a class of the "
            f"paper ({', '.join(_TRAITS)}), and for any other one "
            '{"wording": "... {} ...", "short": "... {} ...", "values": [...]}.'
        )
    for wording in trait[1:]:
        # Of braces, {} alone is a place for a value.
        parts = wording.split("{}") if isinstance(wording, str) else []
        if len(parts) != 2 or any(mark in "".join(parts) for mark in "{}"):
            raise DataError(
                f"{where} is said as {wording!r:.60}: write {{}} once, where the value "
                "belongs, and no other braces."
            )
        _require_text(where, wording)
    if not isinstance(values, list) or not values:
        raise DataError(f"{where} has no values: write a list of texts.")
    for value in values:
        _require_text(where, value)
    return trait, values


def _require_text(where: str, text: Any) -> None:
    if not isinstance(text, str) or not can_be_learnt(text):
        raise DataError(
            f"{where} has {text!r:.60}: write some text, without tags of the format."
        )


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
        every question has the instruction; see `chosen_by`.
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
    make = _maker(
        llm,
        dialogs,
        instructions,
        choose=choose,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        resample=resample,
        seed=seed,
        batch_size=batch_size,
    )

    def rows() -> Iterator[GhostRow]:
        num_rows = 0
        for start in range(0, len(dialogs), batch_size):
            made = make(range(len(dialogs))[start : start + batch_size])
            yield from made
            num_rows += len(made)
        if num_rows < len(dialogs):
            _log.warning(
                "%d of %d dialogs gave no row, as no sample of them can be learnt.",
                len(dialogs) - num_rows,
                len(dialogs),
            )

    return rows()


def chosen_by(judge: Judge) -> Choose:
    """The answer of the highest combined score, as rejection sampling chooses.

    The paper says that Ghost Attention samples as that does; that its data are not
    about safety, so that the safety score counts below the threshold alone, is ours.
    An answer that makes the dialog longer than the reward models read is never chosen.
    """

    def choose(dialog: Sequence[Message], candidates: Sequence[str]) -> int | None:
        encoded = {
            answer: encode_example(
                judge.tokenizer, [*dialog, {"role": "assistant", "content": answer}]
            ).tokens
            for answer in candidates
        }
        fits = {
            answer: ids
            for answer, ids in encoded.items()
            if len(ids) <= judge.max_length
        }
        if not fits:
            return None
        best, *others = fits
        if others:  # else there is nothing to choose
            scores = judge.scores(list(fits.values()), [False] * len(fits))
            best = list(fits)[int(np.argmax(scores.combined))]
        return candidates.index(best)

    return choose


def write_ghost_rows(
    directory: epath.PathLike,
    llm: LLM,
    dialogs: Sequence[Sequence[Message]],
    instructions: Sequence[Instruction],
    *,
    judge: Judge,
    num_samples: int,
    max_new_tokens: int,
    sampler: Sampler,
    resample: Resample = "last",
    seed: int = 0,
    batch_size: int = 32,
    watch: Watch = lambda done, total: None,
) -> Written:
    """Write the rows of `ghost_rows`, or go on with that, or find it done.

    A file for each batch: see `shards`. The answers are `chosen_by` reward models.

    Args:
      directory: for these rows, and no other.
      llm: as for `ghost_rows`.
      dialogs: likewise.
      instructions: likewise.
      judge: the newest reward models.
      num_samples: as for `ghost_rows`.
      max_new_tokens: likewise.
      sampler: likewise.
      resample: likewise.
      seed: likewise.
      batch_size: dialogs at a time, and in a file.
      watch: told the dialogs that are done, and how many there are.

    Raises:
      CheckpointError: the directory is in a bucket that cannot be reached.
      ConfigError, DialogError, GenerationError: as `ghost_rows`.
      DataError: there are no dialogs, or none gave a row; the directory has rows of
        other models, dialogs or settings; it cannot be written, or is damaged.
      ShardingError: hosts see different files.
      TokenizerError: model and reward models have different tokenizers.
    """
    if not dialogs:
        raise DataError("there are no dialogs: give at least one.")
    require_one_tokenizer(tokenizer_of(llm), judge.tokenizer)
    make = _maker(
        llm,
        dialogs,
        instructions,
        choose=chosen_by(judge),
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        resample=resample,
        seed=seed,
        batch_size=batch_size,
    )
    plan = {
        "num_dialogs": len(dialogs),
        "dialogs": shards.digest_dialogs(dialogs),
        "instructions": shards.digest([said.text for said in instructions]),
        "num_samples": num_samples,
        "sampler": repr(sampler),
        "max_new_tokens": max_new_tokens,
        "cache_length": llm.engine.slots,
        "resample": resample,
        "seed": seed,
        "batch_size": batch_size,
        "tokenizer": judge.tokenizer.digest,
        "policy": checksum(llm.engine.weights, llm.engine.sharded.mesh),
        **judge.facts(),
    }
    written = shards.write_rows(KIND, directory, plan, make, watch)
    if not written.num_rows:
        raise DataError(
            f"none of the {len(dialogs)} dialogs gave a row, as no answer can be "
            "learnt: let answers be longer (max_new_tokens), or sample more of them, "
            f"and remove {directory}."
        )
    return written


def _maker(
    llm: LLM,
    dialogs: Sequence[Sequence[Message]],
    instructions: Sequence[Instruction],
    *,
    choose: Choose,
    num_samples: int,
    max_new_tokens: int,
    sampler: Sampler,
    resample: Resample,
    seed: int,
    batch_size: int,
) -> Callable[[range], list[GhostRow]]:
    """From the numbers of some dialogs to their rows; all arguments are checked."""
    if resample not in get_args(Resample):
        raise ConfigError(f"resample is {resample!r}: give 'last' or 'all'.")
    shards.require_counts(batch_size=batch_size)
    require_one_each("instructions", instructions, "dialogs", dialogs)
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

    def make(numbers: range) -> list[GhostRow]:
        answered = _answered(
            {number: asked[number] for number in numbers},
            instructions,
            resample,
            answers,
        )
        return [
            ghost(dialog, instructions[number]) for number, dialog in answered.items()
        ]

    return make


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
    if number is None:
        return None
    if not 0 <= number < len(candidates):
        raise DataError(
            f"choose gave {number!r} for {len(candidates)} answers: let it give the "
            "number of one of them, counted from 0."
        )
    return candidates[number]
