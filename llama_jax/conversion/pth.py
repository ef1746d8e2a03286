"""Tensors from PyTorch's `.pth` files, without PyTorch, running nothing.

Such a file is a zip archive. `NAME/data.pkl` is a pickle that describes the tensors:
`pth_pickle.py` runs it. `NAME/data/KEY` holds the bytes of one storage, uncompressed,
so that it can be mapped.
"""

import functools
import io
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from llama_jax.conversion import pth_pickle
from llama_jax.conversion.files import Bytes, RemoteBytes, Tensor, open_bytes
from llama_jax.conversion.pth_pickle import Global, Refused, Storage, shown
from llama_jax.errors import CheckpointError

# Of the pickle and of the archive's directory. A byte of either can cost a hundred of
# memory; those of the largest Llama are some 0.2 MB.
_MAX_BYTES = 2**22


def read_pth(path: epath.PathLike) -> dict[str, Tensor]:
    """Every tensor of a `.pth` file by name, as read-only views of the mapped file.

    The bytes of a tensor are read when it is used, and only those. Those of a file in
    a bucket are read when the tensor is indexed.

    Raises:
      CheckpointError: the file is missing, empty, damaged or not of this format; or
        it asks for anything but tensors.
    """
    try:
        _require_zip(path)
        content = open_bytes(path)
        with zipfile.ZipFile(_Stream(content)) as archive:
            records = _Records(path, archive, content)
            tensors = pth_pickle.run(records.program(), records.storage)
    except Refused as error:
        raise CheckpointError(
            f"{path} asks for {error}, which a file of tensors has no need of. Nothing "
            "of it was run. Get the weights from their publisher."
        ) from None
    # What the malformed make of zipfile, pickletools, the machine and NumPy.
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
        raise _damaged(path, error) from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}): copy it from where "
            "the weights came from."
        ) from error
    if not isinstance(tensors, dict) or not tensors:
        raise CheckpointError(
            f"{path} holds no dict of tensors: weights are tensors by name."
        )
    for name, tensor in tensors.items():
        if not pth_pickle.is_tensor(tensor):
            raise CheckpointError(
                f"{path}: the entry {name[:80]!r} is no tensor, and a file of "
                "weights holds nothing else: save the dict of tensors alone."
            )
    return tensors


def _require_zip(path: epath.PathLike) -> None:
    with epath.Path(path).open("rb") as file:
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


def _damaged(path: epath.PathLike, what: object) -> CheckpointError:
    return CheckpointError(
        f"{path} is truncated or damaged ({str(what)[:200]}): copy it again."
    )


class _Stream(io.RawIOBase):
    """Bytes as the file that zipfile wants, in pieces of a bounded size."""

    def __init__(self, content: Bytes) -> None:
        self._content = content
        self._position = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}
        position = base.get(whence, self._content.size) + offset
        if position < 0:
            # Both of what zipfile expects and, elsewhere, of the malformed.
            raise io.UnsupportedOperation("a record before the start of the file")
        self._position = position
        return position

    def read(self, size: int = -1, /) -> bytes:
        stop = self._content.size
        if size >= 0:
            stop = min(stop, self._position + size)
        # zipfile reads the whole directory at once, and makes an object of each entry.
        if stop - self._position > _MAX_BYTES:
            raise Refused(f"a directory of {stop - self._position} bytes")
        content = self._content[self._position : stop].tobytes()
        self._position += len(content)
        return content


class _Records:
    """The records of one archive, mapped in place."""

    def __init__(
        self, path: epath.PathLike, archive: zipfile.ZipFile, content: Bytes
    ) -> None:
        self._path = path
        self._archive = archive
        self._content = content
        self._memories: dict[str, Bytes] = {}
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise ValueError("two records have one name")
        (pickled,) = (name for name in names if name.endswith("/data.pkl"))
        self._prefix = pickled.removesuffix("data.pkl")

    def program(self) -> bytes:
        """The pickle; zipfile checks its CRC."""
        program = self._read("data.pkl")
        # Files older than the record are all little-endian.
        there = f"{self._prefix}byteorder" in self._archive.NameToInfo
        if there and self._read("byteorder") != b"little":
            raise CheckpointError(
                f"{self._path} was written on a big-endian machine: load and save it "
                "once with PyTorch on a little-endian one."
            )
        return program

    def storage(self, identifier: Any) -> Storage:
        """The storage that a pickle's persistent identifier names."""
        match identifier:
            case ("storage", Global() as name, str(key), str(), int(num_elements)):
                dtype = pth_pickle.STORAGES.get(name)
                if dtype is not None:
                    return Storage(self._memory(key, num_elements, dtype), dtype)
        raise Refused("a persistent object that is no storage")

    def _memory(self, key: str, num_elements: int, dtype: np.dtype[Any]) -> Bytes:
        """The bytes of a storage, which tensors may share."""
        entry = self._stored(f"data/{key}")
        if num_elements * dtype.itemsize != entry.file_size:
            raise ValueError(
                f"storage {shown(key)} has {entry.file_size} bytes for "
                f"{num_elements} {dtype}"
            )
        if key not in self._memories:
            if isinstance(self._content, RemoteBytes):
                find = functools.partial(self._start, entry)
                self._memories[key] = _Part(self._content, find, entry.file_size)
            else:
                start = self._start(entry)
                self._memories[key] = self._content[start : start + entry.file_size]
        return self._memories[key]

    def _start(self, entry: zipfile.ZipInfo) -> int:
        """Where the bytes of a record are."""
        # The local header repeats the name and has padding of its own length.
        start = entry.header_offset
        header = self._content[max(0, start) : max(0, start + 30)].tobytes()
        if header.startswith(b"PK\x03\x04") and len(header) == 30:
            len_name, len_extra = struct.unpack_from("<HH", header, 26)
            start += 30 + len_name + len_extra
            if start + entry.file_size <= self._content.size:
                return start
        key = shown(entry.filename.rpartition("/")[2])
        raise _damaged(self._path, f"storage {key} is not where the archive says")

    def _read(self, name: str) -> bytes:
        entry = self._stored(name)
        if entry.file_size > _MAX_BYTES:
            raise Refused(f"a record {name} of {entry.file_size} bytes")
        return self._archive.read(entry)

    def _stored(self, name: str) -> zipfile.ZipInfo:
        try:
            entry = self._archive.getinfo(self._prefix + name)
        except KeyError:
            raise ValueError(f"there is no record {shown(name)}") from None
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{self._path}: the record {name} is compressed, so it cannot be "
                "mapped: load and save the file once with PyTorch."
            )
        return entry


class _Part(RemoteBytes):
    """A record of a file in a bucket, which is looked for when it is first read."""

    def __init__(
        self, content: RemoteBytes, find: Callable[[], int], size: int
    ) -> None:
        self._content = content
        self._find = find
        self.size = size

    @functools.cached_property
    def _start(self) -> int:
        return self._find()

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.size)
        return self._content[self._start + start : self._start + stop]
