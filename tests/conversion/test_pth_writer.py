"""Our writer of `.pth` files, by Python's own zipfile and by our reader.

PyTorch's opinion: `test_torch.py`.
"""

import io
import math
import pickletools
import struct
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest

from llama_jax.conversion.pth import read_pth
from llama_jax.conversion.pth_writer import PthLayout

SHAPES = {"matrix": (3, 4), "vecteur é": (5,), "one": (), "none": (0, 2), "end": (70,)}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "consolidated.00.pth"


def _tensors(dtype):
    rng = np.random.default_rng(0)
    return {
        name: np.asarray(rng.normal(size=shape)).astype(dtype)
        for name, shape in SHAPES.items()
    }


def _write(file, tensors, dtype):
    layout = PthLayout({n: t.shape for n, t in tensors.items()}, np.dtype(dtype))
    crcs = {name: zlib.crc32(tensor.tobytes()) for name, tensor in tensors.items()}
    with file.open("wb") as stream:
        stream.write(layout.head)
        for name, tensor in tensors.items():
            stream.write(layout.before(name))
            assert stream.tell() == layout.offsets[name]
            stream.write(tensor.tobytes())
            stream.write(layout.after(name, crcs[name]))
        stream.write(layout.tail(crcs))
        assert stream.tell() == layout.size


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_written_is_read(file, dtype):
    tensors = _tensors(dtype)
    _write(file, tensors, dtype)
    found = read_pth(file)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype and found[name].shape == tensor.shape
        assert found[name].tobytes() == tensor.tobytes()


def test_the_archive_is_whole(file):
    tensors = _tensors(np.float32)
    _write(file, tensors, np.float32)
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [
            *("archive/data.pkl", "archive/byteorder", "archive/version"),
            *(f"archive/data/{key}" for key in range(len(tensors))),
        ]
        for entry in archive.infolist():
            assert entry.compress_type == zipfile.ZIP_STORED
            assert entry.extract_version == 20 and not entry.extra
        for key, tensor in enumerate(tensors.values()):
            assert archive.read(f"archive/data/{key}") == tensor.tobytes()
        assert archive.read("archive/byteorder") == b"little"
        # Raises if the program leaves anything on its stack.
        pickletools.dis(archive.read("archive/data.pkl"), out=io.StringIO())


def test_the_crc_and_size_of_each_tensor_come_behind_it(file):
    tensors = _tensors(np.float16)
    _write(file, tensors, np.float16)
    offsets = PthLayout(SHAPES, np.dtype(np.float16)).offsets
    content = file.read_bytes()
    for name, tensor in tensors.items():
        stop = offsets[name] + tensor.nbytes
        crc, size = zlib.crc32(tensor.tobytes()), tensor.nbytes
        descriptor = struct.pack("<4s3I", b"PK\x07\x08", crc, size, size)
        assert content[stop : stop + 16] == descriptor


def test_a_damaged_tensor_is_found_by_its_crc(file):
    _write(file, _tensors(np.float32), np.float32)
    layout = PthLayout(SHAPES, np.dtype(np.float32))
    content = bytearray(file.read_bytes())
    content[layout.offsets["end"]] ^= 1
    file.write_bytes(content)
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() == "archive/data/4"


def test_every_tensor_starts_at_64_bytes():
    shapes = {"w" * size: (size,) for size in range(1, 200)}
    layout = PthLayout(shapes, np.dtype(np.float16))
    assert all(offset % 64 == 0 for offset in layout.offsets.values())


def test_the_same_tensors_make_the_same_file(file, tmp_path):
    again = tmp_path / "again.pth"
    _write(file, _tensors(np.float16), np.float16)
    _write(again, _tensors(np.float16), np.float16)
    assert file.read_bytes() == again.read_bytes()


def _write_hollow(file, shapes):
    """The file with every tensor zeros but for its last element; nearly no blocks."""
    layout = PthLayout(shapes, np.dtype(np.float32))
    one = np.float32(1).tobytes()
    with file.open("wb") as stream:
        stream.write(layout.head)
        crcs = {}
        for name, shape in shapes.items():
            num_zeros = 4 * math.prod(shape) - 4
            # The CRC of gigabytes takes too long, and nobody asks for it.
            crcs[name] = zlib.crc32(bytes(num_zeros) + one) if num_zeros < 100 else 7
            stream.write(layout.before(name))
            assert stream.tell() == layout.offsets[name]
            stream.seek(num_zeros, 1)
            stream.write(one + layout.after(name, crcs[name]))
        stream.write(layout.tail(crcs))
        assert stream.tell() == layout.size


@pytest.mark.parametrize(
    "shapes",
    [
        # One larger than 4 GiB, and what starts behind it.
        {"large": (2**20 + 1, 2**10), "small": (3,)},
        # None larger, all together are.
        {"half": (2**20, 2**9), "other half": (2**29,), "small": (3,)},
        # On either side of the limit.
        {"below": (2**30 - 1,), "small": (3,)},
        {"above": (2**30,), "small": (3,)},
    ],
)
def test_more_than_32_bits_can_tell(file, shapes):
    try:
        _write_hollow(file, shapes)
        found = read_pth(file)
        for name, shape in shapes.items():
            assert found[name].shape == shape
            assert found[name].reshape(-1)[-1] == 1
        with zipfile.ZipFile(file) as archive:
            small = archive.infolist()[-1]
            assert small.header_offset > 2**32 - 100
            assert np.array_equal(np.frombuffer(archive.read(small), "f4"), [0, 0, 1])
    finally:
        file.unlink()


def test_more_records_than_16_bits_can_count(file):
    shapes = {f"w{number}": (1,) for number in range(2**16)}
    layout = PthLayout(shapes, np.dtype(np.float32))
    tail = layout.tail(dict.fromkeys(shapes, 0))
    with file.open("wb") as stream:  # nobody looks between these two
        stream.write(layout.head)
        stream.seek(layout.size - len(tail))
        stream.write(tail)
    with zipfile.ZipFile(file) as archive:
        assert len(archive.namelist()) == 3 + len(shapes)
        assert archive.testzip() == "archive/data/0"
