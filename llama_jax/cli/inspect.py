"""`llama-jax inspect PATH`: what is this?"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from llama_jax.conversion import AnyCheckpoint, open_any
from llama_jax.conversion.manifest import Manifest
from llama_jax.conversion.proof import read_digests, require_digests, require_files
from llama_jax.data.prepared import MANIFEST, Prepared
from llama_jax.model import num_params
from llama_jax.progress import bytes_progress

_OWNERS = {"meta": "Meta's", "hf": "Hugging Face's", "orbax": "Orbax"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Say what a checkpoint or a prepared data set is, and whether it is whole.

    Attributes:
      path: a directory.
      verify: read all of it: compare digests, look for NaN.
      max_length: the context in tokens, where the files do not say.
      dry_run: the same: nothing is ever changed.
    """

    path: tyro.conf.Positional[str]
    verify: bool = False
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
    source = open_any(options.path, max_length=options.max_length)
    recorded = Manifest.of(source)
    facts: dict[str, object] = {
        "checkpoint": f"{_OWNERS[source.format]}, {source.directory}",
        "files": f"{len(source.files)}, {_size(source)}",
        "model": "writes" if source.head == "unembed" else "scores answers",
        "parameters": f"{num_params(source.config, source.head):,}, {source.dtype}",
        "tokenizer": source.tokenizer_path or "none",
        **dataclasses.asdict(source.config),
    }
    if recorded is not None:
        facts["converted from"] = _OWNERS[recorded.source]
        facts["weights' sha256"] = recorded.fingerprint
    if options.verify:
        facts["integrity"] = _integrity(source, recorded)
    return facts


def _size(source: AnyCheckpoint) -> str:
    num_bytes = num_params(source.config, source.head) * source.dtype.itemsize
    return f"{num_bytes / 1e9:.2f} GB of weights"


def _integrity(source: AnyCheckpoint, recorded: Manifest | None) -> str:
    """What reading all of it shows; damage is an error."""
    with bytes_progress() as watch:
        require_files(source)
        found = read_digests(source, watch=watch)
    if recorded is not None:
        require_digests(source, found, recorded)
        return "every weight is as it was converted"
    listed = "files are as checklist.chk says, " if source.format == "meta" else ""
    return f"{listed}all weights can be read; no digests of them are recorded"


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
            f"{split.num_documents:,} {prepared.kind}, {split.text_bytes:,} bytes of "
            "text"
        )
    return facts
