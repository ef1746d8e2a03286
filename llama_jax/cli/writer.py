"""The options that `generate` and `chat` share: which model writes, and how."""

import dataclasses
import sys
from typing import Literal

import jax
import tyro

import llama_jax
from llama_jax.config.sampling import MinP, Penalties, Sampler, TopK, TopP
from llama_jax.conversion import open_checkpoint
from llama_jax.errors import ConfigError
from llama_jax.generate import Settings
from llama_jax.llm import LLM
from llama_jax.model import num_params
from sharding import MeshConfig, make_mesh

_TOP_P = 0.9
# What moves a terminal's cursor, or worse: all but tab and newline.
_CONTROLS = {
    code: f"\\x{code:02x}"
    for code in (*range(32), *range(127, 160))
    if chr(code) not in "\t\n"
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writer:
    """A model that writes.

    Attributes:
      checkpoint: a directory of Meta's or of Hugging Face's, what `save` wrote, or the
        work directory of a run.
      max_new_tokens: tokens of each answer, at most.
      temperature: 0 always takes the likeliest token.
      top_k: draw among so many of the likeliest tokens.
      top_p: draw among the likeliest tokens that together have this probability; 0.9,
        if none of top-k, top-p and min-p is given.
      min_p: draw among the tokens of at least this share of the highest probability.
      repetition_penalty: above 1 repeats less of prompt and answer.
      presence_penalty: above 0 repeats fewer tokens of the answer.
      frequency_penalty: above 0 repeats them less often.
      seed: the same seed writes the same text.
      stop: texts before which an answer ends.
      dtype: float32 or bfloat16; that of the files, if not given.
      weights: int8 keeps all matrices in eight bits, and reads them faster.
      cache: int8 keeps keys and values in eight bits.
      cache_length: tokens of prompt and answer together; the context, if not given.
      tensor: devices that each layer is split over.
      tokenizer: tokenizer.model, if it is not beside the weights.
      max_length: the context in tokens, where the files do not say.
      dry_run: say what would be loaded, and stop.
    """

    checkpoint: tyro.conf.Positional[str]
    max_new_tokens: int = 128
    temperature: float = 0.6
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = Penalties.repetition
    presence_penalty: float = Penalties.presence
    frequency_penalty: float = Penalties.frequency
    seed: int = 0
    stop: tuple[str, ...] = ()
    dtype: str | None = None
    weights: Literal["int8"] | None = None
    cache: Literal["int8"] | None = None
    cache_length: int | None = None
    tensor: int = 1
    tokenizer: str | None = None
    max_length: int = 4096
    dry_run: bool = False

    def settings(self) -> Settings:
        """How to write, checked before a model is loaded, which may take long.

        Raises:
          ConfigError: more than one of top-k, top-p and min-p; a value that is none.
          GenerationError: likewise.
        """
        return Settings(
            max_new_tokens=self.max_new_tokens,
            sampler=self._sampler(),
            seed=self.seed,
            penalties=Penalties(
                repetition=self.repetition_penalty,
                presence=self.presence_penalty,
                frequency=self.frequency_penalty,
            ),
            stop=self.stop,
        )

    def load(self) -> LLM:
        """The model; see `llama_jax.load` for what it raises."""
        mesh = MeshConfig(fsdp=1, tensor=self.tensor)
        return llama_jax.load(
            self.checkpoint,
            mesh=make_mesh(mesh, jax.devices()[: self.tensor]),
            dtype=self.dtype,
            weights=self.weights,
            cache=self.cache,
            cache_length=self.cache_length,
            max_length=self.max_length,
            tokenizer=self.tokenizer,
        )

    def summary(self) -> str:
        """What would be loaded, for a dry run."""
        source = open_checkpoint(self.checkpoint, max_length=self.max_length)
        return (
            f"{self.checkpoint}: {num_params(source.config):,} parameters, "
            f"{source.dtype}"
        )

    def _sampler(self) -> Sampler:
        given = (self.top_k, self.top_p, self.min_p)
        if sum(value is not None for value in given) > 1:
            raise ConfigError(
                "--top-k, --top-p and --min-p each choose the tokens to draw from: "
                "give one of them."
            )
        if self.top_k is not None:
            return TopK(self.top_k, temperature=self.temperature)
        if self.min_p is not None:
            return MinP(self.min_p, temperature=self.temperature)
        top_p = _TOP_P if self.top_p is None else self.top_p
        return TopP(top_p, temperature=self.temperature)


def show(text: str) -> None:
    """Write what a model wrote, at once; to a terminal, nothing that commands it."""
    sys.stdout.write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()
