"""Our readers and writers of tensor files beside PyTorch's and safetensors' own."""

import collections
import itertools
import math
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest

from llama_jax.conversion.pth import read_pth
from llama_jax.conversion.pth_writer import PthLayout
from llama_jax.conversion.safetensors import header_of, read_safetensors
from llama_jax.errors import CheckpointError

pytestmark = pytest.mark.torch

FLOATS = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
DTYPES = FLOATS | {
    "float64": np.float64,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
}
COMPLEX = {"complex64": np.complex64, "complex128": np.complex128}
SHAPES = {"matrix": (3, 4), "vecteur é": (5,), "one": (), "none": (0, 2), "end": (70,)}


@pytest.fixture(scope="module")
def torch():
    import torch

    return torch


@pytest.fixture
def file(tmp_path):
    return tmp_path / "weights.pth"


def _bytes(torch, tensor):
    """The bytes of a tensor of PyTorch's, in order, of any type."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _require_equal(torch, found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tuple(tensor.shape), name
        assert str(found[name].dtype) == str(tensor.dtype).removeprefix("torch."), name
        assert found[name].tobytes() == _bytes(torch, tensor), name


@pytest.mark.parametrize("name", [*DTYPES, *COMPLEX])
def test_every_type_is_read(torch, file, name):
    values = torch.arange(-6, 6, dtype=torch.float32).reshape(3, 4)
    saved = {"w": values.to(getattr(torch, name)), "v": torch.tensor(3.0)}
    torch.save(saved, file)
    found = read_pth(file)
    assert found["w"].dtype == (DTYPES | COMPLEX)[name]
    _require_equal(torch, found, saved)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint16"])
def test_views_of_one_storage_are_read(torch, file, dtype):
    base = torch.arange(60).to(getattr(torch, dtype)).reshape(3, 4, 5)
    saved = {
        "base": base,
        "again": base,
        "part": base[1:],
        "column": base[:, 2],
        "steps": base[::2, :, 1::3],
        "transposed": base.transpose(0, 2),
        "expanded": base[0, :1].expand(7, 5),
        "one": base[1, 2, 3],
        "empty": base[:, 4:],
    }
    torch.save(saved, file)
    with zipfile.ZipFile(file) as archive:
        assert sum("/data/" in name for name in archive.namelist()) == 1
    _require_equal(torch, read_pth(file), saved)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_state_dicts_of_modules_are_read(torch, file, protocol):
    module = torch.nn.Sequential(
        torch.nn.Embedding(7, 8),
        torch.nn.TransformerEncoderLayer(8, 2, dim_feedforward=16),
        torch.nn.BatchNorm1d(8),
    )
    saved = module.state_dict()
    assert isinstance(saved, collections.OrderedDict) and saved._metadata
    torch.save(saved, file, pickle_protocol=protocol)
    _require_equal(torch, read_pth(file), saved)


def test_parameters_are_read(torch, file):
    module = torch.nn.Linear(3, 4)
    with_state = torch.nn.Parameter(torch.ones(3))
    with_state.is_distributed = True
    saved = dict(module.named_parameters()) | {
        "frozen": torch.nn.Parameter(torch.arange(3.0), requires_grad=False),
        "with_state": with_state,
    }
    torch.save(saved, file)
    with zipfile.ZipFile(file) as archive:
        program = archive.read(f"{file.stem}/data.pkl")
    assert b"_rebuild_parameter\n" in program
    assert b"_rebuild_parameter_with_state\n" in program
    _require_equal(torch, read_pth(file), saved)


def test_empty_tensors_and_many_of_them_are_read(torch, file):
    saved = {f"w{number}": torch.full((3,), float(number)) for number in range(2500)}
    saved |= {"none": torch.empty(0), "no rows": torch.empty(0, 5, 3)}
    torch.save(saved, file)
    _require_equal(torch, read_pth(file), saved)


def test_what_is_no_plain_tensor_is_refused_by_name(torch, file):
    cases = {
        "_rebuild_sparse_tensor": torch.eye(3).to_sparse(),
        "the conjugate or negative": torch.tensor([1 + 2j]).conj(),
    }
    for message, tensor in cases.items():
        torch.save({"w": tensor}, file)
        with pytest.raises(CheckpointError, match=f"asks for .*{message}"):
            read_pth(file)


def test_files_that_cannot_be_mapped_are_refused(torch, file):
    torch.save({"w": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="legacy format.*with a newer PyTorch"):
        read_pth(file)


def test_a_whole_module_is_refused(torch, file):
    torch.save(torch.nn.Linear(3, 4), file)
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_pth(file)


def test_a_file_of_more_than_4_gib_is_read(torch, file):
    """Whose data PyTorch leaves room for, and writes none."""
    with torch.serialization.skip_data():
        torch.save(
            {
                "large": torch.empty(2**30 + 3),
                "small": torch.empty(5),
            },
            file,
        )
    try:
        found = read_pth(file)
        assert found["large"].shape == (2**30 + 3,) and found["small"].shape == (5,)
        assert found["large"][-1] == 0
    finally:
        file.unlink()


def _tensors(dtype):
    """Of every bit pattern of 16 bits, NaNs too, as far as there is room."""
    rng = np.random.default_rng(0)
    return {
        name: np.frombuffer(
            rng.bytes(math.prod(shape) * np.dtype(dtype).itemsize), dtype
        ).reshape(shape)
        for name, shape in SHAPES.items()
    }


def _write_pth(file, tensors, dtype):
    layout = PthLayout({n: t.shape for n, t in tensors.items()}, np.dtype(dtype))
    crcs = {name: zlib.crc32(tensor.tobytes()) for name, tensor in tensors.items()}
    parts = [layout.head]
    for name, tensor in tensors.items():
        parts += [layout.before(name), tensor.tobytes(), layout.after(name, crcs[name])]
    file.write_bytes(b"".join([*parts, layout.tail(crcs)]))


@pytest.mark.parametrize(
    ("name", "mmap"), list(itertools.product(FLOATS, [False, True]))
)
def test_pytorch_reads_what_we_write(torch, file, name, mmap):
    tensors = _tensors(FLOATS[name])
    _write_pth(file, tensors, FLOATS[name])
    found = torch.load(file, weights_only=True, mmap=mmap)
    assert list(found) == list(tensors)
    for key, tensor in tensors.items():
        assert found[key].dtype == getattr(torch, name)
        assert tuple(found[key].shape) == tensor.shape
        assert found[key].is_contiguous() and not found[key].requires_grad
        assert _bytes(torch, found[key]) == tensor.tobytes()


def test_pytorch_reads_what_we_write_beyond_4_gib(torch, file):
    shapes = {"large": (2**20 + 1, 2**10), "small": (3,)}
    layout = PthLayout(shapes, np.dtype(np.float32))
    try:
        with file.open("wb") as stream:
            stream.write(layout.head)
            for name, shape in shapes.items():
                stream.write(layout.before(name))
                stream.seek(4 * math.prod(shape) - 4, 1)
                stream.write(np.float32(7).tobytes() + layout.after(name, 0))
            stream.write(layout.tail(dict.fromkeys(shapes, 0)))
        found = torch.load(file, weights_only=True, mmap=True)
        assert found["large"].shape == shapes["large"] and found["large"][-1, -1] == 7
        assert found["small"].tolist() == [0, 0, 7]
    finally:
        file.unlink()


@pytest.mark.parametrize("name", FLOATS)
def test_safetensors_reads_what_our_header_describes(torch, tmp_path, name):
    import safetensors.torch

    file = tmp_path / "model.safetensors"
    tensors = _tensors(FLOATS[name])
    header, offsets = header_of(SHAPES, np.dtype(FLOATS[name]))
    file.write_bytes(header + b"".join(t.tobytes() for t in tensors.values()))
    found = safetensors.torch.load_file(file)
    assert found.keys() == tensors.keys() == offsets.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == getattr(torch, name)
        assert _bytes(torch, found[key]) == tensor.tobytes()
    with safetensors.safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", DTYPES)
def test_what_safetensors_writes_is_read(torch, tmp_path, name):
    import safetensors.torch

    file = tmp_path / "model.safetensors"
    values = torch.arange(-6, 6, dtype=torch.float32).reshape(3, 4)
    saved = {
        "w": values.to(getattr(torch, name)),
        "one": torch.tensor(3.0),
        "none": torch.empty(0, 5),
        "vecteur é": torch.ones(3, dtype=torch.bfloat16),
    }
    safetensors.torch.save_file(saved, file, metadata={"format": "pt", "é": "\n"})
    found = read_safetensors(file)
    _require_equal(torch, {key: found[key] for key in saved}, saved)
    assert found.keys() == saved.keys()
