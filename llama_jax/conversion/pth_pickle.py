"""The pickle of a `.pth` file, run by a machine that can do nothing else.

A pickle is a program for a stack machine that may import and call anything. Here is
that machine with the instructions of a tensor file alone: a "global" is no more than
its name, and a "call" makes a dict or a view of mapped bytes, or is refused.

A file may have been made to do harm. What an instruction is given is checked for its
type before it is used: a tuple of the same tuple twice, of the same tuple twice and so
on, takes a few bytes a level and all the time there is to print, hash or compare.
"""

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.conversion.files import Bytes, RemoteBytes, RemoteTensor, Tensor

STORAGES = {
    "torch DoubleStorage": np.dtype(np.float64),
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch ComplexDoubleStorage": np.dtype(np.complex128),
    "torch ComplexFloatStorage": np.dtype(np.complex64),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
    "torch.storage UntypedStorage": np.dtype(np.uint8),
}
# The types that came too late to have a storage of their own.
_DTYPES = {
    "torch uint16": np.dtype(np.uint16),
    "torch uint32": np.dtype(np.uint32),
    "torch uint64": np.dtype(np.uint64),
    "torch float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "torch float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "torch float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "torch float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
# What `_call` knows.
_CALLS = {
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
}
_GLOBALS = frozenset({*STORAGES, *_DTYPES, *_CALLS})

_MAX_DIMS = 64  # NumPy's


class Global(str):
    """The name of a Python object, module and name: no text in the pickle is one."""


class Storage(NamedTuple):
    """The bytes that tensors are views of, and what they mean."""

    memory: Bytes
    dtype: np.dtype[Any]


class Refused(Exception):
    """An instruction that a file of tensors does not need."""


def run(program: bytes, load_storage: Callable[[Any], Storage]) -> Any:
    """What the pickle describes, by the few instructions that tensor files use."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[object, Any] = {}

    def pop(start: int) -> list[Any]:
        if not 0 <= start <= len(stack):
            raise IndexError("an instruction takes more than there is")
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
                stack.append(tuple(pop(len(stack) - int(opcode.name[-1]))))
            case "SETITEM" | "SETITEMS":
                single = opcode.name == "SETITEM"
                items = pop(len(stack) - 2 if single else marks.pop())
                _set_items(stack[-1], items[::2], items[1::2])
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_known_global(str(argument)))
            case "STACK_GLOBAL":
                stack.append(_known_global(" ".join(pop(len(stack) - 2))))
            case "REDUCE":
                stack.append(_call(*pop(len(stack) - 2)))
            case "BINPERSID":
                stack.append(load_storage(stack.pop()))
            case "BUILD":
                # A `state_dict()` carries `_metadata`, of no use here, as the state
                # of an ordered dict. Nothing else in such a file has state.
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise Refused("an object with a state")
            case name:
                detail = f" ({shown(argument)})" if isinstance(argument, str) else ""
                raise Refused(f"the pickle instruction {name}{detail}")
    raise AssertionError("genops ends at STOP or raises")


def shown(text: str) -> str:
    """Text from the file as it may be printed."""
    return ascii(text[:80])[1:-1]


def _set_items(target: Any, keys: list[Any], values: list[Any]) -> None:
    # Printable, so that every later message may show it.
    if not all(isinstance(key, str) and key.isprintable() for key in keys):
        raise Refused("a dict with keys that are no names")
    if not isinstance(target, dict):
        raise TypeError("an item is set in what is no dict")
    target.update(zip(keys, values, strict=True))


def _known_global(name: str) -> Global:
    if name not in _GLOBALS:
        raise Refused(f"the Python object {shown(name.replace(' ', '.'))}")
    return Global(name)


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise Refused("a call of what makes no tensor")
    match function, arguments:
        case "collections OrderedDict", ():
            return dict[str, Any]()
        case (
            "torch._utils _rebuild_parameter"
            | "torch._utils _rebuild_parameter_with_state",
            (tensor, *_),
        ) if is_tensor(tensor):
            return tensor
        case (
            "torch._utils _rebuild_tensor_v2",
            (Storage(memory, dtype), offset, shape, strides, _, _),
        ):
            return _view(memory, dtype, offset, shape, strides)
        case (
            "torch._utils _rebuild_tensor_v3",
            (Storage(memory), offset, shape, strides, _, _, Global() as name),
        ) if name in _DTYPES:
            return _view(memory, _DTYPES[name], offset, shape, strides)
        case _, (Storage(), _, _, _, _, _, *_, dict()):
            raise Refused("a tensor that is the conjugate or negative of its bytes")
    if function.startswith("torch._utils "):
        raise TypeError(f"the arguments of {function.split()[1]}")
    raise Refused("a call of what makes no tensor")


def _view(
    memory: Bytes, dtype: np.dtype[Any], offset: Any, shape: Any, strides: Any
) -> Tensor:
    """A tensor by its place in a storage, in elements."""
    if not (_are_sizes((offset,)) and _are_sizes(shape) and _are_sizes(strides)):
        raise ValueError("a tensor whose place is not given in whole numbers")
    if len(shape) != len(strides):
        raise ValueError(f"a tensor of {len(shape)} sizes and {len(strides)} strides")
    start = offset * dtype.itemsize
    steps = tuple(stride * dtype.itemsize for stride in strides)
    if start + _extent(shape, steps, dtype) > memory.size:
        raise ValueError("a tensor reaches beyond its storage")
    if isinstance(memory, np.ndarray):
        return np.ndarray(shape, dtype, memory, start, steps)
    if _are_contiguous(shape, steps, dtype):
        return RemoteTensor(memory, start, shape, dtype)
    return _RemoteView(memory, start, shape, dtype, steps)


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) <= _MAX_DIMS
        and all(type(value) is int and value >= 0 for value in values)
    )


def _extent(
    shape: tuple[int, ...], steps: tuple[int, ...], dtype: np.dtype[Any]
) -> int:
    """The bytes from a view's first to its last."""
    if 0 in shape:
        return 0
    last = sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
    return last + dtype.itemsize


def _are_contiguous(
    shape: tuple[int, ...], steps: tuple[int, ...], dtype: np.dtype[Any]
) -> bool:
    expected = dtype.itemsize
    for size, step in zip(reversed(shape), reversed(steps), strict=True):
        if size > 1 and step != expected:
            return False
        expected *= size
    return True


class _RemoteView(RemoteTensor):
    """Rows with gaps in a bucket's object, read when they are indexed."""

    def __init__(
        self,
        memory: RemoteBytes,
        start: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        steps: tuple[int, ...],
    ) -> None:
        super().__init__(memory, start, shape, dtype)
        self._steps = steps

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        shape = (max(0, stop - start), *self.shape[1:])
        first = self._start + start * self._steps[0]
        last = first + _extent(shape, self._steps, self.dtype)
        return np.ndarray(shape, self.dtype, self._memory[first:last], 0, self._steps)


def is_tensor(value: Any) -> bool:
    """Whether the machine made it of a storage."""
    return isinstance(value, np.ndarray | RemoteTensor)
