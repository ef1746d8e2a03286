"""Checkpoints being written, a slab of a weight at a time, in any of the formats.

A target takes the rows of each weight as one matrix [out, in] (see `layout.py`), in
order within a weight. Files have a plan before they have a byte, so that on a disk
weights may come in any order and from several threads, and what a stopped conversion
left can be read back. In a bucket files are written from their beginning to their end.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from etils import epath

from llama_jax.checkpoint.arrays import Arrays
from llama_jax.checkpoint.params import ARCHITECTURE, PARAMS, ParamsCheckpoint
from llama_jax.config import LlamaConfig
from llama_jax.conversion import describe, layout, meta, names, rope, safetensors
from llama_jax.conversion.files import OutputFile
from llama_jax.conversion.manifest import Checkpoint, as_bytes
from llama_jax.conversion.pth_writer import PthLayout
from llama_jax.conversion.stored import TensorCheckpoint, shard_sizes
from llama_jax.text import Tokenizer

TOKENIZER = "tokenizer.model"
# Hugging Face's own size of a file, at which it begins another.
_HF_FILE_BYTES = 5 * 10**9
# What a chunk of an array is kept under, where its shape allows.
_CHUNK_BYTES = 2**23


class Target(Protocol):
    """A checkpoint being written."""

    @property
    def in_order(self) -> bool:
        """Whether weights have to come in the order of `names.weights`."""
        ...

    def write(self, weight: names.Weight, start: int, matrix: np.ndarray) -> None:
        """Put rows of a weight, from `start` on, where they belong."""
        ...

    def written(self) -> Checkpoint:
        """What is there so far, to be read back."""
        ...

    def finish(self, tokenizer: Tokenizer | None) -> None:
        """Write what describes the weights, once all of them are there."""
        ...

    def close(self) -> None:
        """Let go of the files, finished or not."""
        ...


class OrbaxTarget:
    """What `llm.save` writes: parameters that Orbax restores, and the architecture."""

    in_order = False

    def __init__(
        self, directory: epath.Path, config: LlamaConfig, dtype: jnp.dtype
    ) -> None:
        self._directory = directory
        self._config = config
        self._dtype = dtype
        self._sizes = names.axis_sizes(config)
        (directory / PARAMS).mkdir(parents=True, exist_ok=True)
        self._arrays = Arrays(directory / PARAMS)
        shapes = {
            _array_name(parameter): tuple(self._sizes[a] for a in parameter.axes)
            for parameter in names.PARAMETERS
        }
        for parameter in names.PARAMETERS:
            name, chunk = _array_name(parameter), self._chunk(parameter)
            self._arrays.create(name, shapes[name], chunk, dtype)
        self._arrays.describe(shapes)

    def write(self, weight: names.Weight, start: int, matrix: np.ndarray) -> None:
        """Put rows of a weight, from `start` on, where they belong."""
        index = layout.leaf_index(weight, self._sizes, start, start + len(matrix))
        shape = tuple(part.stop - part.start for part in index)
        leaf = layout.to_leaf(matrix, weight, shape)
        self._arrays.write(_array_name(weight.parameter), index, leaf)

    def written(self) -> Checkpoint:
        """What is there so far, to be read back."""
        return ParamsCheckpoint(
            self._directory / PARAMS, self._config, self._dtype, None
        )

    def finish(self, tokenizer: Tokenizer | None) -> None:
        """Write what describes the weights, once all of them are there."""
        self._arrays.commit()
        text = json.dumps(dataclasses.asdict(self._config), indent=2)
        (self._directory / ARCHITECTURE).write_text(text + "\n")
        _write_tokenizer(self._directory, tokenizer)

    def close(self) -> None:
        """Nothing is held open."""

    def _chunk(self, parameter: names.Parameter) -> tuple[int, ...]:
        """One layer, a slab of rows, and a part of D: a mesh reads what it needs."""
        weight = names.Weight(parameter, 0 if parameter.axes.startswith("L") else None)
        sizes, rows_dim = self._sizes, parameter.hf.dims.split()[0]
        chunk = {**sizes, "L": 1}
        if " " in parameter.hf.dims:
            rows = layout.slab_rows(weight, sizes, self._dtype.itemsize)
            per_step = sizes["H"] if rows_dim.endswith("H") else 1
            chunk[rows_dim[0]] = rows // per_step
            chunk["D"] = layout.width_chunk(sizes)
            columns = parameter.hf.dims.split()[1][0]
            while self._chunk_bytes(chunk, parameter) > _CHUNK_BYTES and columns != "D":
                if chunk[columns] % 2:
                    break
                chunk[columns] //= 2
        return tuple(chunk[axis] for axis in parameter.axes)

    def _chunk_bytes(self, chunk: Mapping[str, int], parameter: names.Parameter) -> int:
        return math.prod(chunk[a] for a in parameter.axes) * self._dtype.itemsize


class MetaTarget:
    """Meta's files: a `.pth` for each model-parallel shard.

    Each weight is in all of them, so in a bucket they are whole only at the end.
    """

    def __init__(
        self,
        directory: epath.Path,
        config: LlamaConfig,
        dtype: jnp.dtype,
        num_shards: int,
    ) -> None:
        self._directory = directory
        self._config = config
        self._sizes = names.axis_sizes(config)
        self._num_shards = num_shards
        shapes = {
            weight.stored_name(weight.parameter.meta): weight.parameter.meta.shape(
                shard_sizes(self._sizes, weight.parameter.meta, num_shards)
            )
            for weight in names.weights(config)
        }
        self._layout = PthLayout(shapes, dtype)
        self._shapes = shapes
        self._dtype = dtype
        self._crcs: list[dict[str, int]] = [{} for _ in range(num_shards)]
        directory.mkdir(parents=True, exist_ok=True)
        size = self._layout.size
        file_names = map(meta.file_name, range(num_shards))
        self._files = [OutputFile(directory / name, size) for name in file_names]
        self.in_order = self._files[0].in_order
        with _closed_on_error(self._files):
            for file in self._files:
                file.write(0, self._layout.head)

    def write(self, weight: names.Weight, start: int, matrix: np.ndarray) -> None:
        """Put rows of a weight, from `start` on, where they belong."""
        form = weight.parameter.meta
        if form.interleaved:
            H = self._sizes["H"]
            heads = matrix.reshape(-1, H, matrix.shape[1])
            matrix = heads[:, rope.interleaved_order(H)].reshape(matrix.shape)
        name = weight.stored_name(form)
        for number in range(self._num_shards):
            row, part = self._share(form, number, start, matrix)
            if len(part):
                self._append(number, name, row, np.ascontiguousarray(part))

    def written(self) -> Checkpoint:
        """What is there so far, to be read back."""
        shards = [
            file.tensors(self._layout.offsets, self._shapes, self._dtype)
            for file in self._files
        ]
        return TensorCheckpoint("meta", self._directory, (), self._config, None, shards)

    def finish(self, tokenizer: Tokenizer | None) -> None:
        """Write what describes the weights, once all of them are there."""
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(self._end, range(self._num_shards)))
        _write_tokenizer(self._directory, tokenizer)
        params = describe.params_json(self._config, tokenizer)
        (self._directory / meta.PARAMS).write_text(params)
        lines = [
            f"{digest}  {file.path.name}\n"
            for file, digest in zip(self._files, digests, strict=True)
        ]
        lines.append(f"{hashlib.md5(params.encode()).hexdigest()}  {meta.PARAMS}\n")
        (self._directory / meta.CHECKLIST).write_text("".join(lines))

    def close(self) -> None:
        """Let go of the files, finished or not."""
        for file in self._files:
            file.close()

    def _share(
        self, form: names.Stored, number: int, start: int, matrix: np.ndarray
    ) -> tuple[int, np.ndarray]:
        """The rows of one shard among these: its number of the first, and the rows."""
        if form.split is None:
            return start, matrix
        rows_dim, columns_dim = form.dims.split()
        if form.split in columns_dim:
            share = matrix.shape[1] // self._num_shards
            return start, matrix[:, number * share : (number + 1) * share]
        num_rows = int(np.prod([self._sizes[axis] for axis in rows_dim]))
        first = number * num_rows // self._num_shards
        last = first + num_rows // self._num_shards
        inside = slice(max(first - start, 0), max(last - start, 0))
        return max(start - first, 0), matrix[inside]

    def _append(self, number: int, name: str, row: int, part: np.ndarray) -> None:
        """Rows of a tensor, and with the first and the last what stands around it."""
        file, crcs = self._files[number], self._crcs[number]
        at = self._layout.offsets[name] + row * part[0].nbytes
        if row == 0:
            before = self._layout.before(name)
            file.write(at - len(before), before)
            crcs[name] = 0
        file.write(at, as_bytes(part))
        crcs[name] = zlib.crc32(as_bytes(part), crcs[name])
        if row + len(part) == self._shapes[name][0]:
            file.write(at + part.nbytes, self._layout.after(name, crcs[name]))

    def _end(self, number: int) -> str:
        """Complete one file; returns its MD5."""
        file, crcs = self._files[number], self._crcs[number]
        if not file.is_whole:
            # Tensors that were there before a rerun are read once more.
            there = file.tensors(self._layout.offsets, self._shapes, self._dtype)
            for name in self._shapes.keys() - crcs.keys():
                crcs[name] = zlib.crc32(as_bytes(there[name][:]))
            tail = self._layout.tail(crcs)
            file.write(self._layout.size - len(tail), tail)
        file.finish()
        (digest,) = meta.md5s([file.path])
        return digest


class HfTarget:
    """Hugging Face's files: safetensors, and an index if there are several."""

    def __init__(
        self, directory: epath.Path, config: LlamaConfig, dtype: jnp.dtype
    ) -> None:
        self._directory = directory
        self._config = config
        self._dtype = dtype
        sizes = names.axis_sizes(config)
        self._shapes = {
            weight.name: weight.parameter.hf.shape(sizes)
            for weight in names.weights(config)
        }
        groups = _grouped(self._shapes, dtype)
        directory.mkdir(parents=True, exist_ok=True)
        self._file_of: dict[str, OutputFile] = {}
        self._offsets: dict[str, int] = {}
        self._files: list[OutputFile] = []
        for number, group in enumerate(groups, 1):
            shapes = {name: self._shapes[name] for name in group}
            header, offsets = safetensors.header_of(shapes, dtype)
            size = len(header) + sum(map(self._num_bytes, group))
            file_name = (
                "model.safetensors"
                if len(groups) == 1
                else f"model-{number:05}-of-{len(groups):05}.safetensors"
            )
            file = OutputFile(directory / file_name, size)
            self._files.append(file)
            with _closed_on_error(self._files):
                file.write(0, header)
            self._offsets |= offsets
            self._file_of |= dict.fromkeys(group, file)
        self.in_order = self._files[0].in_order

    def write(self, weight: names.Weight, start: int, matrix: np.ndarray) -> None:
        """Put rows of a weight, from `start` on, where they belong."""
        at = self._offsets[weight.name] + start * matrix[0].nbytes
        self._file_of[weight.name].write(at, as_bytes(np.ascontiguousarray(matrix)))

    def written(self) -> Checkpoint:
        """What is there so far, to be read back."""
        tensors: dict[str, Any] = {}
        for file in self._files:
            inside = {n: s for n, s in self._shapes.items() if self._file_of[n] is file}
            tensors |= file.tensors(self._offsets, inside, self._dtype)
        return TensorCheckpoint(
            "hf", self._directory, (), self._config, None, [tensors]
        )

    def finish(self, tokenizer: Tokenizer | None) -> None:
        """Write what describes the weights, once all of them are there."""
        for file in self._files:
            file.finish()
        if len(self._files) > 1:
            weight_map = {name: file.path.name for name, file in self._file_of.items()}
            total = sum(map(self._num_bytes, self._shapes))
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self._directory / "model.safetensors.index.json").write_text(
                json.dumps(index, indent=2) + "\n"
            )
        _write_tokenizer(self._directory, tokenizer)
        texts = describe.hf_files(self._config, self._dtype, tokenizer)
        for name, text in texts.items():
            (self._directory / name).write_text(text)

    def close(self) -> None:
        """Let go of the files, finished or not."""
        for file in self._files:
            file.close()

    def _num_bytes(self, name: str) -> int:
        return int(np.prod(self._shapes[name])) * self._dtype.itemsize


@contextlib.contextmanager
def _closed_on_error(files: Sequence[OutputFile]) -> Iterator[None]:
    try:
        yield
    except OSError:
        for file in files:
            file.close()
        raise


def _array_name(parameter: names.Parameter) -> str:
    return parameter.path.replace("/", ".")


def _grouped(shapes: Mapping[str, Sequence[int]], dtype: jnp.dtype) -> list[list[str]]:
    """Names in order, cut where a file would grow over its size."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        if groups[-1] and filled + num_bytes > _HF_FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += num_bytes
    return groups


def _write_tokenizer(directory: epath.Path, tokenizer: Tokenizer | None) -> None:
    if tokenizer is not None:
        (directory / TOKENIZER).write_bytes(tokenizer.model_bytes)
