"""`llama-jax data STEP`: text to a tokenizer, or what is learnt from to rows of it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import tyro

from llama_jax.data import (
    Documents,
    prepare,
    prepare_comparisons,
    prepare_dialogs,
    prepare_prompts,
)
from llama_jax.data.builders import tfds_splits
from llama_jax.data.sources import comparison_files, dialog_files, files, prompt_files
from llama_jax.errors import DataError
from llama_jax.text import Tokenizer, train_tokenizer

_Source = TypeVar("_Source")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Where documents come from: files, or a data set of tensorflow-datasets.

    Attributes:
      train: .jsonl files (a document a line, in its field "text"), or text files.
      validation: the same, held out from training.
      tfds: a data set, as shakespeare or c4/en, instead of files.
      tfds_dir: where tensorflow-datasets keeps it.
      dry_run: say what would be done, and stop; nothing is downloaded.
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    tfds: str | None = None
    tfds_dir: str = "data/tfds"
    dry_run: bool = False

    def splits(self) -> dict[str, list[Documents]]:
        """The sources of each split."""
        if self.tfds is not None:
            return tfds_splits(self.tfds, self.tfds_dir)
        chosen = {"train": files(self.train), "validation": files(self.validation)}
        if not chosen["train"]:
            raise DataError("no text: give --train FILE ... or --tfds NAME.")
        return {name: sources for name, sources in chosen.items() if sources}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerStep(Text):
    """Train a tokenizer as Llama's was: BPE, byte fallback, digits one by one.

    Attributes:
      output: the file to write.
      vocab_size: pieces; Llama's is 32000.
    """

    output: str
    vocab_size: int = 32_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareStep(Text):
    """Tokenise a corpus once and pack it into rows: BOS, document, EOS, end to end.

    Attributes:
      tokenizer: a tokenizer.model.
      output: the directory to write.
      row_length: tokens that the model reads at once.
    """

    tokenizer: str
    output: str
    row_length: int = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines:
    """What is learnt from in fine-tuning: .jsonl files, one object a line.

    Attributes:
      train: .jsonl files.
      validation: the same, held out from training.
      tokenizer: a tokenizer.model.
      output: the directory to write.
      row_length: tokens that the model reads at once.
      dry_run: say what would be done, and stop.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    tokenizer: str
    output: str
    row_length: int = 4096
    dry_run: bool = False

    def splits(
        self, read: Callable[[Sequence[str]], list[_Source]]
    ) -> dict[str, list[_Source]]:
        """The sources of each split."""
        if not self.train:
            raise DataError("nothing to train on: give --train FILE ...")
        chosen = {"train": read(self.train), "validation": read(self.validation)}
        return {name: sources for name, sources in chosen.items() if sources}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DialogsStep(Lines):
    """Write dialogs in the chat format, several in a row, for fine-tuning.

    A line of a file is {"messages": [{"role": "user", "content": ...}, ...]}, with an
    optional message of role system before, and ends with an answer. All answers are
    learnt; with "learn": "last", the last alone. A dialog that does not fit a row is
    counted and left out.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonsStep(Lines):
    """Write pairs of answers in the chat format, several in a row, for reward models.

    A line of a file is {"messages": [... ends with the user], "chosen": TEXT,
    "rejected": TEXT}, with an optional "rating" (significantly better, better, slightly
    better, negligibly better) and "chosen_is_safe" and "rejected_is_safe" (true or
    false). Pairs that do not fit a row are counted and left out; and so are those of
    which the chosen answer is unsafe and the other safe.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsStep(Lines):
    """Write prompts in the chat format, one a row, for PPO to answer.

    A line of a file is {"messages": [... ends with the user]}; with "about_safety":
    true where it is there to elicit an unsafe answer. A prompt that leaves an answer
    too little room is counted and left out.

    Attributes:
      max_new_tokens: of each row, those for the answer.
    """

    row_length: int = 2048
    max_new_tokens: int = 1024


def run(argv: Sequence[str]) -> int:
    """The command; returns the exit status."""
    step = tyro.extras.subcommand_cli_from_dict(
        {
            "tokenizer": TokenizerStep,
            "prepare": PrepareStep,
            "dialogs": DialogsStep,
            "comparisons": ComparisonsStep,
            "prompts": PromptsStep,
        },
        prog="llama-jax data",
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if isinstance(step, Lines):
        _write_lines(step)
    elif step.dry_run and step.tfds is not None:
        print(f"{step.output} from {step.tfds}, kept in {step.tfds_dir}")
    else:
        _write_text(step)
    return 0


def _write_text(step: TokenizerStep | PrepareStep) -> None:
    splits = step.splits()
    if step.dry_run:
        _say_sources(step.output, splits)
    elif isinstance(step, TokenizerStep):
        documents = (text for source in splits["train"] for text in source)
        tokenizer = train_tokenizer(documents, step.output, vocab_size=step.vocab_size)
        print(f"{step.output}: {tokenizer.vocab_size:,} pieces")
    else:
        prepared = prepare(
            splits, Tokenizer(step.tokenizer), step.output, row_length=step.row_length
        )
        for name, split in prepared.splits.items():
            print(
                f"{step.output}, {name}: {split.num_documents:,} documents, "
                f"{split.text_bytes:,} bytes, {split.num_tokens:,} tokens in "
                f"{split.num_rows:,} rows"
            )


def _write_lines(step: Lines) -> None:
    if isinstance(step, DialogsStep):
        splits = step.splits(dialog_files)
        write = functools.partial(prepare_dialogs, splits)
    elif isinstance(step, PromptsStep):
        splits = step.splits(prompt_files)
        write = functools.partial(
            prepare_prompts, splits, max_new_tokens=step.max_new_tokens
        )
    else:
        splits = step.splits(comparison_files)
        write = functools.partial(prepare_comparisons, splits)
    if step.dry_run:
        _say_sources(step.output, splits)
        return
    tokenizer = Tokenizer(step.tokenizer)
    prepared = write(tokenizer, step.output, row_length=step.row_length)
    for name, split in prepared.splits.items():
        if prepared.kind == "dialogs":
            more = f"{split.num_targets:,} of them are learnt; "
        elif prepared.kind == "comparisons":
            more = f"of {split.num_unsafe_chosen:,} more the unsafe answer was chosen; "
        else:
            more = ""
        print(
            f"{step.output}, {name}: {split.num_documents:,} {prepared.kind}, "
            f"{split.num_tokens:,} tokens in {split.num_rows:,} rows; {more}"
            f"{split.num_too_long:,} more are too long for a row"
        )


def _say_sources(output: str, splits: Mapping[str, Sequence[object]]) -> None:
    names = {name: len(sources) for name, sources in splits.items()}
    print(f"{output} from {names} (sources a split)")
