"""A fuzzer of the readers of tensor files: `python -m tests.fuzz.readers --minutes 10`.

It needs `pip install atheris`, which guides mutations by the lines that they reach. An
input is a byte that says what the rest is: a whole file, or the part of one that checks
of lengths and CRCs would keep a fuzzer from. Mutations know instructions, records and
JSON. The run ends at the first input that makes a reader raise anything but a
`CheckpointError`, take more than two seconds, take memory out of proportion, or make a
tensor of what is outside the file; that input is kept, for `--replay`.
"""

import argparse
import io
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
from atheris.import_hook import HookManager

# Before anything else imports them. Comparisons are not traced, which makes a hundred
# times as slow: what the readers compare with is among the pieces below.
with HookManager({"pickletools", "zipfile", "llama_jax"}, set(), True, False):
    import pickletools
    import zipfile

    import numpy as np
    from etils import epath
    from etils.epath.testing import mock_epath

    from llama_jax.conversion.pth import read_pth
    from llama_jax.conversion.pth_writer import PthLayout
    from llama_jax.conversion.safetensors import header_of, read_safetensors
    from llama_jax.errors import CheckpointError
    from tests.reference.meta_checkpoint import (
        pickle_of,
        storage_of,
        tensor_of,
        write_archive,
        write_pth,
    )

SECONDS = 2.0  # of the processor, which others use too
# A byte of a pickle or of a directory costs a hundred or so. What does not grow with
# the input is zipfile's, json's and the error's.
BYTES_PER_BYTE = 150
BYTES = 2**20
LONGEST = 2**13  # inputs; the costs are those of a byte, whatever their number

# What an input is, by its first byte.
ARCHIVE, PROGRAM, SAFETENSORS, HEADER = range(4)
VALUES = np.arange(12, dtype=np.float32)
STORAGES = [VALUES.tobytes(), b"", bytes(range(256))]
NUMBERS = [0, 1, 3, 12, 48, 64, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1]


class Fuzzer:
    """Runs inputs until the time is up, and keeps count."""

    def __init__(self, directory: Path, seconds: float) -> None:
        self.file = directory / "consolidated.00.pth"
        self.end = time.monotonic() + seconds
        self.start = time.monotonic()
        self.accepted = dict.fromkeys(range(4), 0)
        self.refused = dict.fromkeys(range(4), 0)
        self.slowest = 0.0
        self.largest = 0, 0

    def run(self, data: bytes) -> None:
        """One input."""
        if time.monotonic() > self.end:
            self.report()
            shutil.rmtree(self.file.parent)
            os._exit(0)  # libFuzzer would go on
        if not data:
            return
        kind, content = data[0] % 4, data[1:]
        read = read_pth if kind in (ARCHIVE, PROGRAM) else read_safetensors
        write(self.file, kind, content)
        tracemalloc.start()
        start = time.process_time()
        message, tensors = "", None
        try:
            tensors = read(self.file)
        except CheckpointError as error:
            message = str(error)
        seconds = time.process_time() - start
        _, memory = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        size = self.file.stat().st_size
        self.slowest = max(self.slowest, seconds)
        self.largest = max(self.largest, (memory, size))
        assert seconds < SECONDS, f"{seconds:.1f} s"
        assert memory < BYTES + BYTES_PER_BYTE * size, f"{memory} bytes for {size}"
        if tensors is None:
            self.refused[kind] += 1
            assert message.startswith(str(self.file)), message
            assert message.isprintable() and len(message) < 1000, message
        else:
            self.accepted[kind] += 1
            require_inside(tensors)
            if read is read_safetensors:  # whose tensors share nothing
                assert sum(tensor.nbytes for tensor in tensors.values()) < size
            require_equal(tensors, read(epath.Path("gs://bucket") / self.file.name))

    def report(self) -> None:
        """Print what was done."""
        seconds = time.monotonic() - self.start
        num_runs = sum(self.accepted.values()) + sum(self.refused.values())
        print(
            f"{num_runs} inputs in {seconds:.0f} s, {num_runs / seconds:.0f} a second"
        )
        for kind, name in enumerate(("archive", "program", "safetensors", "header")):
            print(
                f"{name}: {self.accepted[kind]} accepted, {self.refused[kind]} refused"
            )
        print(f"slowest input: {self.slowest * 1000:.0f} ms")
        print("largest memory: {} bytes, for a file of {}".format(*self.largest))
        sys.stdout.flush()


def write(file: Path, kind: int, content: bytes) -> None:
    """The file of an input."""
    if kind == PROGRAM:
        file.write_bytes(archive_of(content))
    elif kind == HEADER:
        length = struct.pack("<Q", len(content))
        file.write_bytes(length + content + VALUES.tobytes())
    else:
        file.write_bytes(content)


def archive_of(program: bytes) -> bytes:
    """The archive around a program, which is its last record.

    `write_archive` would do, in many times the time.
    """
    content = OTHERS
    sizes = zlib.crc32(program), len(program), len(program)
    name = b"archive/data.pkl"
    versions, times = (20, 0, 0), (0, 0x21)
    local = struct.pack("<4s5H3I2H", b"PK\3\4", *versions, *times, *sizes, len(name), 0)
    entry = struct.pack(
        "<4s6H3I5H2I",
        *(b"PK\1\2", 20, *versions, *times, *sizes, len(name), 0, 0, 0, 0, 0),
        len(content),
    )
    content += local + name + program
    directory = OTHERS_DIRECTORY + entry + name
    count = 1 + OTHERS_COUNT
    end = struct.pack(
        "<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(directory), len(content), 0
    )
    return content + directory + end


def require_inside(tensors: dict[str, Any]) -> None:
    """Every tensor is a view of the mapped file, and its corners can be read."""
    for name, tensor in tensors.items():
        assert name.isprintable() and isinstance(tensor, np.ndarray), name
        base = tensor
        while not isinstance(base, np.memmap):
            base = base.base
        while isinstance(base.base, np.memmap):
            base = base.base
        if tensor.size:
            low, high = np.lib.array_utils.byte_bounds(tensor)
            first, last = np.lib.array_utils.byte_bounds(base)
            assert first <= low <= high <= last, name
            tensor[(0,) * tensor.ndim].tobytes()
            tensor[(-1,) * tensor.ndim].tobytes()


def require_equal(tensors: dict[str, Any], remote: dict[str, Any]) -> None:
    """What is read from a bucket is what is read from a disk."""
    assert list(tensors) == list(remote)
    for name, tensor in tensors.items():
        assert tensor.shape == remote[name].shape and tensor.dtype == remote[name].dtype
        if tensor.ndim and tensor.size < 1000:
            assert tensor.tobytes() == remote[name][:].tobytes(), name
            assert tensor[1:].tobytes() == remote[name][1:].tobytes(), name


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """An input like another: by its structure, or by libFuzzer's own ideas."""
    chance = random.Random(seed)
    # One kind reaches the lines of another, so libFuzzer would forget it.
    data = chance.choice(SEEDS) if chance.random() < 0.1 else data
    kind, content = (data[0] % 4, data[1:]) if data else (chance.randrange(4), b"")
    match chance.randrange(10):
        case 0 | 1:
            content = atheris.Mutate(content, max_size - 1)
        case 2 | 3 | 4 if kind in (PROGRAM, HEADER):
            content = (some_program if kind == PROGRAM else some_header)(chance)
            if chance.random() < 0.3:
                content = CHANGES[kind](content, chance)
        case _:
            for _ in range(chance.choice([1, 1, 2, 3])):
                content = CHANGES[kind](content, chance)
    return bytes([kind]) + content[: max_size - 1]


def some_program(chance: random.Random) -> bytes:
    """The program of a dict of tensors, most of which are inside their storages."""
    described = {}
    for number in range(chance.randint(1, 3)):
        num_dims = chance.choice([0, 1, 2, 2, 3])
        shape = tuple(chance.choice([0, 1, 1, 2, 2, 3, 7]) for _ in range(num_dims))
        strides = tuple(chance.choice([0, 1, 1, 2, 2, 4, 5]) for _ in range(num_dims))
        dtype, key, num_elements = chance.choice(
            [("Float", 0, 12), ("Byte", 2, 256), ("Long", 2, 32), ("Half", 1, 0)]
        )
        storage = storage_of(np.empty(num_elements, np.float32), key)
        storage = storage.replace(b"Float", dtype.encode())
        tensor = tensor_of(
            storage, chance.choice([0, 0, 0, 1, 3, 5, -1]), shape, strides
        )
        match chance.randrange(8):
            case 0:
                tensor = tensor.replace(b"_v2", b"_v3")[:-2]
                tensor += chance.choice([b"ctorch\nuint16\ntR", b"ctorch\nuint64\ntR"])
            case 1:
                function = b"ctorch._utils\n_rebuild_parameter\n("
                tensor = function + tensor + b"\x88" + HOOKS + b"tR"
        described[f"w{number}"] = tensor
    return pickle_of(described)


def some_header(chance: random.Random) -> bytes:
    """The header of tensors that fill the data, or nearly."""
    cuts = sorted(chance.choice([0, 8, 16, 24, 48, 48]) for _ in range(3))
    header: dict[str, Any] = {}
    for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, 48], strict=True)):
        dtype, width = chance.choice([("F32", 4), ("I64", 8), ("F8_E5M2", 1)])
        size = (stop - start) // width
        shape = chance.choice(
            [[size], [1, size], [size // 2, 2], [] if size == 1 else [size]]
        )
        offsets = [start, stop + chance.choice([0] * 20 + [1])]
        header[f"w{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    items = list(header.items())
    chance.shuffle(items)
    return json.dumps(dict(items)).encode()


def change_program(program: bytes, chance: random.Random) -> bytes:
    """Take, move, repeat or insert instructions."""
    pieces = instructions(program)
    place = chance.randrange(len(pieces) + 1)
    match chance.randrange(5):
        case 0:
            pieces[place : place + chance.randint(1, 3)] = []
        case 1:
            pieces.insert(place, chance.choice(PIECES))
        case 2 if pieces:
            start = chance.randrange(len(pieces))
            part = pieces[start : start + chance.randint(1, 6)]
            pieces[place:place] = part * chance.choice([1, 1, 2, 30])
        case 3 if pieces:
            pieces[place - 1] = chance.choice(PIECES)
        case _ if pieces:
            pieces[place - 1] = atheris.Mutate(pieces[place - 1], 64)
    return b"".join(pieces)


def instructions(program: bytes) -> list[bytes]:
    """A program cut before each instruction, as far as it can be read."""
    cuts = [0]
    try:
        cuts += [place for _, _, place in pickletools.genops(program) if place]
    except Exception:  # it ends where it ends
        pass
    stops = [*cuts[1:], len(program)]
    return [program[a:b] for a, b in zip(cuts, stops, strict=True)]


def change_archive(content: bytes, chance: random.Random) -> bytes:
    """Set a field of a record's header, or of the directory; or cut, or repeat."""
    signatures = [b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"FB"]
    places = [
        content.find(signature, chance.randrange(len(content) + 1))
        for signature in signatures
    ]
    places = [place for place in places if place >= 0] or [0]
    at = chance.choice(places) + chance.randrange(0, 64)
    number = chance.choice([*NUMBERS, len(content), chance.randrange(len(content) + 1)])
    match chance.randrange(6):
        case 0 | 1 | 2:
            width = chance.choice([2, 4, 8])
            field = (number % 2 ** (8 * width)).to_bytes(width, "little")
            return content[:at] + field + content[at + width :]
        case 3:
            return content[:at] + content[at + chance.randint(1, 64) :]
        case 4:
            start = chance.randrange(len(content) + 1)
            return content[:at] + content[start : start + 100] + content[at:]
    return repacked(content, chance)


def repacked(content: bytes, chance: random.Random) -> bytes:
    """An archive's records in a new one, some changed, with right CRCs and offsets."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = [(name, archive.read(name)) for name in archive.namelist()]
    except Exception:  # it was no archive before either
        return content
    if not records:
        return content
    place = chance.randrange(len(records))
    name, record = records[place]
    match chance.randrange(4):
        case 0:
            del records[place]
        case 1:
            records.append((name, record))
        case 2:
            records[place] = name, atheris.Mutate(record, len(record) + 10)
        case 3:
            change = change_program if name.endswith("pkl") else change_header
            records[place] = name, change(record, chance)
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, record in records:
            entry = zipfile.ZipInfo(name)
            if chance.random() < 0.05:
                entry.compress_type = zipfile.ZIP_DEFLATED
            zip64 = chance.random() < 0.1
            with archive.open(entry, "w", force_zip64=zip64) as stream:
                stream.write(record)
    return file.getvalue()


def change_safetensors(content: bytes, chance: random.Random) -> bytes:
    """Change the header, its length with it mostly; or the data."""
    stop = 8 + int.from_bytes(content[:8], "little")
    header, data = content[8:stop], content[stop:]
    match chance.randrange(4):
        case 0:
            length = chance.choice(NUMBERS) + chance.randrange(3)
            return struct.pack("<Q", length % 2**64) + content[8:]
        case 1:
            data = data[: chance.randrange(len(data) + 1)] + chance.choice(STORAGES)
        case _:
            header = change_header(header, chance)
    return struct.pack("<Q", len(header)) + header + data


def change_header(text: bytes, chance: random.Random) -> bytes:
    """Change a value or a key anywhere in the JSON; or its text."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    places = list(slots(header)) if chance.random() < 0.9 else []
    if not places:
        at = chance.randrange(len(text) + 1)
        return text[:at] + chance.choice(TEXTS) + text[at + chance.randrange(3) :]
    container, key = chance.choice(places)
    match chance.randrange(4):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[chance.choice(NAMES)] = container[key]
        case 1:
            container.append(container[key])
        case 2:
            other, name = chance.choice(places)
            container[key] = json.loads(json.dumps(other[name]))
        case 3:
            container[key] = chance.choice(CONSTANTS)
    return json.dumps(header, ensure_ascii=chance.random() < 0.5).encode(
        errors="surrogatepass"
    )


def slots(value: Any) -> list[tuple[Any, Any]]:
    """Every place of a value inside another."""
    found, rest = [], [value]
    while rest:
        value = rest.pop()
        if isinstance(value, dict | list):
            keys = list(value) if isinstance(value, dict) else range(len(value))
            found += [(value, key) for key in keys]
            rest += [value[key] for key in keys]
    return found


def others() -> tuple[bytes, bytes, int]:
    """The records of an archive but for its program, its directory, their number."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/byteorder", b"little")
        for key, storage in enumerate(STORAGES):
            archive.writestr(f"archive/data/{key}", storage)
        stop = archive.start_dir
    return file.getvalue()[:stop], file.getvalue()[stop:-22], 1 + len(STORAGES)


OTHERS, OTHERS_DIRECTORY, OTHERS_COUNT = others()
TENSOR = tensor_of(storage_of(VALUES, 0), 0, (3, 4), (4, 1))
EMPTY = tensor_of(storage_of(VALUES[:0], 1), 0, (0, 4), (4, 1))
BYTE = storage_of(np.empty(256, np.float32), 2).replace(b"FloatS", b"ByteS")
UNTYPED = storage_of(np.empty(256, np.float32), 2).replace(
    b"torch\nFloat", b"torch.storage\nUntyped"
)
TYPED = tensor_of(UNTYPED, 3, (5, 5), (1, 2)).replace(b"_v2", b"_v3")
TYPED = TYPED[:-2] + b"ctorch\nuint16\ntR"
HOOKS = b"ccollections\nOrderedDict\n)R"
PARAMETER = b"ctorch._utils\n_rebuild_parameter\n(" + TENSOR + b"\x88" + HOOKS + b"tR"
STATE = b"}X\x09\x00\x00\x00_metadata" + HOOKS + b"sb"
NESTED = b")" + b"q\x00h\x00\x86" * 40
PIECES = [
    *(TENSOR, EMPTY, BYTE, UNTYPED, TYPED, PARAMETER, HOOKS, STATE, NESTED),
    *instructions(TENSOR + TYPED + PARAMETER + STATE + b"\x94h\x00r\x01\x02\x03\x04."),
    *(b"\x85", b"\x86", b"\x87", b"t", b"(", b"u", b"s", b"}", b")", b"N", b"\x89"),
    *(b"j\x01\x02\x03\x04", b"\x8c\x01w", b"\x8c\x05torch\x8c\x0bLongStorage\x93"),
    *(b"M\xff\xff", b"J\xff\xff\xff\xff", b"\x8a\xff" + b"\x7f" * 255, b"\x8a\x00"),
    *(b"ios\nsystem\n", b"c\\x1b\nx\n", b"\x82\x01", b"0", b"2", b"]", b"a", b"e"),
    *(b"L1" + b"0" * 5000 + b"L\n", b"F1e999\n", b"V\\ud800\n", b"S'\\q'\n", b"P0\n"),
    *(b"\x8b\x01\x00\x00\x00\xff", b"\x8d" + b"\xff" * 8, b"\x95" + bytes(8)),
]
CONSTANTS = [*NUMBERS, -1, True, None, 0.5, 10**400, float("nan"), "", "F32", "\ud800"]
CONSTANTS += [[3, 4], [0, 48], [2**62] * 64, [[[]]], [], {}, {"dtype": "U8"}]
NAMES = ["dtype", "shape", "data_offsets", "__metadata__", "w", "", "\x1b", "\ud800"]
TEXTS = [b"{", b"[", b'"', b",", b"[" * 3000, b"9" * 5000, b"1e999", b"NaN", b"\xff"]
TEXTS += [b"\\ud800", b'"w":{},', b" ", b"\x00", b"{}," * 100, b"\xef\xbb\xbf"]
CHANGES = (change_archive, change_program, change_safetensors, change_header)


def seeds() -> list[bytes]:
    """Good files, and the parts of such, of every kind."""
    tensors = {"w": VALUES.reshape(3, 4), "b": VALUES[:3]}
    program = pickle_of({"w": TENSOR})
    archives = [
        written(write_pth, tensors),
        written(write_pth, tensors, shared_storage=True),
        written(write_archive, program, STORAGES, compression=zipfile.ZIP_DEFLATED),
    ]
    layout = PthLayout({"w": (12,)}, np.dtype(np.float32))
    crc = zlib.crc32(VALUES.tobytes())
    record = layout.before("w") + VALUES.tobytes() + layout.after("w", crc)
    archives.append(layout.head + record + layout.tail({"w": crc}))
    described = (TENSOR, EMPTY, TYPED, PARAMETER, TENSOR.replace(b"Float", b"Int"))
    programs = [pickle_of({"w": value, "v": TENSOR}) for value in described]
    item = b"X\x01\x00\x00\x00w" + TENSOR + b"s"
    programs.append(b"\x80\x02" + HOOKS + item + STATE + b".")
    header, _ = header_of({"w": (2, 4), "b": (4,)}, np.dtype(np.float32))
    whole = {"dtype": "BF16", "shape": [2, 12], "data_offsets": [0, 48]}
    none = {"dtype": "I64", "shape": [0], "data_offsets": [48, 48]}
    headers = [header[8:], json.dumps({"w": whole, "none": none}).encode()]
    files = (archives, programs, [header + VALUES.tobytes()], headers)
    return [bytes([kind]) + content for kind in range(4) for content in files[kind]]


def written(write: Callable[..., None], *arguments: Any, **options: Any) -> bytes:
    """What a function writes to a file."""
    file = io.BytesIO()
    write(file, *arguments, **options)
    return file.getvalue()


SEEDS = seeds()


def fuzz(fuzzer: Fuzzer, directory: Path, options: argparse.Namespace) -> None:
    """Run until the time is up or something is found; does not return."""
    corpus = options.corpus or directory / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(SEEDS):
        (corpus / f"seed{number}").write_bytes(seed)
    arguments = [
        *(sys.argv[0], str(corpus), f"-seed={options.seed}", f"-max_len={LONGEST}"),
        # Above what a run takes even on a busy machine: for what never ends.
        *("-timeout=30", "-rss_limit_mb=2048", "-print_final_stats=1", "-verbosity=0"),
    ]
    atheris.Setup(arguments, fuzzer.run, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Fuzz the readers of tensor files.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--corpus", type=Path, help="where to keep what reaches further"
    )
    parser.add_argument("--replay", type=Path, help="run one input that was found")
    options = parser.parse_args()
    # In memory, where there is such a place: most of the time went into the disk.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        dir=memory if memory.is_dir() else None
    ) as temporary:
        fuzzer = Fuzzer(Path(temporary), 60 * options.minutes)
        with mock_epath(
            open=lambda original, path, mode: open(fuzzer.file, mode),
            stat=lambda original, path: original(fuzzer.file),
        ):
            if options.replay:
                fuzzer.run(options.replay.read_bytes())
                fuzzer.report()
            else:
                fuzz(fuzzer, Path(temporary), options)


if __name__ == "__main__":
    main()
