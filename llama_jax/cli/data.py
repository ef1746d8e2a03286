"""`llama-jax data STEP`: text to a tokenizer, text or dialogs to rows of tokens."""

import dataclasses
from collections.abc import Mapping, Sequence

import tyro

from llama_jax.data import Dialogs, Documents, prepare, prepare_dialogs
from llama_jax.data.builders import tfds_splits
from llama_jax.data.sources import dialog_files, files
from llama_jax.errors import DataError
from llama_jax.text import Tokenizer, train_tokenizer


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
class DialogsStep:
    """Write dialogs in the chat format, several in a row, for fine-tuning.

    A line of a file is {"messages": [{"role": "user", "content": ...}, ...]}, with an
    optional message of role system before, and ends with an answer. All answers are
    learnt; with "learn": "last", the last alone. A dialog that does not fit a row is
    counted and left out.

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

    def splits(self) -> dict[str, list[Dialogs]]:
        """The sources of each split."""
        chosen = {
            "train": dialog_files(self.train),
            "validation": dialog_files(self.validation),
        }
        if not chosen["train"]:
            raise DataError("no dialogs: give --train FILE ...")
        return {name: sources for name, sources in chosen.items() if sources}


def run(argv: Sequence[str]) -> int:
    """The command; returns the exit status."""
    step = tyro.extras.subcommand_cli_from_dict(
        {"tokenizer": TokenizerStep, "prepare": PrepareStep, "dialogs": DialogsStep},
        prog="llama-jax data",
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if isinstance(step, DialogsStep):
        _write_dialogs(step)
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


def _write_dialogs(step: DialogsStep) -> None:
    splits = step.splits()
    if step.dry_run:
        _say_sources(step.output, splits)
        return
    prepared = prepare_dialogs(
        splits, Tokenizer(step.tokenizer), step.output, row_length=step.row_length
    )
    for name, split in prepared.splits.items():
        print(
            f"{step.output}, {name}: {split.num_documents:,} dialogs, "
            f"{split.num_tokens:,} tokens in {split.num_rows:,} rows, of which "
            f"{split.num_targets:,} are learnt; {split.num_too_long:,} more are too "
            "long for a row"
        )


def _say_sources(output: str, splits: Mapping[str, Sequence[object]]) -> None:
    names = {name: len(sources) for name, sources in splits.items()}
    print(f"{output} from {names} (sources a split)")
