"""A model's own answers, to learn from."""

from collections.abc import Sequence

from llama_jax.config.sampling import Sampler
from llama_jax.errors import DataError, DialogError, GenerationError
from llama_jax.llm import LLM
from llama_jax.text import Tokenizer, encode_dialog
from llama_jax.text.chat import Message, require_example


def sampled_answers(
    llm: LLM,
    dialogs: Sequence[Sequence[Message]],
    *,
    num_samples: int,
    max_new_tokens: int,
    sampler: Sampler,
    seed: Sequence[int],
) -> list[list[str]]:
    """Answers to each dialog, those alone that can be learnt from.

    One that is cut off would teach to stop anywhere. A dialog that fills the context
    has none.

    Args:
      llm: the model.
      dialogs: each ends with a question.
      num_samples: answers to each.
      max_new_tokens: of an answer.
      sampler: how they are written.
      seed: of the samples of each dialog. Draws follow from seed and prompt, so equal
        dialogs want different ones.

    Raises:
      DialogError: a dialog is none.
      GenerationError: the model has no tokenizer, or a setting is none.
    """
    encoded = [encode(llm, dialog) for dialog in dialogs]
    fits = [i for i, ids in enumerate(encoded) if len(ids) < llm.engine.slots]
    completions = llm.generate(
        [encoded[i] for i in fits],
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        seed=[seed[i] for i in fits],
        num_samples=num_samples,
    )
    answers: list[list[str]] = [[] for _ in dialogs]
    for number, completion in enumerate(completions):
        answer = completion.text.strip()
        if completion.finish_reason == "stop" and can_be_learnt(answer):
            answers[fits[number // num_samples]].append(answer)
    return answers


def encode(llm: LLM, dialog: Sequence[Message]) -> list[int]:
    """The ids after which the model answers a dialog.

    Raises:
      DialogError: it does not end with a question, or is no dialog.
      GenerationError: the model has no tokenizer.
    """
    return encode_dialog(tokenizer_of(llm), dialog)


def tokenizer_of(llm: LLM) -> Tokenizer:
    """The tokenizer of a model that has one.

    Raises:
      GenerationError: it has none.
    """
    if llm.tokenizer is None:
        raise GenerationError(
            "dialogs need a tokenizer, and this model was loaded without one: load it "
            "with tokenizer=PATH."
        )
    return llm.tokenizer


def can_be_learnt(answer: str) -> bool:
    """Whether a file of dialogs may hold it: no tag of the format, no NUL, some text.

    A model can write all of these, and `data.DialogLines` refuses them.
    """
    try:
        require_learnable([{"role": "user", "content": "?"}], answer)
    except DialogError:
        return False
    return True


def require_learnable(dialog: Sequence[Message], answer: str) -> None:
    """Check that a file of dialogs may hold a dialog with this answer.

    Raises:
      DialogError: it is none, or has a message that is empty or holds a tag or NUL.
    """
    whole = [*dialog, {"role": "assistant", "content": answer}]
    require_example(whole)
    for number, message in enumerate(whole, start=1):
        if "\0" in message["content"]:
            raise DialogError(f"message {number} holds NUL: it is no text.")


def require_one_each(
    name: str, given: Sequence[object], whose: str, things: Sequence[object]
) -> None:
    """Check that there is one of something for each of others.

    Raises:
      DataError: there are more, or fewer; the message calls them by their names.
    """
    if len(given) != len(things):
        raise DataError(
            f"{name} are {len(given)} and {whose} {len(things)}: give one for each."
        )
