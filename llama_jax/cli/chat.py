"""`llama-jax chat CHECKPOINT`: a chat in a terminal, or over a pipe.

Answers go to standard output, and all that is said about them to standard error.
"""

import contextlib
import dataclasses
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import tyro
from rich.console import Console

from llama_jax.cli.writer import Writer, show
from llama_jax.errors import GenerationError, LlamaError
from llama_jax.generate import Chat, Completion

_HELP = """\
/help       show this
/reset      forget the conversation, all but the system message
/save FILE  write the conversation, one JSON object a message
/seed N     another seed for the answers to come
/exit       leave, as Ctrl-D does

A line that ends with \\ goes on in the next. A message that begins with / needs a space
before it. Ctrl-C stops an answer, which stays in the conversation as far as it came.\
"""

_HISTORY_LINES = 1000

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Writer):
    """Chat with a model; /help lists what can be typed beside messages.

    Attributes:
      system: what the model is told before the first question.
    """

    max_new_tokens: int = 512
    system: str | None = None


def run(argv: Sequence[str]) -> int:
    """The command; returns the exit status."""
    options = tyro.cli(
        Options,
        args=argv,
        prog="llama-jax chat",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    settings = options.settings()
    if options.dry_run:
        print(f"{options.summary()}; {settings.sampler}, system {options.system!r}")
        return 0
    chat = options.load().start_chat(system=options.system)
    chat.settings = settings
    Terminal(chat).run()
    return 0


class Terminal:
    """Where somebody types messages and reads answers; or a pipe that does.

    Args:
      chat: answers.
    """

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._notes = Console(
            stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True
        )

    def run(self) -> None:
        """All messages, until the end of what is typed."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            # The tokenizer refuses what is no UTF-8, and the chat goes on.
            sys.stdin.reconfigure(errors="surrogateescape")
        with contextlib.ExitStack() as stack:
            if self._is_interactive:
                stack.enter_context(_line_editing())
                self._note("/help lists commands; Ctrl-D leaves.")
            while self._take_turn():
                pass

    def _take_turn(self) -> bool:
        """One message or command; returns whether another may follow."""
        try:
            message = self._read()
            if message is None or message.rstrip() == "/exit":
                return False
            if message.startswith("/"):
                self._obey(message)
            elif message.strip():
                self._ask(message)
        except LlamaError as error:
            self._note(str(error), style="red")
        except KeyboardInterrupt:
            if not self._is_interactive:
                raise
            print()  # the line is given up
        return True

    def _read(self) -> str | None:
        """What is typed, of one line or several; None at its end."""
        lines: list[str] = []
        while True:
            prompt = "... " if lines else "> "
            try:
                line = input(prompt if self._is_interactive else "")
            except EOFError:
                if self._is_interactive:
                    print()
                return "\n".join(lines) or None
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _obey(self, line: str) -> None:
        name, _, value = line.partition(" ")
        match name.strip(), value.strip():
            case "/help", "":
                self._note(_HELP)
            case "/reset", "":
                self._chat.reset()
                self._note("The conversation is forgotten.")
            case "/save", file if file:
                self._chat.save(os.path.expanduser(file))
                self._note(f"{len(self._chat.messages)} messages are in {file}.")
            case "/seed", number if re.fullmatch("-?[0-9]{1,18}", number):
                self._chat.settings = dataclasses.replace(
                    self._chat.settings, seed=int(number)
                )
                self._note(f"The seed is {int(number)}.")
            case _:
                self._note(
                    f"{line!r:.60} is no command: type /help, /reset, /save FILE, "
                    "/seed N with an integer, or /exit.",
                    style="red",
                )

    def _ask(self, message: str) -> None:
        chat = self._chat
        num_messages = len(chat.messages)
        try:
            pieces = chat.stream(message)
        except GenerationError as error:
            raise GenerationError(
                f"{error} Or type /reset, which forgets the conversation."
            ) from error
        num_shown = 0
        with _noted_interrupts() as interrupts, contextlib.closing(pieces):
            for piece in pieces:
                show(piece)
                num_shown += len(piece)
                if interrupts:
                    break
        if chat.last is None or len(chat.messages) == num_messages:
            print()
            self._note("Nothing was written, and the question is forgotten.")
        else:
            show(f"{chat.last.text[num_shown:]}\n")
            self._note(self._measured(chat.last, is_stopped=bool(interrupts)))

    def _measured(self, answer: Completion, *, is_stopped: bool) -> str:
        timing, num_written = answer.timing, len(answer.tokens)
        parts = [
            f"prompt {timing.prompt_tokens} tokens, {timing.cached_tokens} of them "
            "cached",
            f"{num_written} written, {num_written / timing.decode_seconds:.0f} "
            "tokens/s",
        ]
        if is_stopped:
            parts.append("stopped")
        elif answer.finish_reason == "length":
            is_long = num_written == self._chat.settings.max_new_tokens
            end = "--max-new-tokens" if is_long else "the end of the context"
            parts.append(f"cut by {end}")
        return f"[{'; '.join(parts)}]"

    def _note(self, text: str, *, style: str = "dim") -> None:
        self._notes.print(text, style=style)


@contextlib.contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """A list that grows with each Ctrl-C, which raises nothing meanwhile.

    JAX (0.10.2) can crash on an exception that reaches it while it compiles.
    """
    interrupts: list[int] = []
    before = signal.signal(
        signal.SIGINT, lambda number, frame: interrupts.append(number)
    )
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Keys that edit a line and bring back earlier ones, where Python has them."""
    try:
        import readline
    except ImportError:
        yield
        return
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    history = Path(home) / "llama-jax" / "chat_history"
    try:
        history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        history.touch()
        history.chmod(0o600)
        if history.stat().st_size:
            readline.read_history_file(history)
    except OSError as error:
        _log.warning("What is typed is not kept for later chats: %s", error)
        yield
        return
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(history)
