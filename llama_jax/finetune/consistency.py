"""Whether an instruction is kept for a whole dialog, and how it is attended to.

The test of Table 30, and the map of Figure 10.

Shape suffixes: T positions, b bins of them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

from llama_jax.config.sampling import Greedy, Sampler
from llama_jax.errors import ConfigError, DataError
from llama_jax.finetune.answers import can_be_learnt, encode, require_one_each
from llama_jax.finetune.gatt import Instruction
from llama_jax.llm import LLM

# Whether an answer to a question keeps an instruction.
Check = Callable[[Instruction, str, str], bool]

GREEDY = Greedy()


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
    require_one_each("instructions", instructions, "questions", questions)
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
      GenerationError: see `LLM.strongest_attention`.
    """
    if bin_size < 1:
        raise ConfigError(f"bin_size is {bin_size}: it has to be positive.")
    most_TT = llm.strongest_attention(tokens)
    starts = np.arange(0, len(most_TT), bin_size)
    most_bT = np.maximum.reduceat(most_TT, starts, axis=0)
    return np.maximum.reduceat(most_bT, starts, axis=1)
