"""`llama-jax inspect PATH`: what is this?"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from llama_jax.conversion import MetaCheckpoint
from llama_jax.data.prepared import MANIFEST, Prepared
from llama_jax.llm import open_checkpoint
from llama_jax.model import num_params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Say what a checkpoint or a prepared data set is, and whether it is whole.

    Attributes:
      path: a directory.
      max_length: the context in tokens, where the files do not say.
      dry_run: the same: nothing is ever changed.
    """

    path: tyro.conf.Positional[str]
    max_length: int = 4096
    dry_run: bool = False


def run(argv: Sequence[str]) -> int:
    """The command; returns the exit status."""
    options = tyro.cli(
        Options,
        args=argv,
        prog="llama-jax inspect",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    table = Table(show_header=False, box=None)
    for name, value in _facts(options).items():
        table.add_row(name, str(value))
    Console().print(table, highlight=False)
    return 0


def _facts(options: Options) -> dict[str, object]:
    if (Path(options.path) / MANIFEST).exists():
        return _data_facts(Prepared.load(options.path))
    source = open_checkpoint(options.path, max_length=options.max_length)
    kind = "Meta's" if isinstance(source, MetaCheckpoint) else "Orbax"
    return {
        "checkpoint": f"{kind}, {source.directory}",
        "parameters": f"{num_params(source.config):,}, {source.dtype}",
        "tokenizer": source.tokenizer_path or "none",
        **dataclasses.asdict(source.config),
    }


def _data_facts(prepared: Prepared) -> dict[str, object]:
    facts: dict[str, object] = {
        "prepared data": prepared.path,
        "tokenizer": f"{prepared.vocab_size} pieces, sha256 {prepared.tokenizer[:12]}…",
        "row length": prepared.row_length,
    }
    for name, split in prepared.splits.items():
        prepared.rows(name)  # opens every shard, so that damage is found
        facts[name] = (
            f"{split.num_rows:,} rows, {split.num_tokens:,} tokens, "
            f"{split.num_documents:,} documents, {split.text_bytes:,} bytes of text"
        )
    return facts
