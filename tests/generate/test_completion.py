"""What a notebook shows of a completion."""

import dataclasses
import math
import re

import pytest

from llama_jax.generate import Completion, Timing

TIMING = Timing(
    prompt_tokens=3, cached_tokens=0, prefill_seconds=0.25, decode_seconds=1.5
)


@pytest.fixture
def completion() -> Completion:
    return Completion(
        text="a <b> & c",
        tokens=[5, 6, 7, 8, 9],
        logprobs=[0.0, math.log(0.5), math.log(0.125), -1e4, -2.0],
        pieces=["a", " <b>", "", " & c", "\n"],
        finish_reason="stop",
        timing=TIMING,
    )


def test_each_token_has_its_probability_and_its_shade(completion):
    page = completion._repr_html_()
    spans = re.findall(r'<span title="([^"]*)" style="([^"]*)">([^<]*)</span>', page)
    assert page.count("<span") == len(spans) == 5
    titles, styles, texts = zip(*spans, strict=True)
    assert titles[:4] == ("id 5: 100.0%", "id 6: 50.0%", "id 7: 12.5%", "id 8: 0.0%")
    assert texts == ("a", " &lt;b&gt;", "·", " &amp; c", "\n")
    shades = [float(re.search(r"([\d.]+)\)$", style)[1]) for style in styles]
    assert shades[:4] == sorted(shades[:4])
    assert shades[0] == 0 and shades[3] == 0.6
    assert "5 tokens, stop; 0.25 s for the prompt, 1.50 s for the answer" in page


def test_nothing_of_the_text_is_taken_for_a_tag(completion):
    page = completion._repr_html_()
    assert set(re.findall(r"</?(\w+)", page)) == {"div", "span"}


def test_an_empty_completion_has_a_page(completion):
    empty = dataclasses.replace(completion, text="", tokens=[], logprobs=[], pieces=[])
    assert "0 tokens" in empty._repr_html_()


def test_how_long_it_took_makes_no_difference(completion):
    slow = dataclasses.replace(TIMING, decode_seconds=9.0)
    assert dataclasses.replace(completion, timing=slow) == completion
    assert dataclasses.replace(completion, text="") != completion


def test_a_repr_is_short(completion):
    assert "pieces" not in repr(completion)
