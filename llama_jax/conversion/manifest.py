"""Digests of a model's weights, the same in every format.

A weight is digested as one matrix, [out, in], with rotary features in halves and rows
in order: the bytes that a safetensors file of Hugging Face's holds, wherever they are
read from. So a model keeps its digests on every way through other formats, as long as
its type stays.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self

import jax.numpy as jnp
import numpy as np
from etils import epath

from llama_jax.config import LlamaConfig
from llama_jax.conversion import layout, names
from llama_jax.errors import CheckpointError

MANIFEST = "conversion.json"
_VERSION = 1


class Checkpoint(Protocol):
    """An opened checkpoint of any format."""

    @property
    def format(self) -> str:
        """Whose files these are: "meta", "hf" or "orbax"."""
        ...

    @property
    def directory(self) -> epath.Path:
        """Where its files are."""
        ...

    @property
    def files(self) -> tuple[epath.Path, ...]:
        """What changes when its weights do."""
        ...

    @property
    def config(self) -> LlamaConfig:
        """The architecture."""
        ...

    @property
    def dtype(self) -> jnp.dtype:
        """Of the weights on disk."""
        ...

    @property
    def tokenizer_path(self) -> epath.Path | None:
        """Its tokenizer, if it has one."""
        ...

    def read(
        self,
        path: str,
        index: tuple[slice, ...] = (),
        *,
        dtype: jnp.dtype | None = None,
    ) -> np.ndarray:
        """One leaf, or a slice of it."""
        ...


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a conversion wrote, beside what it wrote.

    Attributes:
      source: the format that it was converted from.
      format: the format that it is in.
      dtype: of every weight.
      digests: the SHA-256 of each weight, by its Hugging Face name.
    """

    source: str
    format: str
    dtype: str
    digests: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """One digest of all of them: equal for equal weights of one type."""
        lines = (f"{name} {digest}\n" for name, digest in sorted(self.digests.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def write(self, directory: epath.Path) -> None:
        """Write it into a checkpoint's directory."""
        content = {
            "version": _VERSION,
            **dataclasses.asdict(self),
            "fingerprint": self.fingerprint,
        }
        (directory / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self | None:
        """The manifest that came with a checkpoint; None if there is none.

        Raises:
          CheckpointError: it is not one of this project's.
        """
        inside = (
            checkpoint.format == "orbax"
        )  # its arrays have a directory of their own
        directory = checkpoint.directory
        file = (directory.parent if inside else directory) / MANIFEST
        if not file.exists():
            return None
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if content.pop("version") != _VERSION:
                raise ValueError("another version")
            fingerprint = content.pop("fingerprint")
            manifest = cls(**content)
            if manifest.fingerprint != fingerprint:
                raise ValueError("its digests are not those that its fingerprint is of")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{file} is damaged ({error!r:.100}): convert again, or remove it to "
                "use the checkpoint unverified."
            ) from error
        return manifest


def matrices(
    checkpoint: Checkpoint, weight: names.Weight, itemsize: int
) -> Iterator[tuple[int, np.ndarray]]:
    """The first row of each slab of a weight, and the slab: rows of [out, in].

    Args:
      checkpoint: of any format.
      weight: one of its.
      itemsize: bytes of a value where the slabs go, which says how many rows they have.
    """
    sizes = names.axis_sizes(checkpoint.config)
    for start, stop in layout.slabs(weight, sizes, itemsize):
        index = layout.leaf_index(weight, sizes, start, stop)
        block = checkpoint.read(weight.parameter.path, index)
        if weight.layer is not None:
            (block,) = block
        yield start, layout.to_matrix(block, weight)


def digest(checkpoint: Checkpoint, weight: names.Weight) -> str:
    """The SHA-256 of one weight, read anew."""
    found = hashlib.sha256()
    for _, matrix in matrices(checkpoint, weight, checkpoint.dtype.itemsize):
        found.update(as_bytes(matrix))
    return found.hexdigest()


def as_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array in C order."""
    return array.reshape(-1).view(np.uint8).data
