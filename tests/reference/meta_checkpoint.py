"""A maker of checkpoints as Meta lays them out, faulty ones too, without PyTorch.

`write_pth` is the format by hand: a zip of uncompressed records, and a pickle of
protocol 2 put together from its opcodes. Nothing here is shared with `llama_jax`.
"""

import hashlib
import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

# Grouped-query heads, and every size that is split divides by 1, 2 and 4.
PARAMS: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 4,
    "multiple_of": 8,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}
HIDDEN_DIM = 88  # two thirds of 4 * 32, up to a multiple of 8
VOCAB_SIZE = 48

# The dimension of [out, in] along which fairscale splits a matrix; norms are copied.
SPLIT_DIM = {
    "tok_embeddings": 1,
    "output": 0,
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w2": 1,
    "w3": 0,
}
_STORAGES = {
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
}


def random_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of the model of `PARAMS`, by Meta's names, in fp32.

    Queries and keys are large, so that attention is sharp: a head in a wrong place or
    a rotary pair misread moves the logits by far more than rounding does.
    """
    dim, heads = PARAMS["dim"], PARAMS["n_heads"]
    kv_dim = dim // heads * PARAMS["n_kv_heads"]
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        drawn = rng.normal(size=(rows, columns)) * gain / np.sqrt(columns)
        return drawn.astype(np.float32)

    def norm() -> np.ndarray:
        return rng.uniform(0.5, 1.5, size=dim).astype(np.float32)

    tensors = {"tok_embeddings.weight": matrix(VOCAB_SIZE, dim, gain=4.0)}
    for layer in range(PARAMS["n_layers"]):
        tensors |= {
            f"layers.{layer}.attention.wq.weight": matrix(dim, dim, gain=2.0),
            f"layers.{layer}.attention.wk.weight": matrix(kv_dim, dim, gain=2.0),
            f"layers.{layer}.attention.wv.weight": matrix(kv_dim, dim),
            f"layers.{layer}.attention.wo.weight": matrix(dim, dim),
            f"layers.{layer}.feed_forward.w1.weight": matrix(HIDDEN_DIM, dim),
            f"layers.{layer}.feed_forward.w2.weight": matrix(dim, HIDDEN_DIM),
            f"layers.{layer}.feed_forward.w3.weight": matrix(HIDDEN_DIM, dim),
            f"layers.{layer}.attention_norm.weight": norm(),
            f"layers.{layer}.ffn_norm.weight": norm(),
        }
    return tensors | {"norm.weight": norm(), "output.weight": matrix(VOCAB_SIZE, dim)}


def split(tensors: Mapping[str, np.ndarray], num_shards: int) -> list[dict]:
    """The share of each model-parallel shard."""
    shards: list[dict] = [{} for _ in range(num_shards)]
    for name, tensor in tensors.items():
        dim = _split_dim(name)
        parts = (
            [tensor] * num_shards if dim is None else np.split(tensor, num_shards, dim)
        )
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part
    return shards


def merge(shards: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The whole tensors again."""
    whole = {}
    for name in shards[0]:
        dim = _split_dim(name)
        parts = [shard[name] for shard in shards]
        whole[name] = parts[0] if dim is None else np.concatenate(parts, dim)
    return whole


def write_checkpoint(
    directory: Path,
    shards: Sequence[Mapping[str, np.ndarray]],
    params: Mapping[str, Any] = PARAMS,
    *,
    shared_storage: bool = False,
) -> Path:
    """Write shards, `params.json` and `checklist.chk`; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(shards):
        file = directory / f"consolidated.{number:02d}.pth"
        write_pth(file, shard, shared_storage=shared_storage)
    (directory / "params.json").write_text(json.dumps(params))
    write_checklist(directory)
    return directory


def write_checklist(directory: Path) -> None:
    """Write the MD5 of every file that is there."""
    files = sorted(f for f in directory.iterdir() if f.name != "checklist.chk")
    lines = [f"{hashlib.md5(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files]
    (directory / "checklist.chk").write_text("".join(lines))


def write_pth(
    path: Path, tensors: Mapping[str, np.ndarray], *, shared_storage: bool = False
) -> None:
    """Write tensors of one dtype, each in its own storage or all in one."""
    flat = [np.ravel(tensor) for tensor in tensors.values()]
    storages = [np.concatenate(flat)] if shared_storage else flat
    described, offset = {}, 0
    for number, (name, tensor) in enumerate(tensors.items()):
        strides = tuple(
            int(np.prod(tensor.shape[dim + 1 :])) for dim in range(tensor.ndim)
        )
        key = 0 if shared_storage else number
        described[name] = tensor_of(
            storage_of(storages[key], key), offset, tensor.shape, strides
        )
        offset += tensor.size if shared_storage else 0
    write_archive(path, pickle_of(described), [s.tobytes() for s in storages])


def write_archive(
    path: Path,
    program: bytes,
    storages: Sequence[bytes] = (),
    *,
    byteorder: bytes = b"little",
    compression: int = zipfile.ZIP_STORED,
) -> None:
    """Write the zip archive around a pickle and its storages."""
    records = {"data.pkl": program, "byteorder": byteorder, "version": b"3\n"}
    records |= {f"data/{key}": content for key, content in enumerate(storages)}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            entry = zipfile.ZipInfo(f"archive/{name}")
            entry.compress_type = compression
            # As PyTorch does: an extra field that lets the content start at 64 bytes.
            start = archive.fp.tell() + 30 + len(entry.filename) + 4
            padding = -start % 64
            entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
            archive.writestr(entry, content)


def pickle_of(described: Mapping[str, bytes]) -> bytes:
    """The program that makes a dict, from the opcodes that make its values."""
    items = b"".join(_opcodes(name) + value for name, value in described.items())
    return b"\x80\x02}(" + items + b"u."


def storage_of(values: np.ndarray, key: int) -> bytes:
    """The opcodes that refer to a storage of the archive."""
    kind = b"ctorch\n" + _STORAGES[values.dtype].encode() + b"\n"
    return _opcodes(("storage", kind, str(key), "cpu", values.size)) + b"Q"


def tensor_of(
    storage: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> bytes:
    """The opcodes that make a tensor, a view of a storage."""
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = _opcodes((storage, offset, shape, strides, False, hooks))
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def _opcodes(value: Any) -> bytes:
    """The opcodes that make a value; bytes are opcodes already."""
    match value:
        case bytes():
            return value
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"J" + struct.pack("<i", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(_opcodes, value)) + b"t"
    raise TypeError(f"no opcodes for {value!r}")


def _split_dim(name: str) -> int | None:
    return SPLIT_DIM.get(name.removesuffix(".weight").rpartition(".")[2])
