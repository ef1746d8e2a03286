"""Text in, text out.

A request becomes rows of ids, is checked, padded to sizes that may be compiled
already, run by the programs of `decode.py`, and read back as text.
"""

import dataclasses
import hashlib
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np

from llama_jax.build import ShardedLlama
from llama_jax.config.sampling import Sampler
from llama_jax.errors import GenerationError
from llama_jax.generate import score
from llama_jax.generate.decode import DecodeState, Vocabulary, decode, prefill
from llama_jax.generate.rows import length_bucket, padded, require_ids
from llama_jax.generate.sample import Rule
from llama_jax.text import StreamDecoder, Tokenizer, encode_dialog, require_fit
from llama_jax.text.chat import Message
from sharding.axes import Tree

Prompt = str | Sequence[int]

# The end of text in the whole family; a `Tokenizer` has made sure of it.
_EOS = 2

# Steps between two looks at what a stream has written: fewer show a token sooner,
# more leave the device alone for longer.
_STREAM_STEPS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What was written after one prompt.

    Attributes:
      text: `tokens` decoded; "" if the model has no tokenizer.
      tokens: ids, without EOS; with `echo`, the prompt's come first.
      logprobs: the model's log-probability of each of `tokens`, untouched by the
        sampler; 0 for a first token, which nothing precedes.
      finish_reason: "stop" after EOS, "length" at `max_new_tokens` or at the end of
        the context.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


class _Request(NamedTuple):
    """A request in numbers, found to be one that can be served.

    Attributes:
      rows: the ids of each prompt.
      limits: the length at which each row ends at the latest.
      seeds: 64 bits of randomness for each row.
      rule: how tokens are chosen.
    """

    rows: list[list[int]]
    limits: list[int]
    seeds: list[tuple[int, int]]
    rule: Rule


class Generator:
    """Writes with one model.

    Args:
      sharded: the model and its mesh, with rules that split no sequence.
      params: its parameters.
      tokenizer: None serves a model without one, to which prompts are given as ids.

    Raises:
      TokenizerError: the tokenizer has ids that the model has no embedding for.
    """

    def __init__(
        self, sharded: ShardedLlama, params: Tree, tokenizer: Tokenizer | None
    ) -> None:
        num_pieces = sharded.config.vocab_size
        if tokenizer is not None:
            require_fit(tokenizer, num_pieces)
            num_pieces = tokenizer.vocab_size
        self._sharded = sharded
        self._params = params
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary(num_pieces, _EOS)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        sampler: Sampler,
        seed: int,
        echo: bool = False,
    ) -> list[Completion]:
        """Continue each prompt, all of them at once.

        What a row becomes depends on its prompt, the sampler and the seed, but not on
        the rows beside it: draws come from the seed and the prompt, and the second of
        two equal prompts has its own.

        Args:
          prompts: texts, to which BOS is added, or lists of ids, taken as they are.
          max_new_tokens: the most to write after each prompt, EOS included. The
            context is a limit too: a row that reaches `max_length` ends there, with
            the finish reason "length".
          sampler: how tokens are chosen.
          seed: the same seed, the same text.
          echo: whether completions begin with their prompts; costs a second reading
            of the prompts, for their log-probabilities.

        Raises:
          GenerationError: a prompt that is empty, holds what is no id, or leaves no
            room in the context; `max_new_tokens` below 1; no tokenizer for a text.
          TokenizerError: a prompt holds a lone surrogate.
        """
        request = self._request(prompts, max_new_tokens, sampler, seed)
        rows = request.rows
        if not rows:
            return []
        state = self._prefill(request)
        state = self._decode(state, request.rule, num_steps=max(request.limits))
        written = jax.device_get((state.tokens, state.logprobs, state.length))
        completions = [
            self._complete(tokens[len(ids) : length], logprobs[len(ids) : length])
            for ids, tokens, logprobs, length in zip(rows, *written, strict=False)
        ]
        return self._with_prompts(rows, completions) if echo else completions

    def stream(
        self, prompt: Prompt, *, max_new_tokens: int, sampler: Sampler, seed: int
    ) -> Iterator[str]:
        """Continue one prompt, yielding the text while it is written.

        The pieces joined are the `text` that `generate` gives; no character is split.

        Raises:
          GenerationError: as `generate`, before anything runs; or the model has no
            tokenizer.
          TokenizerError: the prompt holds a lone surrogate.
        """
        decoder = StreamDecoder(self._require_tokenizer("a stream of text"))
        request = self._request([prompt], max_new_tokens, sampler, seed)
        return self._pieces(request, decoder)

    def chat(
        self,
        dialog: Sequence[Message],
        *,
        max_new_tokens: int,
        sampler: Sampler,
        seed: int,
    ) -> Completion:
        """Answer the last question of a dialog, whose form text/chat.py describes.

        Raises:
          DialogError: the dialog is not one that Llama 2 chat models accept.
          GenerationError: as `generate`; or the model has no tokenizer.
          TokenizerError: a message holds a lone surrogate.
        """
        prompt = encode_dialog(self._require_tokenizer("a dialog"), dialog)
        return self.generate(
            [prompt], max_new_tokens=max_new_tokens, sampler=sampler, seed=seed
        )[0]

    def _request(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampler: Sampler,
        seed: int,
    ) -> _Request:
        rows = self._encode(prompts)
        limits = self._limits(rows, max_new_tokens)
        return _Request(rows, limits, _row_seeds(rows, seed), Rule.of(sampler))

    def _encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        if isinstance(prompts, str):
            raise GenerationError(
                "prompts is a single text: put it in a list, [prompt], as several can "
                "be continued at once."
            )
        return [
            self._require_tokenizer(f"prompts[{i}], a text,").encode(
                prompt, bos=True, eos=False
            )
            if isinstance(prompt, str)
            else require_ids(
                prompt,
                name=f"prompts[{i}]",
                vocab_size=self._sharded.config.vocab_size,
            )
            for i, prompt in enumerate(prompts)
        ]

    def _require_tokenizer(self, what: str) -> Tokenizer:
        if self._tokenizer is None:
            raise GenerationError(
                f"{what} needs a tokenizer, and this model was loaded without one: "
                "load it with tokenizer=PATH, or generate from lists of token ids."
            )
        return self._tokenizer

    def _limits(self, rows: list[list[int]], max_new_tokens: int) -> list[int]:
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise GenerationError(
                f"max_new_tokens is {max_new_tokens!r}: give an integer of 1 or more."
            )
        max_length = self._sharded.config.max_length
        for i, ids in enumerate(rows):
            if len(ids) >= max_length:
                raise GenerationError(
                    f"prompts[{i}] has {len(ids)} tokens, and the context is "
                    f"{max_length}, prompt and answer together: shorten it to at most "
                    f"{max_length - 1} tokens, or load the model with a greater "
                    "max_length."
                )
        return [min(len(ids) + max_new_tokens, max_length) for ids in rows]

    def _prefill(self, request: _Request) -> DecodeState:
        tokens = padded(self._sharded, request.rows)
        num_padding = len(tokens) - len(request.rows)
        lengths = [*map(len, request.rows)] + [1] * num_padding
        limits = request.limits + [0] * num_padding
        seeds = request.seeds + [(0, 0)] * num_padding
        with jax.set_mesh(self._sharded.mesh):
            return prefill(
                self._sharded.model,
                self._params,
                tokens,
                np.array(lengths, np.int32),
                np.array(limits, np.int32),
                np.array(seeds, np.uint32),
                request.rule,
                self._vocabulary,
                slots=length_bucket(self._sharded, max(limits)),
            )

    def _decode(self, state: DecodeState, rule: Rule, *, num_steps: int) -> DecodeState:
        with jax.set_mesh(self._sharded.mesh):
            return decode(
                self._sharded.model,
                self._params,
                state,
                rule,
                self._vocabulary,
                num_steps,
            )

    def _complete(self, tokens: np.ndarray, logprobs: np.ndarray) -> Completion:
        num_eos = int(tokens[-1] == self._vocabulary.eos_id)
        ids = tokens[: len(tokens) - num_eos].tolist()
        return Completion(
            text=self._tokenizer.decode(ids) if self._tokenizer else "",
            tokens=ids,
            logprobs=logprobs[: len(ids)].tolist(),
            finish_reason="stop" if num_eos else "length",
        )

    def _with_prompts(
        self, rows: list[list[int]], completions: list[Completion]
    ) -> list[Completion]:
        scored = score.token_logprobs(self._sharded, self._params, rows)
        return [
            dataclasses.replace(
                completion,
                text=self._tokenizer.decode(ids + completion.tokens)
                if self._tokenizer
                else "",
                tokens=ids + completion.tokens,
                logprobs=[0.0, *logprobs, *completion.logprobs],
            )
            for ids, logprobs, completion in zip(rows, scored, completions, strict=True)
        ]

    def _pieces(self, request: _Request, decoder: StreamDecoder) -> Iterator[str]:
        state = self._prefill(request)
        seen = len(request.rows[0])
        while True:
            (tokens, *_), (length, *_), (done, *_) = jax.device_get(
                (state.tokens, state.length, state.done)
            )
            for id in tokens[seen:length].tolist():
                if id != self._vocabulary.eos_id and (piece := decoder.feed(id)):
                    yield piece
            if done:
                break
            seen = length
            state = self._decode(state, request.rule, num_steps=_STREAM_STEPS)
        if piece := decoder.flush():
            yield piece


def _row_seeds(rows: list[list[int]], seed: int) -> list[tuple[int, int]]:
    """64 bits for each row: a digest of the seed, the prompt, and how often it came."""
    if type(seed) is not int:
        raise GenerationError(f"seed is {seed!r}: give an integer.")
    seeds: list[tuple[int, int]] = []
    copies: Counter[tuple[int, ...]] = Counter()
    for ids in map(tuple, rows):
        digest = hashlib.sha256(repr((seed, copies[ids], ids)).encode()).digest()
        seeds.append(struct.unpack("<2I", digest[:8]))
        copies[ids] += 1
    return seeds
