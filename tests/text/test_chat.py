"""The chat format: Meta's ids, Meta's refusals, and what a dialog teaches."""

import io
import json

import pytest
import sentencepiece

from llama_jax.errors import DialogError, TokenizerError
from llama_jax.text import Tokenizer, encode_dialog, encode_example

USER = {"role": "user", "content": "Who wrote Emma?"}
ASSISTANT = {"role": "assistant", "content": "Jane Austen."}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="session")
def meta(reference) -> Tokenizer:
    return Tokenizer(reference / "tokenizer" / "tokenizer.model")


@pytest.fixture(scope="session")
def vectors(reference) -> dict:
    return json.loads((reference / "tokenizer" / "chat_vectors.json").read_text())


class TestMeta:
    def test_the_prompts(self, meta, vectors):
        accepted = [row for row in vectors["rows"] if not row["unsafe"]]
        assert len(accepted) == 5
        for row in accepted:
            tokens = encode_dialog(meta, row["dialog"])
            assert tokens == row["prompt_tokens"]
            assert meta.decode(tokens) == row["prompt_decoded"]

    def test_the_refusals_of_tags(self, meta, vectors):
        words = vectors["UNSAFE_ERROR"].removeprefix("Error: ")
        refused = [row for row in vectors["rows"] if row["unsafe"]]
        assert len(refused) == 3
        for row in refused:
            with pytest.raises(DialogError) as caught:
                encode_dialog(meta, row["dialog"])
            assert words in str(caught.value)

    def test_the_other_errors(self, meta, vectors):
        assert len(vectors["errors"]) == 7
        for row in vectors["errors"]:
            kind, words = row["error"]
            with pytest.raises(DialogError) as caught:
                encode_dialog(meta, row["dialog"])
            if kind == "IndexError":  # Meta's code breaks; ours explains.
                assert "the dialog is" in str(caught.value)
            else:
                assert words in str(caught.value)

    def test_an_example_is_the_prompt_the_answer_and_its_end(self, meta, vectors):
        """Meta's own prompts hold finished turns: an example must equal them."""
        row = vectors["rows"][4]
        prompt, dialog = row["prompt_tokens"], row["dialog"]
        example = encode_example(meta, dialog[:-1])
        assert example.tokens == prompt[: len(example.tokens)]
        learnt = [t for t, m in zip(*example, strict=True) if m]
        # "▁a", "1", the space that the format puts before EOS, EOS; then the second.
        assert learnt == [263, 29896, 29871, 2, 263, 29906, 29871, 2]


class TestPrompt:
    def test_each_turn_has_its_own_bos(self, trained):
        tokens = encode_dialog(trained, [SYSTEM, USER, ASSISTANT, USER])
        assert tokens.count(1) == 2 and tokens.count(2) == 1
        assert trained.decode(tokens) == (
            "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWho wrote Emma? [/INST] "
            "Jane Austen.  [INST] Who wrote Emma? [/INST]"
        )

    def test_literal_control_pieces_stay_text(self, trained):
        tokens = encode_dialog(trained, [{"role": "user", "content": "</s><s> hi"}])
        assert tokens.count(1) == 1 and tokens.count(2) == 0

    @pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
    @pytest.mark.parametrize("place", range(4))
    def test_no_message_may_hold_a_tag(self, trained, tag, place):
        dialog = [dict(m) for m in (SYSTEM, USER, ASSISTANT, USER)]
        dialog[place]["content"] += f" x{tag}y"
        words = "special tags are not allowed as part of the prompt."
        with pytest.raises(DialogError, match=words) as caught:
            encode_dialog(trained, dialog)
        assert f"Message {place + 1}, from {dialog[place]['role']}" in str(caught.value)
        assert tag in str(caught.value)

    @pytest.mark.parametrize(
        ("dialog", "says"),
        [
            ([], "dialog is empty"),
            ([SYSTEM], "a system message alone"),
            ([ASSISTANT], "message 1 is from 'assistant' where 'user' belongs"),
            ([USER, USER], "message 2 is from 'user' where 'assistant' belongs"),
            ([SYSTEM, SYSTEM, USER], "message 2 is from 'system' where 'user'"),
            ([USER, SYSTEM, USER], "message 2 is from 'system' where 'assistant'"),
            ([{"role": "tool", "content": "x"}], "message 1 is from 'tool'"),
            ([USER, ASSISTANT], "Last message must be from user, got assistant"),
            ([SYSTEM, USER, ASSISTANT], "must be from user, got assistant: message 3"),
            (["Who?"], "message 1 is 'Who\\?', not a mapping"),
            ([[USER]], "message 1 is .*not a mapping"),
            ([{"role": "user"}], "message 1 needs a text under 'content', not None"),
            ([USER, {"role": 3, "content": ""}], "message 2 needs a text under 'role'"),
        ],
    )
    def test_a_dialog_that_is_none(self, trained, dialog, says):
        with pytest.raises(DialogError, match=says):
            encode_dialog(trained, dialog)

    def test_a_lone_surrogate(self, trained):
        with pytest.raises(TokenizerError, match="lone surrogate"):
            encode_dialog(trained, [{"role": "user", "content": "\ud83d"}])


class TestExample:
    def test_only_answers_and_their_ends_are_learnt(self, trained):
        tokens, loss_mask = encode_example(trained, [SYSTEM, USER, ASSISTANT])
        assert len(tokens) == len(loss_mask)
        first = loss_mask.index(True)
        assert all(loss_mask[first:])
        assert tokens[:first] == encode_dialog(trained, [SYSTEM, USER])
        assert trained.decode(tokens[first:]) == "Jane Austen. "
        assert tokens[-1] == trained.eos_id

    def test_every_answer_is_learnt(self, trained):
        one = encode_example(trained, [USER, ASSISTANT])
        two = encode_example(trained, [USER, ASSISTANT, USER, ASSISTANT])
        assert two.tokens == one.tokens * 2
        assert two.loss_mask == one.loss_mask * 2

    @pytest.mark.parametrize(
        ("dialog", "says"),
        [
            ([], "dialog is empty"),
            ([SYSTEM], "a system message alone"),
            ([USER], "Last message must be from assistant, got user"),
            ([ASSISTANT], "message 1 is from 'assistant' where 'user' belongs"),
            ([USER, {**ASSISTANT, "content": " \n"}], r"message 2 \(assistant\) is em"),
            ([{**USER, "content": ""}, ASSISTANT], r"message 1 \(user\) is empty"),
            ([{**SYSTEM, "content": ""}, USER, ASSISTANT], r"1 \(system\) is empty"),
            ([USER, {**ASSISTANT, "content": "[/INST]"}], "special tags"),
        ],
    )
    def test_a_dialog_that_teaches_nothing_good(self, trained, dialog, says):
        with pytest.raises(DialogError, match=says):
            encode_example(trained, dialog)

    def test_an_answer_that_cannot_be_parted_from_its_question(self, tmp_path):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["] J] J] J"]),
            model_writer=model,
            model_type="bpe",
            vocab_size=310,
            byte_fallback=True,
            split_by_whitespace=False,
            split_by_unicode_script=False,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        path = tmp_path / "tokenizer.model"
        path.write_bytes(model.getvalue())
        with pytest.raises(TokenizerError, match=r"joins the end of \[/INST\]"):
            encode_example(Tokenizer(path), [USER, ASSISTANT])
