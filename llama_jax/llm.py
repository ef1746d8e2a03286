"""`load`: any checkpoint to an `LLM`: a model, its parameters and its tokenizer."""

from collections.abc import Iterator, Sequence
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float
from numpy.typing import ArrayLike

from llama_jax.build import ShardedLlama, build
from llama_jax.checkpoint.params import save_params
from llama_jax.config import LlamaConfig
from llama_jax.config.sampling import Sampler, TopP
from llama_jax.config.train import ComputeType
from llama_jax.conversion import open_checkpoint
from llama_jax.conversion.proof import require_files
from llama_jax.errors import ConfigError, GenerationError
from llama_jax.generate import Completion, Generator, score
from llama_jax.generate.generator import Prompt
from llama_jax.generate.rows import require_ids
from llama_jax.text import Tokenizer
from llama_jax.text.chat import Message
from sharding import MeshConfig, decoding_rules, hosts, make_mesh
from sharding.axes import Tree

# Those of Meta's examples.
_SAMPLER = TopP(0.9, temperature=0.6)


class LLM:
    """A Llama that answers.

    Args:
      sharded: the model on its mesh, with rules that split no sequence.
      params: its parameters.
      tokenizer: None for a checkpoint without one: prompts are then lists of ids.

    Raises:
      TokenizerError: the tokenizer has ids that the model has no embedding for.
    """

    def __init__(
        self, sharded: ShardedLlama, params: Tree, tokenizer: Tokenizer | None
    ) -> None:
        self._sharded = sharded
        self._params = params
        self._tokenizer = tokenizer
        self._generator = Generator(sharded, params, tokenizer)

    def __repr__(self) -> str:
        return f"LLM({self.config}, {self.tokenizer})"

    @property
    def config(self) -> LlamaConfig:
        """The architecture."""
        return self._sharded.config

    @property
    def params(self) -> Tree:
        """The parameters: `Llama(config).apply({"params": llm.params}, ...)`."""
        return self._params

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, if the model has one."""
        return self._tokenizer

    def logits(self, tokens: ArrayLike) -> Float[np.ndarray, "B T V"]:
        """Logits of the token after each, float32, for rows of ids, int[B, T].

        Raises:
          GenerationError: no rows of equal length, ids that are none, or rows longer
            than the context.
        """
        return score.logits(self._sharded, self._params, self._rows(tokens, least=1))

    def loss(self, tokens: ArrayLike) -> float:
        """The mean cross-entropy, in nats, of every token of int[B, T] but each first.

        Raises:
          GenerationError: as `logits`; or rows of one token, which predict nothing.
        """
        rows = self._rows(tokens, least=2)
        return -float(np.mean(score.token_logprobs(self._sharded, self._params, rows)))

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        sampler: Sampler = _SAMPLER,
        seed: int = 0,
        echo: bool = False,
    ) -> list[Completion]:
        """Continue each prompt, all at once: see `Generator.generate`."""
        return self._generator.generate(
            prompts,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            seed=seed,
            echo=echo,
        )

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        sampler: Sampler = _SAMPLER,
        seed: int = 0,
    ) -> Iterator[str]:
        """Yield the text of one completion as it comes: see `Generator.stream`."""
        return self._generator.stream(
            prompt, max_new_tokens=max_new_tokens, sampler=sampler, seed=seed
        )

    def chat(
        self,
        dialog: Sequence[Message],
        *,
        max_new_tokens: int = 512,
        sampler: Sampler = _SAMPLER,
        seed: int = 0,
    ) -> Completion:
        """Answer the last question of a dialog: see `Generator.chat`."""
        return self._generator.chat(
            dialog, max_new_tokens=max_new_tokens, sampler=sampler, seed=seed
        )

    def save(self, path: epath.PathLike) -> None:
        """Write parameters and tokenizer, for `load`: see `checkpoint/params.py`.

        Raises:
          CheckpointError: the directory is not empty, or cannot be written.
        """
        save_params(path, self.params, self.config, self.tokenizer)

    def _rows(self, tokens: ArrayLike, *, least: int) -> list[list[int]]:
        try:
            given = list(np.asarray(tokens))
        except (ValueError, TypeError):  # rows of several lengths, or no rows at all
            given = list[np.ndarray]()
        rows = [
            require_ids(ids, name=f"tokens[{i}]", vocab_size=self.config.vocab_size)
            for i, ids in enumerate(given)
        ]
        max_length = self.config.max_length
        if not rows or not least <= len(rows[0]) <= max_length:
            raise GenerationError(
                f"tokens is {tokens!r:.60}: give at least one row, all of one length, "
                f"of {least} to {max_length} ids (max_length, which loading can raise)."
            )
        return rows


def load(
    path: epath.PathLike,
    *,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    max_length: int = 4096,
    tokenizer: epath.PathLike | Tokenizer | None = None,
) -> LLM:
    """Load any checkpoint: Meta's directory, or one that this project wrote.

    Each device gets only its own part of the parameters.

    Args:
      path: a directory of Meta's or of Hugging Face's, what `LLM.save` wrote, or the
        work directory of a run.
      dtype: of parameters and arithmetic, "float32" or "bfloat16"; None takes that of
        the files, and bfloat16 where they are float16, which no TPU multiplies.
      mesh: the devices; None takes the first one. See `sharding.make_mesh`.
      max_length: the context in tokens, where the files do not say.
      tokenizer: where the tokenizer is, if not beside the weights.

    Raises:
      CheckpointError: it is no checkpoint that is known, or is damaged.
      TokenizerError: the tokenizer is missing where it was said to be, or does not fit.
      ShardingError: the mesh does not divide the model, or another host cannot load it.
    """
    hosts.cache_compilations()
    with hosts.failing_together():
        source = open_checkpoint(path, max_length=max_length)
    require_files(source)
    if dtype is None:
        dtype = "bfloat16" if source.dtype == jnp.float16 else str(source.dtype)
    elif dtype not in get_args(ComputeType):
        raise ConfigError(f"dtype {dtype!r}: give one of {get_args(ComputeType)}.")
    if mesh is None:
        mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    sharded = build(source.config, mesh, decoding_rules(), dtype=dtype, remat="none")
    if tokenizer is None:
        tokenizer = source.tokenizer_path
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer(tokenizer)
    with hosts.failing_together():
        params = source.load(sharded.param_shardings, dtype=jnp.dtype(dtype))
    return LLM(sharded, params, tokenizer)
