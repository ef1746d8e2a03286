"""`load`: any checkpoint to an `LLM`: a model, its parameters and its tokenizer."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float
from numpy.typing import ArrayLike

from llama_jax.build import build
from llama_jax.checkpoint.params import save_params
from llama_jax.config import LlamaConfig
from llama_jax.config.sampling import Penalties, Sampler
from llama_jax.config.train import ComputeType
from llama_jax.conversion import open_checkpoint
from llama_jax.conversion.proof import require_files
from llama_jax.errors import ConfigError, GenerationError
from llama_jax.generate import (
    Chat,
    Completion,
    Engine,
    Generator,
    Settings,
    score,
)
from llama_jax.generate.engine import require_slots
from llama_jax.generate.generator import Prompt
from llama_jax.generate.rows import require_ids
from llama_jax.generate.settings import DEFAULT_SAMPLER, Allowed
from llama_jax.generate.weights import from_checkpoint, to_params
from llama_jax.progress import bytes_progress
from llama_jax.text import Tokenizer
from llama_jax.text.chat import Message
from sharding import MeshConfig, decoding_rules, hosts, make_mesh
from sharding.axes import Tree


class LLM:
    """A Llama that answers.

    Args:
      engine: the model, its weights and its mesh, with rules that split no sequence.
      tokenizer: None for a checkpoint without one: prompts are then lists of ids.

    Attributes:
      engine: what runs it, for those who work with ids and programs.

    Raises:
      TokenizerError: the tokenizer has ids that the model has no embedding for.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self.engine = engine
        self._generator = Generator(engine, tokenizer)

    def __repr__(self) -> str:
        return f"LLM({self.config}, {self.tokenizer})"

    @property
    def config(self) -> LlamaConfig:
        """The architecture."""
        return self.engine.sharded.config

    @functools.cached_property
    def params(self) -> Tree:
        """The parameters: `Llama(config).apply({"params": llm.params}, ...)`.

        Made when they are first asked for, since generation has the weights in another
        form (`model/decoder.py`), and kept from then on beside it. Of int8 weights,
        what those stand for.
        """
        return to_params(self.engine.sharded, self.engine.weights)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, if the model has one."""
        return self._generator.tokenizer

    def logits(self, tokens: ArrayLike) -> Float[np.ndarray, "B T V"]:
        """Logits of the token after each, float32, for rows of ids, int[B, T].

        Raises:
          GenerationError: no rows of equal length, ids that are none, or rows longer
            than the context.
        """
        return score.logits(self.engine, self._rows(tokens, least=1))

    def loss(self, tokens: ArrayLike) -> float:
        """The mean cross-entropy, in nats, of every token of int[B, T] but each first.

        Raises:
          GenerationError: as `logits`; or rows of one token, which predict nothing.
        """
        rows = self._rows(tokens, least=2)
        return -float(np.mean(score.token_logprobs(self.engine, rows)))

    def attention(self, tokens: ArrayLike) -> Float[np.ndarray, "L N T T"]:
        """How much each token of a row of ids, int[T], attends to each before it.

        Probabilities by layer and query head, from the position that looks to the one
        that is looked at. Rows longer than a few hundred tokens take much memory.

        Raises:
          GenerationError: as `logits`.
        """
        (row,) = self._rows(np.asarray(tokens)[None], least=1)
        return score.attention(self.engine, row)

    def strongest_attention(self, tokens: ArrayLike) -> Float[np.ndarray, "T T"]:
        """The highest `attention` of all layers and heads: all of it that is read back.

        Before that, `attention` may be on the devices whole.

        Raises:
          GenerationError: as `logits`.
        """
        (row,) = self._rows(np.asarray(tokens)[None], least=1)
        return score.strongest_attention(self.engine, row)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        sampler: Sampler = DEFAULT_SAMPLER,
        seed: int | Sequence[int] = 0,
        num_samples: int = 1,
        penalties: Penalties | None = None,
        stop: Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        allowed: Allowed | None = None,
        echo: bool = False,
    ) -> list[Completion]:
        """Continue each prompt, all at once: see `Generator.generate`, `Settings`."""
        settings = Settings(
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            seed=seed,
            penalties=penalties,
            stop=stop,
            stop_tokens=stop_tokens,
            allowed=allowed,
        )
        return self._generator.generate(
            prompts, settings, num_samples=num_samples, echo=echo
        )

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        sampler: Sampler = DEFAULT_SAMPLER,
        seed: int = 0,
        penalties: Penalties | None = None,
        stop: Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        allowed: Allowed | None = None,
    ) -> Iterator[str]:
        """Yield the text of one completion as it comes: see `Generator.stream`."""
        settings = Settings(
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            seed=seed,
            penalties=penalties,
            stop=stop,
            stop_tokens=stop_tokens,
            allowed=allowed,
        )
        return self._generator.stream(prompt, settings)

    def chat(
        self,
        dialog: Sequence[Message],
        *,
        max_new_tokens: int = 512,
        sampler: Sampler = DEFAULT_SAMPLER,
        seed: int = 0,
        penalties: Penalties | None = None,
    ) -> Completion:
        """Answer the last question of a dialog: see `Generator.chat`."""
        settings = Settings(
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            seed=seed,
            penalties=penalties,
        )
        return self._generator.chat(dialog, settings)

    def start_chat(
        self,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        sampler: Sampler = DEFAULT_SAMPLER,
        seed: int = 0,
        penalties: Penalties | None = None,
    ) -> Chat:
        """Begin a conversation, which keeps its cache between turns: see `Chat`.

        Raises:
          GenerationError: the model has no tokenizer; a setting that is none.
        """
        settings = Settings(
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            seed=seed,
            penalties=penalties,
        )
        return Chat(self._generator, system=system, settings=settings)

    def warm_up(
        self,
        *,
        batch: int = 1,
        sampler: Sampler = DEFAULT_SAMPLER,
        watch: Callable[[str, float], None] | None = None,
    ) -> dict[str, float]:
        """Compile, or load from the cache, all that `batch` prompts can need.

        Args:
          batch: prompts at a time.
          sampler: of the kind that will be used.
          watch: told each program and the seconds it took; by default prints them.

        Returns:
          Seconds by program.
        """
        return self._generator.warm_up(batch, sampler, watch or _print_program)

    def save(self, path: epath.PathLike) -> None:
        """Write parameters and tokenizer, for `load`: see `checkpoint/params.py`.

        Raises:
          CheckpointError: the directory is not empty, or cannot be written.
          GenerationError: the weights are int8, which are not those of the checkpoint.
        """
        if self.engine.is_int8:
            raise GenerationError(
                "These weights were rounded to int8 when they were loaded: load the "
                'checkpoint without weights="int8", and save that, or copy its files.'
            )
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
    cache_length: int | None = None,
    cache: str | None = None,
    weights: str | None = None,
) -> LLM:
    """Load any checkpoint: Meta's directory, or one that this project wrote.

    Each device gets only its own part of the weights, layer by layer. A bar on a
    terminal, and elsewhere a line every ten seconds, show how far it is and how fast.

    Args:
      path: a directory of Meta's or of Hugging Face's, what `LLM.save` wrote, or the
        work directory of a run.
      dtype: of weights and arithmetic, "float32" or "bfloat16"; None takes that of
        the files, and bfloat16 where they are float16, which no TPU multiplies.
      mesh: the devices; None takes the first one. See `sharding.make_mesh`.
      max_length: the context in tokens, where the files do not say.
      tokenizer: where the tokenizer is, if not beside the weights.
      cache_length: positions that a row has room for, prompt and answer; None is the
        whole context. Memory for all of them is taken at the first request.
      cache: "int8" keeps keys and values in half the memory of bfloat16, or less.
      weights: "int8" does so with all matrices, which are then read faster. What both
        cost in quality: docs/generation.md.

    Raises:
      CheckpointError: it is no checkpoint that is known, or is damaged.
      ConfigError: a type that is not offered.
      GenerationError: `cache_length` is not within the context.
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
    for name, given in (("cache", cache), ("weights", weights)):
        if given not in (None, "int8"):
            raise ConfigError(f'{name} {given!r}: give "int8", or None for {dtype}.')
    if mesh is None:
        mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    sharded = build(source.config, mesh, decoding_rules(), dtype=dtype, remat="none")
    if tokenizer is None:
        tokenizer = source.tokenizer_path
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer(tokenizer)
    slots = require_slots(cache_length, source.config.max_length)
    with hosts.failing_together(), bytes_progress() as watch:
        loaded = from_checkpoint(
            sharded,
            source.read,
            dtype=jnp.dtype(dtype),
            int8=weights == "int8",
            watch=functools.partial(watch, "load"),
        )
    engine = Engine(sharded, loaded, slots=slots, cache_dtype=cache)
    return LLM(engine, tokenizer)


def _print_program(name: str, seconds: float) -> None:
    print(f"{name}: {seconds:.1f} s", flush=True)
