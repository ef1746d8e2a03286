"""Tensors from PyTorch's `.pth` files, without PyTorch, running nothing.

Such a file is a zip archive. `NAME/data.pkl` is a pickle that describes the tensors;
`NAME/data/KEY` holds the bytes of one storage, uncompressed, so that it can be mapped.
A pickle is a program for a stack machine that may import and call anything. Here is
that machine with the instructions of a tensor file alone: a "global" is no more than
its name, and a "call" makes a dict or a view of mapped bytes, or is refused.
"""

import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.errors import CheckpointError

_DTYPES = {
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}
_REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
_ORDERED_DICT = "collections OrderedDict"
_GLOBALS = frozenset({*_DTYPES, _REBUILD_TENSOR, _ORDERED_DICT})


class _Storage(NamedTuple):
    """The mapped bytes that tensors are views of, and what they mean."""

    memory: np.ndarray
    dtype: np.dtype


class _Refused(Exception):
    """An instruction that a file of tensors does not need."""


def read_pth(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a `.pth` file by name, as read-only views of the mapped file.

    The bytes of a tensor are read when it is used, and only those.

    Raises:
      CheckpointError: the file is missing, empty, damaged or not of this format; or
        it asks for anything but fp32, fp16 and bf16 tensors.
    """
    try:
        _require_zip(path)
        with zipfile.ZipFile(path) as archive:
            records = _Records(path, archive)
            tensors = _run(records.program(), records.storage)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): copy it from where the "
            "weights came from."
        ) from error
    except _Refused as error:
        raise CheckpointError(
            f"{path} asks for {error}, which a file of fp32, fp16 or bf16 tensors has "
            "no need of. Nothing of it was run. Get the weights from their publisher."
        ) from None
    # What the malformed make of zipfile, pickletools, the machine below and NumPy.
    except (
        zipfile.BadZipFile,
        struct.error,
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}): copy it again."
        ) from error
    if not isinstance(tensors, dict) or not tensors:
        raise CheckpointError(
            f"{path} holds no dict of tensors: a Meta checkpoint maps names to tensors."
        )
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, np.ndarray):
            raise CheckpointError(
                f"{path}: the entry {name!r} is no tensor, and a Meta checkpoint holds "
                "nothing else: save the dict of tensors alone."
            )
    return tensors


def _require_zip(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        raise CheckpointError(f"{path} is empty: copy it again.")
    if start.startswith(b"\x80"):
        raise CheckpointError(
            f"{path} is a pickle outside a zip archive, the legacy format of PyTorch "
            "before 1.6: load and save it once with a newer PyTorch."
        )
    if not start.startswith(b"PK\x03\x04"):
        raise CheckpointError(
            f"{path} is no PyTorch file, it starts with {start!r}: copy the weights "
            "themselves, not a pointer or a web page in their place."
        )


class _Records:
    """The records of one archive, mapped in place."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._path = path
        self._archive = archive
        self._bytes = np.memmap(path, np.uint8, mode="r")
        (pickled,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
        self._prefix = pickled.removesuffix("data.pkl")
        # Files older than the record are all little-endian.
        byteorder = f"{self._prefix}byteorder"
        if byteorder in archive.namelist() and archive.read(byteorder) != b"little":
            raise CheckpointError(
                f"{path} was written on a big-endian machine: load and save it once "
                "with PyTorch on a little-endian one."
            )

    def program(self) -> bytes:
        """The pickle; zipfile checks its CRC."""
        return self._archive.read(self._stored("data.pkl"))

    def storage(self, identifier: Any) -> _Storage:
        """The storage that a pickle's persistent identifier names."""
        kind, name, key, _device, num_elements = identifier
        if kind != "storage" or not isinstance(name, str) or name not in _DTYPES:
            raise _Refused("a persistent object that is no storage")
        entry = self._stored(f"data/{key}")
        dtype = _DTYPES[name]
        if num_elements * dtype.itemsize != entry.file_size:
            raise ValueError(
                f"storage {key} has {entry.file_size} bytes for {num_elements} {dtype}"
            )
        # The local header repeats the name and has padding of its own length.
        header = self._bytes[entry.header_offset : entry.header_offset + 30].tobytes()
        signature, len_name, len_extra = struct.unpack("<4s22xHH", header)
        start = entry.header_offset + 30 + len_name + len_extra
        memory = self._bytes[start : start + entry.file_size]
        if signature != b"PK\x03\x04" or memory.size != entry.file_size:
            raise ValueError(f"storage {key} is not where the archive says")
        return _Storage(memory, dtype)

    def _stored(self, name: str) -> zipfile.ZipInfo:
        entry = self._archive.getinfo(self._prefix + name)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{self._path}: the record {name} is compressed, so it cannot be "
                "mapped: load and save the file once with PyTorch."
            )
        return entry


def _run(program: bytes, load_storage: Callable[[Any], _Storage]) -> Any:
    """What the pickle describes, by the few instructions that tensor files use."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[object, Any] = {}

    def pop(start: int) -> list[Any]:
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(program):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE":
                stack.append(True)
            case "NEWFALSE":
                stack.append(False)
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(pop(marks.pop())))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(-int(opcode.name[-1]))))
            case "SETITEM" | "SETITEMS":
                items = pop(marks.pop() if opcode.name == "SETITEMS" else -2)
                if not all(isinstance(key, str) for key in items[::2]):
                    raise _Refused("a dict with keys that are no names")
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_known_global(str(argument)))
            case "STACK_GLOBAL":
                stack.append(_known_global(" ".join(pop(-2))))
            case "REDUCE":
                stack.append(_call(*pop(-2)))
            case "BINPERSID":
                stack.append(load_storage(stack.pop()))
            case "BUILD":
                # A `state_dict()` carries `_metadata`, of no use here, as the state
                # of an ordered dict. Nothing else in such a file has state.
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise _Refused("an object with a state")
            case _:
                raise _Refused(f"the pickle instruction {opcode.name} ({argument})")
    raise AssertionError("genops ends at STOP or raises")


def _known_global(name: str) -> str:
    if name not in _GLOBALS:
        raise _Refused(f"the Python object {name.replace(' ', '.')}")
    return name


def _call(name: Any, arguments: Any) -> Any:
    if name == _ORDERED_DICT and arguments == ():
        return dict[str, Any]()
    if name == _REBUILD_TENSOR:
        storage, offset, shape, strides, *_autograd = arguments
        width = storage.dtype.itemsize
        # NumPy refuses what would reach outside the storage.
        return np.ndarray(
            shape,
            storage.dtype,
            buffer=storage.memory,
            offset=offset * width,
            strides=[stride * width for stride in strides],
        )
    raise _Refused("a call of what makes no tensor")
