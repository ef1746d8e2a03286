"""A chat of several turns, which reads each message once."""

import collections.abc
import html
import json
import time
from typing import Any

from etils import epath

from llama_jax.errors import GenerationError
from llama_jax.generate.completion import Completion, Timing
from llama_jax.generate.decode import DecodeState
from llama_jax.generate.engine import Row
from llama_jax.generate.generator import STREAM_TOKENS, Generator, Writing
from llama_jax.generate.settings import Settings
from llama_jax.text import encode_dialog

Message = dict[str, str]
Pieces = collections.abc.Generator[str, None, None]

# Seconds between two looks at whether a prompt is read.
_PAUSE = 0.005

# The bar beside each message in a notebook.
_COLOURS = {"system": "#999", "user": "#4477aa", "assistant": "#cc6677"}


class Chat:
    """A conversation. Its keys and values stay in the cache from turn to turn.

    Each answer is the one that `Generator.chat` gives to the same messages; only what
    the cache does not hold yet is read.

    Args:
      generator: answers.
      system: what the model is told before the first question.
      settings: how answers are written.

    Attributes:
      settings: of the next answer; may be replaced.
      last: the newest answer, None before the first.

    Raises:
      DialogError: the system message holds a tag of the format.
      GenerationError: the model has no tokenizer.
      TokenizerError: the system message holds a lone surrogate.
    """

    def __init__(
        self, generator: Generator, *, system: str | None, settings: Settings
    ) -> None:
        self._tokenizer = generator.require_tokenizer("a chat")
        self._generator = generator
        self._system = system
        self.settings = settings
        self.reset()
        encode_dialog(
            self._tokenizer, [*self._messages, {"role": "user", "content": ""}]
        )

    def reset(self) -> None:
        """Forget all but the system message."""
        self._messages: list[Message] = []
        if self._system is not None:
            self._messages.append({"role": "system", "content": self._system})
        self.last: Completion | None = None
        self._state: DecodeState | None = None
        self._cached: list[int] = []

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, the system message first if there is one."""
        return [dict(message) for message in self._messages]

    def send(self, content: str) -> Completion:
        """Ask, and wait for the answer.

        Raises:
          DialogError: the message holds a tag of the format.
          GenerationError: the conversation has no room left in the context.
          TokenizerError: the message holds a lone surrogate.
        """
        for _ in self.stream(content):
            pass
        assert self.last is not None
        return self.last

    def stream(self, content: str) -> Pieces:
        """Ask, and yield the answer while it is written; "" where there is nothing new.

        Closed before its end, or interrupted, it leaves the answer as far as it came;
        if nothing came yet, the question is forgotten too.

        Raises:
          As `send`, before anything runs.
        """
        asked = [*self._messages, {"role": "user", "content": content}]
        ids = encode_dialog(self._tokenizer, asked)
        (row,) = self._generator.rows([ids], self.settings, name="the conversation")
        return self._answer(asked, row)

    def save(self, path: epath.PathLike) -> None:
        """Write the conversation as JSON lines, one message each.

        Raises:
          GenerationError: the place cannot be written.
        """
        lines = [json.dumps(message, ensure_ascii=False) for message in self._messages]
        try:
            epath.Path(path).write_text("".join(f"{line}\n" for line in lines))
        except (OSError, ValueError, ImportError) as error:
            raise GenerationError(f"{path} cannot be written: {error}.") from error

    def _answer(self, asked: list[Message], row: Row) -> Pieces:
        engine = self._generator.engine
        began = time.perf_counter()
        # Not before the answer begins: the chat may be reset until then.
        known = _common(list(row.ids[:-1]), self._cached)
        state, self._state = self._state, None
        self._cached = []
        state = engine.read([row], state=state, known=known)
        self._state, self._cached = state, list(row.ids[:-1])
        # May be left, or interrupted, while the prompt is read.
        while not _is_ready(state.logits):
            yield ""
            time.sleep(_PAUSE)
        read = time.perf_counter()
        self._state = None
        self._cached = []
        writing = Writing(
            self._generator,
            state,
            [row],
            self.settings,
            num_tokens=STREAM_TOKENS,
            continues=False,
        )
        (answer,) = writing.answers
        shown = 0
        try:
            for _ in writing:
                text = answer.text
                yield text[shown:]
                shown = len(text)
        finally:
            if answer.is_done or answer.text:
                answered = {"role": "assistant", "content": answer.text}
                self._messages = [*asked, answered]
                self.last = answer.completion(
                    Timing(
                        prompt_tokens=len(row.ids),
                        cached_tokens=known,
                        prefill_seconds=read - began,
                        decode_seconds=time.perf_counter() - read,
                    )
                )
            if not writing.state.tokens.is_deleted():
                self._cached = [*row.ids, *answer.ids][:-1]
                self._state = writing.state

    def _repr_html_(self) -> str:
        """One block a message; the newest answer with its probabilities."""
        messages = self._messages
        blocks = []
        for number, message in enumerate(messages, start=1):
            shown = html.escape(message["content"])
            if number == len(messages) and self.last is not None:
                shown = self.last._repr_html_()
            blocks.append(
                f'<div style="margin: 0.4em 0; padding: 0.4em 0.8em; border-left: 3px '
                f'solid {_COLOURS[message["role"]]}; white-space: pre-wrap"><small>'
                f"{message['role']}</small><br>{shown}</div>"
            )
        return "".join(blocks)


def _is_ready(array: Any) -> bool:
    return array.is_ready()  # which the type of arrays does not say


def _common(a: list[int], b: list[int]) -> int:
    """How many ids the two begin with in common."""
    for number, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return number
    return min(len(a), len(b))
