"""What was written: text, ids, log-probabilities, and how long it took."""

import dataclasses
import html
import math
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """How long a request took; that of a batch, for all of its rows.

    Attributes:
      prompt_tokens: of this row's prompt.
      cached_tokens: of those, the ones that the cache still had.
      prefill_seconds: until the prompts were read.
      decode_seconds: from then on, until the last row was done.
    """

    prompt_tokens: int
    cached_tokens: int
    prefill_seconds: float
    decode_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What was written after one prompt. In a notebook, tokens show their probability.

    Attributes:
      text: what `tokens` add to the text of the prompt, which they begin with where it
        has none, as far as no stop string begins; "" without a tokenizer.
      tokens: ids, without what ended the answer; with `echo`, the prompt's come first.
      logprobs: the model's log-probability of each of `tokens`, untouched by penalties
        and sampler; 0 for a first token, which nothing precedes.
      pieces: the text that each of `tokens` settles; joined they begin with `text`.
      finish_reason: "stop" after EOS, a stop token or a stop string, "length" at
        `max_new_tokens` or at the end of the context.
      timing: how long it took; two completions are equal whatever it is.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    pieces: list[str] = dataclasses.field(repr=False)
    finish_reason: FinishReason
    timing: Timing = dataclasses.field(compare=False)

    def _repr_html_(self) -> str:
        """Each token on a ground the darker, the less probable it was."""
        spans = [
            _span(piece, id, logprob)
            for piece, id, logprob in zip(
                self.pieces, self.tokens, self.logprobs, strict=True
            )
        ]
        timing = self.timing
        note = (
            f"{len(self.tokens)} tokens, {self.finish_reason}; "
            f"{timing.prefill_seconds:.2f} s for the prompt, "
            f"{timing.decode_seconds:.2f} s for the answer"
        )
        return (
            f'<div style="white-space: pre-wrap; line-height: 1.6">{"".join(spans)}'
            f'<div style="font-size: small; opacity: 0.6">{note}</div></div>'
        )


def _span(piece: str, id: int, logprob: float) -> str:
    probability = math.exp(logprob)
    title = f"id {id}: {probability:.1%}"
    shade = f"rgba(220, 80, 60, {0.6 * (1 - probability):.2f})"
    shown = html.escape(piece) or "·"
    return f'<span title="{title}" style="background: {shade}">{shown}</span>'
