"""The prompt format of Llama 2 chat: a dialog to tokens, and to a loss mask.

A dialog is a list of `{"role": ..., "content": ...}`: an optional system message, then
user and assistant in turn. Each turn is `<s>[INST] question [/INST] answer </s>`, with
BOS and EOS of its own; the system message stands inside the first question. The tags
are ordinary text to the tokenizer, so a message must not hold them.

Errors name the message, counted from 1; a caller who knows the row puts it in front.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from llama_jax.errors import DialogError, TokenizerError
from llama_jax.text.tokenizer import Tokenizer

Message = Mapping[str, str]
Learnt = Literal["all", "last"]

_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
_ORDER = (
    "model only supports 'system', 'user' and 'assistant' roles, starting with "
    "'system', then 'user' and alternating (u/a/u/a/u...)"
)


class Example(NamedTuple):
    """A dialog to train on.

    Attributes:
      tokens: all turns, each from its BOS to its EOS.
      loss_mask: True for the tokens to learn: each answer and its EOS.
    """

    tokens: list[int]
    loss_mask: list[bool]


def encode_dialog(tokenizer: Tokenizer, dialog: Sequence[Message]) -> list[int]:
    """The tokens after which the model answers the dialog's last question.

    The same ids as Meta's `chat_completion` (`llama/generation.py`) gives its model.

    Raises:
      DialogError: the dialog is empty, does not alternate, does not end with the user,
        or holds a tag of the format.
      TokenizerError: a message holds a lone surrogate.
    """
    *turns, question = _turns(dialog, last="user")
    tokens: list[int] = []
    for turn, answer in zip(turns[::2], turns[1::2], strict=True):
        tokens += _encode_turn(tokenizer, turn, answer)
    return tokens + _encode_question(tokenizer, question)


def encode_example(
    tokenizer: Tokenizer, dialog: Sequence[Message], *, learn: Learnt = "all"
) -> Example:
    """The tokens of a dialog that ends with an answer, and which of them to learn.

    The tokens are those by which Meta's code writes finished turns, so training sees
    what chat will see. An answer is learnt together with the space and the EOS that
    end it: without them a model would never stop.

    Args:
      tokenizer: makes the ids.
      dialog: the messages.
      learn: "all" answers, or the "last" alone, as Ghost Attention wants it
        (section 3.3).

    Raises:
      DialogError: see `require_example`.
      TokenizerError: a message holds a lone surrogate, or a piece of the tokenizer
        spans the end of a question and its answer, so that no mask parts them.
    """
    turns = require_example(dialog)
    example = Example(tokens=[], loss_mask=[])
    for number in range(0, len(turns), 2):
        question, answer = turns[number : number + 2]
        prompt = _encode_question(tokenizer, question)
        turn = _encode_turn(tokenizer, question, answer)
        if turn[: len(prompt)] != prompt:
            raise TokenizerError(
                f"{tokenizer} joins the end of [/INST] to the answer in one piece, so "
                "the answer cannot be learnt alone: use a tokenizer that splits at "
                "white space, as Llama's does."
            )
        is_learnt = learn == "all" or number == len(turns) - 2
        example.tokens.extend(turn)
        example.loss_mask.extend(
            is_learnt and i >= len(prompt) for i in range(len(turn))
        )
    return example


def require_example(dialog: Sequence[Message]) -> list[str]:
    """Check that a dialog can be learnt from; questions and answers in turn.

    The system message is part of the first question.

    Raises:
      DialogError: as `encode_dialog`, but the last message is the assistant's; or a
        message is empty, and would teach silence.
    """
    turns = _turns(dialog, last="assistant")
    for number, message in enumerate(dialog, start=1):
        if not message["content"].strip():
            raise DialogError(
                f"message {number} ({message['role']}) is empty: leave the dialog out "
                "of the training data, or write what is missing."
            )
    return turns


def _encode_question(tokenizer: Tokenizer, question: str) -> list[int]:
    return tokenizer.encode(f"[INST] {question.strip()} [/INST]", bos=True, eos=False)


def _encode_turn(tokenizer: Tokenizer, question: str, answer: str) -> list[int]:
    text = f"[INST] {question.strip()} [/INST] {answer.strip()} "
    return tokenizer.encode(text, bos=True, eos=True)


def _turns(dialog: Sequence[Message], *, last: str) -> list[str]:
    """Questions and answers in turn, the system message folded into the first."""
    if not dialog:
        raise DialogError("the dialog is empty: give at least one message from user.")
    for number, message in enumerate(dialog, start=1):
        _require_message(number, message)
    contents = [message["content"] for message in dialog]
    roles = [message["role"] for message in dialog]
    num_system = int(roles[0] == "system")
    if roles == ["system"]:
        raise DialogError(
            "the dialog is a system message alone: add the message from user that it "
            "is to govern."
        )
    for i, role in enumerate(roles[num_system:]):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise DialogError(
                f"{_ORDER}: message {num_system + i + 1} is from {role!r} where "
                f"{expected!r} belongs."
            )
    if roles[-1] != last:
        raise DialogError(
            f"Last message must be from {last}, got {roles[-1]}: message {len(roles)}."
        )
    if num_system:
        system, question, *rest = contents
        return [f"<<SYS>>\n{system}\n<</SYS>>\n\n{question}", *rest]
    return contents


def _require_message(number: int, message: object) -> None:
    """Refuse what is no message, and tags, which would forge the dialog's structure."""
    if not isinstance(message, Mapping):
        raise DialogError(
            f"message {number} is {message!r:.60}, not a mapping: a dialog is a list "
            'of {"role": ..., "content": ...}.'
        )
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise DialogError(
                f"message {number} needs a text under {key!r}, not "
                f"{message.get(key)!r:.60}."
            )
    for tag in _TAGS:
        if tag in message["content"]:
            raise DialogError(
                "special tags are not allowed as part of the prompt. Message "
                f"{number}, from {message['role']}, holds {tag!r}: take it out or "
                "spell it another way."
            )
