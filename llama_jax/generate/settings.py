"""What a request asks for beside its prompts, checked before anything runs."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool
from numpy.typing import ArrayLike

from llama_jax.config.sampling import Penalties, Sampler, TopP
from llama_jax.errors import GenerationError
from llama_jax.generate.rows import require_ids

# That of Meta's examples.
DEFAULT_SAMPLER = TopP(0.9, temperature=0.6)

# From the ids written so far to those that may come next: ids, or bool[V].
Allowed = Callable[[list[int]], ArrayLike]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How answers are written.

    Attributes:
      max_new_tokens: the most to write after each prompt, EOS included. The context is
        a limit too: a row that reaches it ends there, with the finish reason "length".
      sampler: how tokens are chosen.
      seed: the same seed, the same text; or one for each prompt.
      penalties: what makes tokens that were there before less probable.
      stop: texts before which an answer ends, wherever tokens begin and end.
      stop_tokens: ids that end an answer, beside EOS.
      allowed: of the ids written so far after a prompt, those that may come next, as
        ids or as bool[V]. Asked on the host for every token of every row.

    Raises:
      GenerationError: a value that is none of these.
    """

    max_new_tokens: int
    sampler: Sampler = DEFAULT_SAMPLER
    seed: int | Sequence[int] = 0
    penalties: Penalties | None = None
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    allowed: Allowed | None = None

    def __post_init__(self) -> None:
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise GenerationError(
                f"max_new_tokens is {self.max_new_tokens!r}: give an integer of 1 or "
                "more."
            )
        if self.penalties is not None and not isinstance(self.penalties, Penalties):
            raise GenerationError(
                f"penalties is {self.penalties!r:.60}: give Penalties(repetition=, "
                "presence=, frequency=)."
            )
        if isinstance(self.stop, str) or not all(
            isinstance(text, str) and text for text in self.stop
        ):
            raise GenerationError(
                f"stop is {self.stop!r:.60}: give a list of texts, none of them empty."
            )
        if self.allowed is not None and not callable(self.allowed):
            raise GenerationError(
                f"allowed is {self.allowed!r:.60}: give a function from the ids "
                "written so far to those that may come next."
            )

    def seed_of(self, number: int, num_prompts: int) -> int:
        """The seed of one of the prompts.

        Raises:
          GenerationError: it is no integer, or there is not one for each.
        """
        seeds = self.seed
        if type(seeds) is int:
            return seeds
        if not isinstance(seeds, Sequence) or isinstance(seeds, str):
            raise GenerationError(f"seed is {seeds!r}: give an integer.")
        if len(seeds) != num_prompts or not all(type(seed) is int for seed in seeds):
            raise GenerationError(
                f"seed is {seeds!r:.60}: give an integer, or a list of one for each of "
                f"the {num_prompts} prompts."
            )
        return seeds[number]

    def allowed_after(
        self, ids: list[int], *, vocab_size: int
    ) -> Bool[np.ndarray, " V"]:
        """What `allowed` says, as a mask.

        Raises:
          GenerationError: it says nothing may come, or what are no ids.
        """
        assert self.allowed is not None
        said = np.asarray(self.allowed(list(ids)))
        if said.dtype == bool and said.shape == (vocab_size,):
            mask = said
        else:
            mask = np.zeros(vocab_size, bool)
            if said.size:
                mask[require_ids(said, name="allowed(...)", vocab_size=vocab_size)] = (
                    True
                )
        if not mask.any():
            raise GenerationError(
                f"allowed(...) leaves no token to come after {ids[-5:]}: let it give "
                "EOS (2) where an answer may end."
            )
        return mask
