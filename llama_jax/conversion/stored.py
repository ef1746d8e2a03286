"""Parameters in tensor files, of Meta's kind or Hugging Face's: read part by part.

What the two have in common. `meta.py` and `hf.py` open a directory and see to it that
it is whole; what is here gathers a leaf, or the slice of it that one device needs, from
the tensors of each shard, and reads no more of the files than that.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from etils import epath

from llama_jax.checkpoint.params import load_leaves
from llama_jax.checkpoint.values import all_finite
from llama_jax.config import LlamaConfig
from llama_jax.config.model import Head
from llama_jax.conversion import names, rope
from llama_jax.conversion.files import Tensor, is_remote
from llama_jax.conversion.layout import to_leaf, to_matrix
from llama_jax.errors import CheckpointError
from llama_jax.model.count import abstract_params
from sharding.axes import Tree

_log = logging.getLogger(__name__)

Shard = Mapping[str, Tensor]
Format = Literal["meta", "hf"]
_OWNERS = {"meta": "Meta's", "hf": "Hugging Face's"}
FLOATS = tuple(jnp.dtype(name) for name in ("float32", "float16", "bfloat16"))


class TensorCheckpoint:
    """Parameters in this project's layout, unread until asked.

    Attributes:
      head: what the model ends with: both programs' formats are of models that write.
      format: "meta" or "hf".
      directory: where the files are.
      files: those that hold weights, in order.
      config: the architecture.
      tokenizer_path: `tokenizer.model`, if it is there.
      dtype: of the parameters: the type on disk, or the widest of several.
      shards: of each model-parallel shard, its tensors by name; "hf" has one.
      shapes: of every leaf, by its path ("blocks/attention/query").
    """

    head: Head = "unembed"

    def __init__(
        self,
        format: Format,
        directory: epath.Path,
        files: Sequence[epath.Path],
        config: LlamaConfig,
        tokenizer_path: epath.Path | None,
        shards: Sequence[Shard],
    ) -> None:
        self.format = format
        self.directory = directory
        self.files = tuple(files)
        self.config = config
        self.tokenizer_path = tokenizer_path
        self.shards = tuple(shards)
        self.dtype = self._widest_dtype()
        self._not_finite: set[tuple[str, int]] = set()
        self._sizes = names.axis_sizes(config)
        self._parameters = {p.path: p for p in names.PARAMETERS}
        self.shapes = {
            path: tuple(self._sizes[axis] for axis in parameter.axes)
            for path, parameter in self._parameters.items()
        }

    @property
    def owner(self) -> str:
        """Whose format it is, for messages."""
        return _OWNERS[self.format]

    def form(self, parameter: names.Parameter) -> names.Stored:
        """How these files hold a parameter."""
        return parameter.meta if self.format == "meta" else parameter.hf

    def read(
        self,
        path: str,
        index: tuple[slice, ...] = (),
        *,
        dtype: jnp.dtype | None = None,
    ) -> np.ndarray:
        """One leaf, or a slice of it.

        Reads no more of the files than that. One layer may be a view of mapped bytes,
        in any order of memory. Values that are not finite are logged as a
        warning, once, with the name of the tensor.

        Args:
          path: of the leaf, as in `shapes`.
          index: a slice with step 1 for each leading axis; the rest are whole.
          dtype: of the result, if not that of the files.
        """
        dtype = self.dtype if dtype is None else dtype
        parameter = self._parameters[path]
        form = self.form(parameter)
        wanted = {axis: range(self._sizes[axis]) for axis in parameter.axes}
        for axis, part in zip(parameter.axes, index, strict=False):
            wanted[axis] = wanted[axis][part]
        assert all(part.step == 1 for part in wanted.values()), index
        if "L" not in wanted:
            weight = names.Weight(parameter)
            return self._gather(weight, form, wanted).astype(dtype, copy=False)
        layers = [names.Weight(parameter, layer) for layer in wanted.pop("L")]
        if len(layers) == 1:
            block = self._gather(layers[0], form, wanted)[None]
            return block.astype(dtype, copy=False)
        leaf = np.empty([len(layers), *map(len, wanted.values())], dtype)
        for place, weight in zip(leaf, layers, strict=True):
            block = self._gather(weight, form, wanted)
            place[...] = to_leaf(to_matrix(block, weight), weight, block.shape)
        return leaf

    def load(self, shardings: Tree, *, dtype: jnp.dtype) -> Tree:
        """All parameters, each host reading only what its devices hold."""
        return load_leaves(
            self.read, abstract_params(self.config), shardings, dtype=dtype
        )

    def _widest_dtype(self) -> jnp.dtype:
        found = {tensor.dtype for shard in self.shards for tensor in shard.values()}
        if not found:  # of what is being written to a bucket, nothing is there yet
            return FLOATS[0]
        widest = jnp.dtype(jnp.result_type(*found))
        if len(found) > 1:
            _log.warning(
                "%s mixes %s; read as %s, which holds each exactly.",
                self.directory,
                ", ".join(sorted(map(str, found))),
                widest,
            )
        return widest

    def _gather(
        self, weight: names.Weight, form: names.Stored, wanted: Mapping[str, range]
    ) -> np.ndarray:
        """The wanted part of one tensor, in the leaf's order, from the shards' shares.

        A view of the file, unless shards have to be joined or features reordered.
        """
        name = weight.stored_name(form)
        sizes = shard_sizes(self._sizes, form, len(self.shards))
        blocks = []
        for number, shard in enumerate(self.shards if form.split else self.shards[:1]):
            local = dict(wanted)
            if form.split:
                share, part = sizes[form.split], wanted[form.split]
                first = max(part.start, number * share)
                last = min(part.stop, (number + 1) * share)
                if first >= last:
                    continue
                local[form.split] = range(first - number * share, last - number * share)
            block = _block(shard[name], form, sizes, local)
            self._warn_unless_finite(block, name, number)
            blocks.append(block)
        if not blocks:  # nothing was asked for
            shape = [len(wanted[axis]) for axis in form.axes]
            blocks.append(np.empty(shape, self.dtype))
        joined = (
            blocks[0]
            if len(blocks) == 1
            else np.concatenate(blocks, axis=form.axes.index(form.split or ""))
        )
        return joined.transpose([form.axes.index(axis) for axis in weight.axes])

    def _warn_unless_finite(self, block: np.ndarray, name: str, number: int) -> None:
        if (name, number) in self._not_finite or all_finite(block):
            return
        self._not_finite.add((name, number))
        of_file = f" of {self.files[number].name}" if len(self.shards) > 1 else ""
        _log.warning("%s: NaN or infinity in %s%s.", self.directory, name, of_file)


def _block(
    tensor: Tensor,
    form: names.Stored,
    sizes: Mapping[str, int],
    wanted: Mapping[str, range],
) -> np.ndarray:
    """A part of one file's tensor, its dimensions unfolded into axes.

    Only the rows that are needed are touched.
    """
    first, *rest = form.dims.split()
    rows_per_step = int(np.prod([sizes[axis] for axis in first[1:]], dtype=int))
    outer = wanted[first[0]]
    rows = tensor[outer.start * rows_per_step : outer.stop * rows_per_step]
    unfolded = rows.reshape(
        [len(outer), *(sizes[axis] for axis in first[1:] + "".join(rest))]
    )
    index: list[Any] = [slice(None)]
    index += [slice(wanted[a].start, wanted[a].stop) for a in form.axes[1:]]
    if form.interleaved:
        place = form.axes.index("H")
        index[place] = rope.half_split_order(sizes["H"])[index[place]]
    return unfolded[tuple(index)]


def shard_sizes(
    sizes: Mapping[str, int], form: names.Stored, num_shards: int
) -> dict[str, int]:
    """The sizes of the axes in one shard's share of a parameter."""
    if form.split is None:
        return dict(sizes)
    return {**sizes, form.split: sizes[form.split] // num_shards}


def require_tensors(
    config: LlamaConfig, format: Format, shard: Shard, where: object, num_shards: int
) -> None:
    """See to it that a shard holds its share of every parameter, and no more.

    Raises:
      CheckpointError: a tensor is missing, superfluous, or of another shape or a type
        that is no weight's.
    """
    sizes = names.axis_sizes(config)
    expected: dict[str, names.Stored] = {}
    for weight in names.weights(config):
        form = weight.parameter.meta if format == "meta" else weight.parameter.hf
        expected[weight.stored_name(form)] = form
    described = "params.json" if format == "meta" else "config.json"
    if missing := expected.keys() - shard.keys():
        raise CheckpointError(
            f"{where} lacks {listed(missing)}: {described} describes a larger model, "
            "or the file is not the whole of its shard."
        )
    if extra := shard.keys() - expected.keys():
        raise CheckpointError(
            f"{where} has {listed(extra)}, which no Llama of these sizes has: "
            f"{described} is another model's, or this is an adapted Llama that would "
            "load wrongly."
        )
    for name, form in expected.items():
        tensor = shard[name]
        shape = form.shape(shard_sizes(sizes, form, num_shards))
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, but by {described} "
                f"one of {num_shards} shards has {shape}. Copy all the files of one "
                "model."
            )
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{where}: {name} is {tensor.dtype}; weights are "
                f"{', '.join(map(str, FLOATS))}. Quantised models have to be restored "
                "to one of these first."
            )


def without_derived(where: object, tensors: Shard, derived: Iterable[str]) -> Shard:
    """The tensors without those that the model computes for itself; said, if any."""
    left_out = sorted(derived)
    if left_out:
        _log.info("%s: ignored %s, computed anew.", where, listed(left_out))
    return {name: tensors[name] for name in tensors if name not in left_out}


def listed(tensors: Iterable[str]) -> str:
    """The first names, and how many more: a whole model's are hundreds."""
    ordered = sorted(tensors)
    more = f" and {len(ordered) - 8} more" if len(ordered) > 8 else ""
    return ", ".join(ordered[:8]) + more


def find_tokenizer(directory: epath.Path) -> epath.Path | None:
    """`tokenizer.model`, here or, as Meta's download script leaves it, one level up."""
    above = directory if is_remote(directory) else directory.resolve()
    for place in (directory, above.parent):
        if (place / "tokenizer.model").is_file():
            return place / "tokenizer.model"
    return None
