"""Meta's checkpoints: a directory of shards, read leaf by leaf.

A released model is `params.json`, `consolidated.NN.pth` for each model-parallel shard,
`tokenizer.model` (here or one directory up) and `checklist.chk`, the MD5 of the files.
Everything that can be wrong is looked for before any weight is used; then a leaf, or
the slice of it that one device needs, is gathered from the mapped shards.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.conversion import names, rope
from llama_jax.conversion.pth import read_pth
from llama_jax.errors import CheckpointError
from sharding.axes import Tree

_log = logging.getLogger(__name__)

# The rotary frequencies that some releases carry, rounded to 16 bits: a function of
# the configuration, so the model computes them, exactly.
_DERIVED = re.compile(r"(layers\.\d+\.attention\.inner_attention\.)?rope\.freqs")
_SHARD = re.compile(r"consolidated\.\d\d\.pth$")
_CHECKLIST_LINE = re.compile(r"([0-9a-f]{32}) [ *](\S.*)")

Shard = dict[str, np.ndarray]


class MetaCheckpoint:
    """The parameters of a Meta checkpoint in this project's layout, unread until asked.

    Attributes:
      directory: where the files are.
      config: the architecture.
      tokenizer_path: Meta's `tokenizer.model`, if it is there.
      dtype: of every parameter on disk.
      shapes: of every leaf, by its path ("blocks/attention/query").
    """

    def __init__(
        self,
        directory: Path,
        config: LlamaConfig,
        tokenizer_path: Path | None,
        shards: Sequence[Shard],
    ) -> None:
        self.directory = directory
        self.config = config
        self.tokenizer_path = tokenizer_path
        self.dtype = next(iter(shards[0].values())).dtype
        self._shards = shards
        self._sizes = names.axis_sizes(config)
        self._parameters = {p.path: p for p in names.PARAMETERS}
        self._not_finite: set[str] = set()
        self.shapes = {
            path: tuple(self._sizes[axis] for axis in parameter.axes)
            for path, parameter in self._parameters.items()
        }

    def read(self, path: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """One leaf, or a slice of it, in the dtype of the files.

        Reads no more of the files than that: give it to `jax.make_array_from_callback`
        and each host reads what its devices hold. Values that are not finite are
        logged as a warning with the name of the tensor.

        Args:
          path: of the leaf, as in `shapes`.
          index: a slice with step 1 for each leading axis; the rest are whole.
        """
        parameter = self._parameters[path]
        wanted = {axis: range(self._sizes[axis]) for axis in parameter.axes}
        for axis, part in zip(parameter.axes, index, strict=False):
            wanted[axis] = wanted[axis][part]
        assert all(part.step == 1 for part in wanted.values()), index
        leaf = np.empty([len(part) for part in wanted.values()], self.dtype)
        if "L" in wanted:
            for place, layer in enumerate(wanted.pop("L")):
                name = parameter.meta.name.format(layer=layer)
                self._gather(leaf[place], parameter, name, wanted)
        else:
            self._gather(leaf, parameter, parameter.meta.name, wanted)
        return leaf

    def load(self, shardings: Tree, *, dtype: jnp.dtype) -> Tree:
        """All parameters, each host reading only what its devices hold."""

        def leaf(path: tuple[Any, ...], sharding: jax.sharding.Sharding) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return jax.make_array_from_callback(
                self.shapes[name],
                sharding,
                lambda index: self.read(name, index or ()).astype(dtype),
            )

        return jax.tree_util.tree_map_with_path(leaf, shardings)

    def _gather(
        self,
        target: np.ndarray,
        parameter: names.Parameter,
        name: str,
        wanted: dict[str, range],
    ) -> None:
        """Fill `target` with the wanted part of one tensor, from each shard's share."""
        stored = parameter.meta
        sizes = _shard_sizes(self._sizes, stored, len(self._shards))
        # Where each tensor axis goes in the leaf, whose layer axis is taken already.
        order = [stored.axes.index(axis) for axis in wanted]
        copies = self._shards if stored.split else self._shards[:1]
        for number, shard in enumerate(copies):
            source: dict[str, Any] = {
                axis: slice(part.start, part.stop) for axis, part in wanted.items()
            }
            place = dict.fromkeys(wanted, slice(None))
            if stored.split:
                part, share = wanted[stored.split], sizes[stored.split]
                first = max(part.start, number * share)
                last = min(part.stop, (number + 1) * share)
                if first >= last:
                    continue
                source[stored.split] = slice(
                    first - number * share, last - number * share
                )
                place[stored.split] = slice(first - part.start, last - part.start)
            if stored.interleaved:
                features = rope.half_split_order(sizes["H"])
                source["H"] = features[source["H"]]
            unfolded = shard[name].reshape([sizes[axis] for axis in stored.axes])
            block = unfolded[tuple(source[axis] for axis in stored.axes)]
            self._warn_unless_finite(block, f"{name} of {_file_name(number)}")
            target[tuple(place.values())] = block.transpose(order)

    def _warn_unless_finite(self, block: np.ndarray, what: str) -> None:
        if what not in self._not_finite and not np.isfinite(block).all():
            self._not_finite.add(what)
            _log.warning("%s: NaN or infinity in %s.", self.directory, what)


def read_meta(directory: str | Path, *, max_length: int) -> MetaCheckpoint:
    """Open a directory of Meta's, checking all of it but the values of its weights.

    Args:
      directory: a local one; the shards are mapped into memory.
      max_length: the context in tokens, which Meta's files do not state.

    Raises:
      CheckpointError: a file is missing, damaged or does not belong here, or the
        tensors are not those of the model that `params.json` describes.
      ConfigError: `params.json` cannot be used.
    """
    if re.match(r"\w+:/", str(directory)):
        raise CheckpointError(
            f"{directory} is not on this machine, and the shards of a Meta checkpoint "
            "are mapped into memory: copy the directory to a local disk first."
        )
    directory = Path(directory)
    files = _shard_files(directory)
    _verify_checklist(directory, files)
    shards = [_without_derived(file, read_pth(file)) for file in files]
    config = _read_config(directory, shards, max_length)
    _require_divisible(directory, config, len(shards))
    _require_tensors(directory, config, shards)
    return MetaCheckpoint(directory, config, _find_tokenizer(directory), shards)


def _file_name(number: int) -> str:
    return f"consolidated.{number:02d}.pth"


def _shard_files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a directory: give the one that holds params.json and "
            f"{_file_name(0)}."
        )
    found = sorted(path.name for path in directory.iterdir() if _SHARD.match(path.name))
    if not found:
        raise CheckpointError(
            f"{directory} has no {_file_name(0)}: give a directory as Meta releases it."
        )
    for number, name in enumerate(found):
        if name != _file_name(number):
            raise CheckpointError(
                f"{directory} has {', '.join(found)} but no {_file_name(number)}: "
                "copy all the shards of one model, and only those."
            )
    return [directory / name for name in found]


def _verify_checklist(directory: Path, files: Sequence[Path]) -> None:
    """Compare every file with its MD5, which finds what no format here would."""
    checklist = directory / "checklist.chk"
    if not checklist.exists():
        _log.warning(
            "%s has no checklist.chk, so damage would go unnoticed.", directory
        )
        return
    digests = {}
    for line in checklist.read_bytes().decode(errors="replace").split("\n"):
        if not line.strip():
            continue
        entry = _CHECKLIST_LINE.fullmatch(line.rstrip())
        if entry is None:
            raise CheckpointError(
                f"{checklist}: the line {line[:80]!r} is not an MD5 and a file name: "
                "copy it again, or remove it to load unverified."
            )
        digests[directory / entry[2]] = entry[1]
    for file in files:
        if file not in digests:
            raise CheckpointError(
                f"{checklist} does not list {file.name}: the shard is of another "
                "model, or the list is incomplete. Copy the directory again."
            )
    for file in digests:
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing, but {checklist.name} lists it: copy it here."
            )
    with ThreadPoolExecutor() as pool:
        for file, found in zip(digests, pool.map(_md5, digests), strict=True):
            if found != digests[file]:
                raise CheckpointError(
                    f"{file} is damaged: its MD5 is {found}, {checklist.name} says "
                    f"{digests[file]}. Copy it again."
                )


def _md5(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()


def _without_derived(file: Path, tensors: Shard) -> Shard:
    derived = [name for name in tensors if _DERIVED.fullmatch(name)]
    if derived:
        _log.info("%s: ignored %s, computed anew.", file, _listed(derived))
    return {name: tensors[name] for name in tensors if name not in derived}


def _read_config(
    directory: Path, shards: Sequence[Shard], max_length: int
) -> LlamaConfig:
    file = directory / "params.json"
    embedding = shards[0].get("tok_embeddings.weight")
    if embedding is None or embedding.ndim != 2:
        raise CheckpointError(
            f"{directory / _file_name(0)} has no matrix tok_embeddings.weight: these "
            "are not the weights of a Llama as Meta stores them."
        )
    rows = embedding.shape[0]
    config = LlamaConfig.from_params_json(file, max_length=max_length, vocab_size=rows)
    if json.loads(file.read_text(encoding="utf-8")).get("vocab_size", -1) == -1:
        _log.info("%s: vocab_size %d, the rows of tok_embeddings.weight.", file, rows)
    return config


def _require_divisible(directory: Path, config: LlamaConfig, num_shards: int) -> None:
    sizes = {
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "dim": config.dim,
        "hidden_dim": config.hidden_dim,
        "vocab_size": config.vocab_size,
    }
    for name, size in sizes.items():
        if size % num_shards:
            raise CheckpointError(
                f"{directory} has {num_shards} shards, which do not divide {name} "
                f"{size} of its params.json: copy all the files of one model, and only "
                "those."
            )


def _require_tensors(
    directory: Path, config: LlamaConfig, shards: Sequence[Shard]
) -> None:
    """Every shard holds its share of every parameter, in one dtype, and no more."""
    sizes = names.axis_sizes(config)
    stored = {
        parameter.meta.name.format(layer=layer): parameter.meta
        for parameter in names.PARAMETERS
        for layer in (range(config.num_layers) if "L" in parameter.axes else (0,))
    }
    dtype = shards[0]["tok_embeddings.weight"].dtype
    for number, shard in enumerate(shards):
        file = directory / _file_name(number)
        if missing := stored.keys() - shard.keys():
            raise CheckpointError(
                f"{file} lacks {_listed(missing)}: params.json describes a larger "
                "model, or the file is not the whole of its shard."
            )
        if extra := shard.keys() - stored.keys():
            raise CheckpointError(
                f"{file} has {_listed(extra)}, which no Llama of these sizes has: "
                "params.json is another model's, or this is an adapted Llama that "
                "would load wrongly."
            )
        for name, form in stored.items():
            tensor = shard[name]
            shape = form.shape(_shard_sizes(sizes, form, len(shards)))
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{file}: {name} has shape {tensor.shape}, but by params.json one "
                    f"of {len(shards)} shards has {shape}. Copy all the files of one "
                    "model."
                )
            if tensor.dtype != dtype:
                raise CheckpointError(
                    f"{file}: {name} is {tensor.dtype}, but tok_embeddings.weight of "
                    f"{_file_name(0)} is {dtype}: save all tensors in one dtype."
                )
            # As bytes, so that a NaN equals itself.
            if not form.split and tensor.tobytes() != shards[0][name].tobytes():
                raise CheckpointError(
                    f"{file}: {name} differs from that of {_file_name(0)}, but every "
                    "shard has a copy of it: copy all the shards of one model."
                )


def _shard_sizes(
    sizes: dict[str, int], stored: names.Stored, num_shards: int
) -> dict[str, int]:
    """The sizes of the axes in one shard's share of a parameter."""
    if stored.split is None:
        return sizes
    return sizes | {stored.split: sizes[stored.split] // num_shards}


def _find_tokenizer(directory: Path) -> Path | None:
    # Meta's download script puts it beside the directories of the models.
    for place in (directory, directory.resolve().parent):
        if (place / "tokenizer.model").is_file():
            return place / "tokenizer.model"
    return None


def _listed(tensors: Iterable[str]) -> str:
    """The first names, and how many more: a whole model's are hundreds."""
    ordered = sorted(tensors)
    more = f" and {len(ordered) - 8} more" if len(ordered) > 8 else ""
    return ", ".join(ordered[:8]) + more
