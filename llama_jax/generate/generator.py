"""Text in, text out.

A request becomes rows of ids, is checked, run by the engine, and read back as text.
"""

import dataclasses
import hashlib
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Bool

from llama_jax.config.sampling import Sampler
from llama_jax.errors import GenerationError
from llama_jax.generate import score
from llama_jax.generate.completion import Completion, Timing
from llama_jax.generate.decode import Choice, DecodeState
from llama_jax.generate.engine import Engine, Row
from llama_jax.generate.rows import chunk_sizes, require_ids
from llama_jax.generate.sample import PenaltyRule, Rule
from llama_jax.generate.settings import Settings
from llama_jax.generate.stop import StopStrings
from llama_jax.text import StreamDecoder, Tokenizer, encode_dialog, require_fit
from llama_jax.text.chat import Message

Prompt = str | Sequence[int]

# The end of text in the whole family; a `Tokenizer` has made sure of it.
_EOS = 2

# Tokens between two looks at what is written. Of a stream: fewer show a token sooner,
# more leave the device alone for longer. Of an answer that a text may stop: as many
# may be written in vain.
STREAM_TOKENS = 4
_STOP_TOKENS = 16

# Ends are compiled for by the multiple of these.
_NUM_ENDS = 8


class Generator:
    """Writes with one model.

    Args:
      engine: runs it.
      tokenizer: None serves a model without one, to which prompts are given as ids.

    Raises:
      TokenizerError: the tokenizer has ids that the model has no embedding for.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self._vocab_size = engine.sharded.config.vocab_size
        self._num_pieces = self._vocab_size
        if tokenizer is not None:
            require_fit(tokenizer, self._vocab_size)
            self._num_pieces = tokenizer.vocab_size
        self.engine = engine
        self.tokenizer = tokenizer

    def generate(
        self,
        prompts: Sequence[Prompt],
        settings: Settings,
        *,
        num_samples: int = 1,
        echo: bool = False,
    ) -> list[Completion]:
        """Continue each prompt, all of them at once.

        What a row becomes depends on its prompt, the settings and the seed, but not on
        the rows beside it, save for the last bits of log-probabilities: draws come from
        the seed and the prompt, and the second of two equal prompts has its own.

        Args:
          prompts: texts, to which BOS is added, or lists of ids, taken as they are.
          settings: how answers are written.
          num_samples: answers to each prompt, which is read only once; they follow one
            another in the result.
          echo: whether completions begin with their prompts; costs a second reading
            of the prompts, for their log-probabilities.

        Raises:
          GenerationError: a prompt that is empty, holds what is no id, or leaves no
            room in the context; no tokenizer for a text; a setting that is none.
          TokenizerError: a prompt holds a lone surrogate.
        """
        if type(num_samples) is not int or num_samples < 1:
            raise GenerationError(
                f"num_samples is {num_samples!r}: give an integer of 1 or more."
            )
        rows = self.rows(prompts, settings, num_samples=num_samples)
        if not rows:
            return []
        completions = self._write(rows, settings, continues=True)
        return self._with_prompts(rows, completions) if echo else completions

    def stream(self, prompt: Prompt, settings: Settings) -> Iterator[str]:
        """Continue one prompt, yielding the text while it is written.

        The pieces joined are the `text` that `generate` gives; no character is split.

        Raises:
          GenerationError: as `generate`, before anything runs; or the model has no
            tokenizer.
          TokenizerError: the prompt holds a lone surrogate.
        """
        self.require_tokenizer("a stream of text")
        return self._pieces(self.rows([prompt], settings), settings)

    def chat(self, dialog: Sequence[Message], settings: Settings) -> Completion:
        """Answer the last question of a dialog, whose form text/chat.py describes.

        Raises:
          DialogError: the dialog is not one that Llama 2 chat models accept.
          GenerationError: as `generate`; or the model has no tokenizer.
          TokenizerError: a message holds a lone surrogate.
        """
        prompt = encode_dialog(self.require_tokenizer("a dialog"), dialog)
        rows = self.rows([prompt], settings, name="the conversation")
        return self._write(rows, settings, continues=False)[0]

    def rows(
        self,
        prompts: Sequence[Prompt],
        settings: Settings,
        *,
        num_samples: int = 1,
        name: str = "prompts[{}]",
    ) -> list[Row]:
        """Prompts as rows that can be run, each as often as samples are wanted.

        Args:
          prompts: as `generate`.
          settings: likewise.
          num_samples: likewise.
          name: what an error calls the prompt of this number.

        Raises:
          GenerationError, TokenizerError: as `generate`.
        """
        self.choice(settings)
        encoded = self._encode(prompts)
        self._require_room(encoded, name)
        seeds = [settings.seed_of(i, len(encoded)) for i in range(len(encoded))]
        rows = []
        times: Counter[tuple[int, tuple[int, ...]]] = Counter()
        for ids, seed in zip(encoded, seeds, strict=True):
            limit = min(len(ids) + settings.max_new_tokens, self.engine.slots)
            for _ in range(num_samples):
                key = (seed, tuple(ids))
                rows.append(Row(ids, limit, _row_seed(seed, times[key], ids)))
                times[key] += 1
        return rows

    def warm_up(
        self, num_rows: int, sampler: Sampler, watch: Callable[[str, float], None]
    ) -> dict[str, float]:
        """Run every program that `num_rows` prompts can need, so that it is compiled.

        Args:
          num_rows: prompts at a time.
          sampler: of the kind that will be used.
          watch: told each program and the seconds it took.

        Returns:
          Seconds by program.
        """
        seconds: dict[str, float] = {}

        def ran(name: str, began: float) -> None:
            seconds[name] = time.perf_counter() - began
            watch(name, seconds[name])

        slots = self.engine.slots
        settings = Settings(max_new_tokens=1, sampler=sampler)
        for size in chunk_sizes(slots):
            began = time.perf_counter()
            ids = [_EOS] * min(size, slots - 1)
            state = self.engine.read([Row(ids, slots)] * num_rows)
            jax.block_until_ready(state.logits)
            ran(f"prefill of {num_rows} x {size} positions", began)
            self.engine.release(state)
        began = time.perf_counter()
        state = self.engine.read([Row([_EOS], slots)] * num_rows)
        choice = self.choice(settings)
        state = self.engine.write_first(state, choice)
        state = self.engine.write(state, choice, num_tokens=1)
        jax.block_until_ready(state.tokens)
        ran(f"decode of {num_rows} rows", began)
        self.engine.release(state)
        return seconds

    def require_tokenizer(self, what: str) -> Tokenizer:
        """The tokenizer.

        Raises:
          GenerationError: there is none, and `what` needs one.
        """
        if self.tokenizer is None:
            raise GenerationError(
                f"{what} needs a tokenizer, and this model was loaded without one: "
                "load it with tokenizer=PATH, or generate from lists of token ids."
            )
        return self.tokenizer

    def choice(self, settings: Settings) -> Choice:
        """The settings, as far as programs take them.

        Raises:
          GenerationError: stop tokens that are no ids; a stop string without a
            tokenizer; what is no sampler.
        """
        stop_tokens = list(settings.stop_tokens)
        if stop_tokens:
            require_ids(stop_tokens, name="stop_tokens", vocab_size=self._vocab_size)
        if settings.stop:
            self.require_tokenizer("a stop string")
        ends = [_EOS, *stop_tokens]
        ends += [-1] * (-len(ends) % _NUM_ENDS)
        return Choice(
            rule=Rule.of(settings.sampler),
            num_pieces=self._num_pieces,
            ends=np.array(ends, np.int32),
            penalties=PenaltyRule.of(settings.penalties),
        )

    def _encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        if isinstance(prompts, str):
            raise GenerationError(
                "prompts is a single text: put it in a list, [prompt], as several can "
                "be continued at once."
            )
        return [
            self.require_tokenizer(f"prompts[{i}], a text,").encode(
                prompt, bos=True, eos=False
            )
            if isinstance(prompt, str)
            else require_ids(prompt, name=f"prompts[{i}]", vocab_size=self._vocab_size)
            for i, prompt in enumerate(prompts)
        ]

    def _require_room(self, prompts: Sequence[Sequence[int]], name: str) -> None:
        room = self.engine.slots
        for i, ids in enumerate(prompts):
            if len(ids) >= room:
                raise GenerationError(
                    f"{name.format(i)} has {len(ids)} tokens, and the context is "
                    f"{room}, prompt and answer together: shorten it to at most "
                    f"{room - 1} tokens, or load the model with a greater cache_length "
                    "or max_length."
                )

    def _write(
        self, rows: Sequence[Row], settings: Settings, *, continues: bool
    ) -> list[Completion]:
        began = time.perf_counter()
        state = self._read(rows)
        jax.block_until_ready(state.logits)
        read = time.perf_counter()
        num_tokens = _STOP_TOKENS if settings.stop else settings.max_new_tokens
        writing = Writing(
            self, state, rows, settings, num_tokens=num_tokens, continues=continues
        )
        for _ in writing:
            pass
        self.engine.release(writing.state)
        done = time.perf_counter()
        return [
            answer.completion(
                Timing(
                    prompt_tokens=len(row.ids),
                    cached_tokens=0,
                    prefill_seconds=read - began,
                    decode_seconds=done - read,
                )
            )
            for row, answer in zip(rows, writing.answers, strict=True)
        ]

    def _read(self, rows: Sequence[Row]) -> DecodeState:
        """The rows, each prompt read once."""
        numbers: dict[tuple[int, ...], int] = {}
        copied = [numbers.setdefault(tuple(row.ids), len(numbers)) for row in rows]
        if len(numbers) == len(rows):
            return self.engine.read(rows)
        state = self.engine.read([rows[copied.index(i)] for i in range(len(numbers))])
        return self.engine.spread(state, rows, copied)

    def _with_prompts(
        self, rows: Sequence[Row], completions: list[Completion]
    ) -> list[Completion]:
        engine = self.engine
        prompts = [row.ids for row in rows]
        scored = score.token_logprobs(engine, prompts)
        echoed = []
        for ids, logprobs, answer in zip(prompts, scored, completions, strict=True):
            whole = Answer(self.tokenizer, (), (), continues=False)
            whole.take([*ids, *answer.tokens], [0.0, *logprobs, *answer.logprobs])
            whole.finish()
            echoed.append(
                dataclasses.replace(
                    whole.completion(answer.timing), finish_reason=answer.finish_reason
                )
            )
        return echoed

    def _pieces(self, rows: list[Row], settings: Settings) -> Iterator[str]:
        state = self.engine.read(rows)
        writing = Writing(
            self, state, rows, settings, num_tokens=STREAM_TOKENS, continues=True
        )
        (answer,) = writing.answers
        shown = 0
        for _ in writing:
            if len(answer.text) > shown:
                yield answer.text[shown:]
                shown = len(answer.text)
        self.engine.release(writing.state)


class Writing:
    """Rows while they are written; iterating goes on to the next look at them.

    Args:
      generator: whose engine writes.
      state: the rows, read; it is consumed.
      rows: of the state.
      settings: how.
      num_tokens: between two looks.
      continues: whether an answer goes on with the text of its prompt, where it has
        one, or is a text of its own.

    Attributes:
      state: the newest. Also after an interruption, if it is not deleted.
      answers: of each row, as of the last look.
    """

    def __init__(
        self,
        generator: Generator,
        state: DecodeState,
        rows: Sequence[Row],
        settings: Settings,
        *,
        num_tokens: int,
        continues: bool,
    ) -> None:
        self.state = state
        ends = [_EOS, *settings.stop_tokens]
        self.answers = [
            Answer(
                generator.tokenizer,
                ends,
                settings.stop,
                continues=continues and any(id > _EOS for id in row.ids),
            )
            for row in rows
        ]
        self._generator = generator
        self._settings = settings
        self._choice = generator.choice(settings)
        self._seen = [len(row.ids) for row in rows]
        self._num_tokens = 1 if settings.allowed is not None else num_tokens

    def __iter__(self) -> Iterator[None]:
        engine = self._generator.engine
        self.state = engine.write_first(
            self.state, self._choice, allowed=self._allowed()
        )
        while True:
            self._look()
            yield
            done = [i for i, answer in enumerate(self.answers) if answer.is_done]
            if len(done) == len(self.answers):
                return
            self.state = engine.write(
                self.state,
                self._choice,
                num_tokens=self._num_tokens,
                halted=done,
                allowed=self._allowed(),
            )

    def _allowed(self) -> Bool[np.ndarray, "B V"] | None:
        if self._settings.allowed is None:
            return None
        vocab_size = self.state.logits.shape[1]
        return np.stack(
            [
                np.ones(vocab_size, bool)
                if answer.is_done
                else self._settings.allowed_after(answer.ids, vocab_size=vocab_size)
                for answer in self.answers
            ]
        )

    def _look(self) -> None:
        state = self.state
        tokens, logprobs, lengths, done = jax.device_get(
            (state.tokens, state.logprobs, state.length, state.done)
        )
        for i, answer in enumerate(self.answers):
            new = slice(self._seen[i], lengths[i])
            answer.take(tokens[i, new].tolist(), logprobs[i, new].tolist())
            self._seen[i] = lengths[i]
            if done[i]:
                answer.finish()


class Answer:
    """A row's answer while it is written.

    Args:
      tokenizer: None leaves its text empty.
      ends: ids that end it.
      stop: texts before which it ends.
      continues: whether a text comes before it.

    Attributes:
      ids: all that was written, what ends it included.
      text: what is settled of it.
      is_done: whether no more comes.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        ends: Sequence[int],
        stop: Sequence[str],
        *,
        continues: bool,
    ) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.is_done = False
        self._logprobs: list[float] = []
        self._pieces: list[str] = []
        self._ends = ends
        self._decoder = (
            None if tokenizer is None else StreamDecoder(tokenizer, continues=continues)
        )
        self._stops = StopStrings(stop)

    def take(self, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """More of it; what comes after its end is left out."""
        for id, logprob in zip(ids, logprobs, strict=True):
            if self.is_done:
                return
            self.ids.append(id)
            if id in self._ends:
                self.finish()
                return
            self._logprobs.append(logprob)
            piece = self._decoder.feed(id) if self._decoder else ""
            self._pieces.append(piece)
            self.text += self._stops.feed(piece)
            self.is_done = self._stops.found

    def finish(self) -> None:
        """No more comes."""
        if self.is_done:
            return
        self.is_done = True
        if self._decoder and self._pieces:
            last = self._decoder.flush()
            self._pieces[-1] += last
            self.text += self._stops.feed(last) + self._stops.flush()

    def completion(self, timing: Timing) -> Completion:
        """All of it, once it is done."""
        num_kept = len(self._logprobs)
        if self._stops.found:
            lengths = np.cumsum([len(piece) for piece in self._pieces])
            num_kept = int(np.searchsorted(lengths, len(self.text))) + bool(self.text)
        is_stopped = self._stops.found or len(self.ids) > len(self._logprobs)
        return Completion(
            text=self.text,
            tokens=self.ids[:num_kept],
            logprobs=self._logprobs[:num_kept],
            pieces=self._pieces[:num_kept],
            finish_reason="stop" if is_stopped else "length",
            timing=timing,
        )


def _row_seed(seed: int, number: int, ids: list[int]) -> tuple[int, int]:
    """64 bits: a digest of the seed, the prompt, and how often that came before."""
    digest = hashlib.sha256(repr((seed, number, tuple(ids))).encode()).digest()
    first, second = struct.unpack("<2I", digest[:8])
    return first, second
