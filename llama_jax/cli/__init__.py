"""The command line: one file a command, no logic of its own."""

import difflib
import importlib
import logging
import sys
from collections.abc import Sequence

from llama_jax import __version__
from llama_jax.errors import LlamaError
from sharding import ShardingError

COMMANDS = ("train", "plan", "generate", "chat", "convert", "inspect", "data", "sample")

_USAGE = """\
usage: llama-jax COMMAND ...

  train RECIPE            run a recipe, or go on with it
  plan RECIPE             does it fit a TPU slice, how fast, which layout is best
  generate CHECKPOINT     let a model write
  chat CHECKPOINT         talk with a model
  convert SOURCE TARGET   a checkpoint in Meta's, Hugging Face's or this format
  inspect PATH            what is this: format, sizes, dtype, integrity
  data STEP               text to a tokenizer, text or dialogs to rows of tokens
  sample STEP             a model makes data to learn from

`llama-jax COMMAND --help` lists the options of one; every command has --dry-run.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors that a user can mend are one line, without a traceback.

    Returns:
      The exit status: 0 done; 1 refused, with the reason; 75 stopped on request with
      all saved; 76 another host was lost; 130 after Ctrl-C.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("llama_jax").setLevel(logging.INFO)
    # Orbax reports its own housekeeping as warnings.
    logging.getLogger("absl").setLevel(logging.ERROR)
    if name in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        print(f"llama-jax: there is no command {name!r}.{hint}\n", file=sys.stderr)
        print(_USAGE, end="", file=sys.stderr)
        return 2
    try:
        # Imported when called, so that --help and a misspelling answer at once.
        return importlib.import_module(f"llama_jax.cli.{name}").run(rest)
    except (LlamaError, ShardingError) as error:
        print(f"llama-jax {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
