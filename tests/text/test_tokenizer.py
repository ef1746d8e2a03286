"""Meta's ids, a family that is recognised, training, and streaming."""

import io
import json
import logging
import pickle
import random
import sys
import time

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from llama_jax.errors import TokenizerError
from llama_jax.text import StreamDecoder, Tokenizer, require_fit, train_tokenizer

# What a text may hold: any character but U+2581, SentencePiece's own sign for a space.
TEXTS = st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]))


@pytest.fixture(scope="session")
def meta(reference) -> Tokenizer:
    return Tokenizer(reference / "tokenizer" / "tokenizer.model")


@pytest.fixture(scope="session")
def vectors(reference) -> dict:
    return json.loads((reference / "tokenizer" / "llama_cpp_vectors.json").read_text())


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [decoder.feed(i) for i in ids] + [decoder.flush()]


def write_model(path, **settings):
    """A SentencePiece model with settings of one's own, for what must be refused."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world, said the little tokenizer"] * 5),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"model_type": "bpe", "vocab_size": 400, **settings},
    )
    path.write_bytes(model.getvalue())
    return path


class TestMeta:
    def test_the_published_ids(self, meta, vectors):
        assert len(vectors["vectors"]) == 47
        for row in vectors["vectors"]:
            assert meta.encode(row["text"], bos=False, eos=False) == row["ids"]
            assert meta.decode(row["ids"]) == row["decoded"] == row["text"]
            assert "".join(stream(meta, row["ids"])) == row["text"]
            after = StreamDecoder(meta, continues=True)
            pieces = [*map(after.feed, row["ids"]), after.flush()]
            assert "".join(pieces) == " " * bool(row["ids"]) + row["text"]

    def test_the_facts_of_the_file(self, meta, vectors):
        facts = vectors["facts"]
        assert meta.vocab_size == facts["n_words"]
        assert (meta.bos_id, meta.eos_id) == (facts["bos_id"], facts["eos_id"])
        assert meta.pad_id == facts["pad_id"]
        for i, piece in facts["pieces"].items():
            assert meta.piece(int(i)) == piece
        for i, text in facts["decode_single"].items():
            assert meta.decode([int(i)]) == text

    def test_bos_and_eos_stand_outside(self, meta):
        ids = meta.encode("Hello", bos=False, eos=False)
        assert meta.encode("Hello", bos=True, eos=True) == [1, *ids, 2]
        assert meta.encode("", bos=True, eos=False) == [1]
        assert meta.decode([1, *ids, 2]) == "Hello"

    def test_a_rebuilt_tokenizer_of_another_size_loads(self, reference):
        path = reference / "stories260K" / "tok512.rebuilt.model"
        tokenizer = Tokenizer(str(path))
        ids = tokenizer.encode("Once upon a time", bos=True, eos=False)
        assert tokenizer.vocab_size == 512
        assert "".join(stream(tokenizer, ids)) == "Once upon a time"

    @pytest.mark.parametrize("text", ["🚀🦙", "👩‍👩‍👧‍👦 x", "我想在apple工作", "កាន់តែ"])
    def test_streaming_never_splits_a_character(self, meta, text):
        ids = meta.encode(text, bos=True, eos=True)
        parts = stream(meta, ids)
        assert "".join(parts) == text
        assert not any("\ufffd" in part for part in parts)
        assert len([part for part in parts if part]) > 1


class TestText:
    @pytest.mark.parametrize("text", ["<s>", "</s>", "<unk>", "<0x41>", "a<s>b </s>"])
    def test_a_literal_control_piece_is_only_text(self, trained, text):
        ids = trained.encode(text, bos=False, eos=False)
        assert min(ids) > 2
        assert not {3 + 0x41} & set(ids)
        assert trained.decode(ids) == text

    @settings(deadline=None, max_examples=200)
    @given(TEXTS)
    @example("\0a\0")
    @example("   leading and trailing   ")
    @example("\ufeff\ufffd\u2047 ⁇ ")
    @example("\U0010ffff\uffff")
    def test_round_trip_and_streaming(self, trained, text):
        ids = trained.encode(text, bos=True, eos=True)
        assert (ids[0], ids[-1]) == (1, 2)
        assert not {0, 1, 2} & set(ids[1:-1])
        assert trained.decode(ids) == text
        assert "".join(stream(trained, ids)) == text

    def test_the_one_character_that_does_not_return(self, trained):
        ids = trained.encode("a\u2581b", bos=False, eos=False)
        assert trained.decode(ids) == "a b"

    @settings(deadline=None, max_examples=300)
    @given(st.lists(st.integers(0, 511) | st.integers(0, 258)))
    @example([259, 1, 259])
    @example([3 + 0xE4, 3 + 0xE4, 3 + 0xBD, 3 + 0xA0])
    @example([3 + 0xF0, 3 + 0x9F, 1, 3 + 0x9A, 3 + 0x80])
    def test_any_ids_stream_to_their_text(self, trained, ids):
        assert "".join(stream(trained, ids)) == trained.decode(ids)

    def test_a_stream_settles_each_character_with_its_last_byte(self, trained):
        ids = [3 + byte for byte in "a🚀é".encode()]
        assert stream(trained, ids) == ["a", "", "", "", "🚀", "", "é", ""]

    def test_a_stream_cut_inside_a_character_shows_it(self, trained):
        ids = [3 + byte for byte in "🚀".encode()[:2]]
        assert stream(trained, ids) == ["", "", "\ufffd\ufffd"]

    def test_a_lone_surrogate_is_refused(self, trained):
        with pytest.raises(TokenizerError, match=r"'\\ud83d' at character 3 .* lone"):
            trained.encode("abc\ud83d", bos=True, eos=False)

    @pytest.mark.parametrize("id", [-1, 512, 32_000])
    def test_an_id_without_a_piece_is_refused(self, trained, id):
        with pytest.raises(
            TokenizerError, match=rf"id {id} at position 1 has no piece"
        ):
            trained.decode([5, id])
        with pytest.raises(TokenizerError, match=rf"id {id} has no piece.*0 to 511"):
            trained.piece(id)
        with pytest.raises(TokenizerError, match=rf"id {id} "):
            StreamDecoder(trained).feed(id)


class TestFile:
    def test_it_travels(self, trained, tmp_path):
        trained.save(tmp_path / "new directory" / "tökenizer.model")
        saved = Tokenizer(tmp_path / "new directory" / "tökenizer.model")
        pickled = pickle.loads(pickle.dumps(trained))
        for copy in (saved, pickled):
            assert copy == trained and hash(copy) == hash(trained)
            assert copy.digest == trained.digest and len(copy.digest) == 64
            assert copy.encode("Hello", bos=True, eos=True) == trained.encode(
                "Hello", bos=True, eos=True
            )
        assert [p.name for p in saved_files(tmp_path)] == ["tökenizer.model"]

    def test_two_files_are_two_tokenizers(self, trained, documents, tmp_path):
        other = train_tokenizer(documents, tmp_path / "other.model", vocab_size=400)
        assert other != trained
        assert trained != "tokenizer.model"

    def test_a_place_that_cannot_be_written(self, trained, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(TokenizerError, match="cannot be written"):
            trained.save(tmp_path / "file" / "tokenizer.model")

    def test_missing(self, tmp_path):
        with pytest.raises(TokenizerError, match="nowhere.model does not exist"):
            Tokenizer(tmp_path / "nowhere.model")

    def test_a_directory(self, tmp_path):
        with pytest.raises(TokenizerError, match="is a directory"):
            Tokenizer(tmp_path)

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"", "is empty"),
            (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
            (b'{"version": "1.0"}', "not a SentencePiece model"),
            (b"IQ== 0\nIg== 1\n", "Llama 3"),
        ],
    )
    def test_no_model(self, tmp_path, content, says):
        path = tmp_path / "tokenizer.model"
        path.write_bytes(content)
        with pytest.raises(TokenizerError, match=says) as caught:
            Tokenizer(path)
        assert str(path) in str(caught.value)

    def test_a_truncated_model(self, trained, tmp_path):
        path = tmp_path / "tokenizer.model"
        path.write_bytes(trained.model_bytes[:-100])
        with pytest.raises(TokenizerError, match="not a SentencePiece model"):
            Tokenizer(path)

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"bos_id": -1, "eos_id": 1}, "bos is absent, not 1, eos is 1, not 2"),
            ({"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}, "unk is 2, not 0"),
            ({"model_type": "unigram", "vocab_size": 30}, "piece 3 is .*not <0x00>"),
            ({"byte_fallback": True, "user_defined_symbols": "<x>"}, "piece 3 is <x>"),
        ],
    )
    def test_another_family(self, tmp_path, settings, says):
        path = write_model(tmp_path / "other.model", **settings)
        with pytest.raises(TokenizerError, match=f"another family's.*{says}"):
            Tokenizer(path)

    def test_a_bucket_without_its_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "gcsfs", None)
        with pytest.raises(TokenizerError, match=r"pip install 'llama-jax\[gcs\]'"):
            Tokenizer("gs://bucket/tokenizer.model")


class TestFit:
    def test_too_many_pieces_are_explained(self, trained):
        with pytest.raises(TokenizerError, match=r"512 pieces\).*is 511: 1 of.*32001"):
            require_fit(trained, 511)

    def test_padding_is_accepted_and_said(self, trained, caplog):
        with caplog.at_level(logging.WARNING):
            require_fit(trained, 512)
            assert not caplog.records
            require_fit(trained, 640)
        assert "last 128 embeddings are taken for padding" in caplog.text


class TestTraining:
    def test_the_layout_is_llamas(self, trained):
        assert trained.vocab_size == 512
        assert [trained.piece(i) for i in range(4)] == [
            "<unk>",
            "<s>",
            "</s>",
            "<0x00>",
        ]
        assert trained.piece(258) == "<0xFF>"
        assert (trained.bos_id, trained.eos_id, trained.pad_id) == (1, 2, -1)

    def test_it_splits_as_llama_does(self, trained, documents):
        assert trained.encode("0199", bos=False, eos=False)[1:] == [
            trained.encode(digit, bos=False, eos=False)[-1] for digit in "0199"
        ]
        line_end = trained.encode("\n", bos=False, eos=False)[-1]
        assert trained.piece(line_end) == "<0x0A>"
        printable = {chr(i) for i in range(0x21, 0x7F)}
        assert printable <= {trained.piece(i) for i in range(512)}
        text = documents[0]
        assert len(trained.encode(text, bos=False, eos=False)) < len(text) / 2

    def test_the_settings_are_llamas(self, trained, reference):
        # Its corpus, its size and the machine it was trained on are not settings.
        circumstances = set(
            "input input_format input_sentence_size model_prefix num_threads "
            "required_chars vocab_size".split()
        )

        def recorded(tokenizer):
            model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model_bytes)
            return {
                field.name: getattr(spec, field.name)
                for spec in (model.trainer_spec, model.normalizer_spec)
                for field in spec.DESCRIPTOR.fields
                if field.name not in circumstances
            }

        path = reference / "tokenizer" / "tokenizer.model"
        assert recorded(trained) == recorded(Tokenizer(path))

    def test_the_same_documents_give_the_same_file(self, documents, trained, tmp_path):
        again = train_tokenizer(iter(documents), tmp_path / "t.model", vocab_size=512)
        assert again.model_bytes == trained.model_bytes

    def test_nothing_is_dropped_from_long_or_odd_documents(self, tmp_path):
        line = "wonderful " * 2_000 + "\0" + "marvellous\u2585" * 20 + "\nsplendid" * 20
        unbroken = "我" * 70_000
        tokenizer = train_tokenizer(
            [line, unbroken], tmp_path / "t.model", vocab_size=420
        )
        pieces = {tokenizer.piece(i) for i in range(tokenizer.vocab_size)}
        assert {"▁wonderful", "▁marvellous", "▁splendid", "我" * 16} <= pieces

    def test_ten_megabytes_take_seconds(self, tmp_path):
        draw = random.Random(1)
        words = [
            "".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 10)))
            for _ in range(30_000)
        ]
        documents = [" ".join(draw.choices(words, k=2_000)) for _ in range(750)]
        assert sum(map(len, documents)) > 10_000_000
        start = time.perf_counter()
        tokenizer = train_tokenizer(documents, tmp_path / "t.model", vocab_size=4_096)
        assert time.perf_counter() - start < 30
        assert tokenizer.vocab_size == 4_096

    @pytest.mark.parametrize("documents", [[], ["", " \n\t\n "]])
    def test_no_text(self, tmp_path, documents):
        with pytest.raises(TokenizerError, match="no text"):
            train_tokenizer(documents, tmp_path / "t.model", vocab_size=512)
        assert not saved_files(tmp_path)

    def test_too_little_text_says_how_much_there_is(self, tmp_path):
        with pytest.raises(TokenizerError, match="at most 374, or more text"):
            train_tokenizer(["hello world"], tmp_path / "t.model", vocab_size=4_096)
        assert not saved_files(tmp_path)
        train_tokenizer(["hello world"], tmp_path / "t.model", vocab_size=374)

    def test_a_vocabulary_below_the_floor(self, tmp_path):
        with pytest.raises(TokenizerError, match="353 is too small.* are 354"):
            train_tokenizer(["hello"], tmp_path / "t.model", vocab_size=353)
        train_tokenizer(["hello"], tmp_path / "t.model", vocab_size=354)

    def test_no_room_for_the_characters(self, tmp_path):
        with pytest.raises(TokenizerError, match="give at least 357"):
            train_tokenizer(["héllö wørld"], tmp_path / "t.model", vocab_size=354)

    def test_a_lone_surrogate_names_its_document(self, tmp_path):
        with pytest.raises(
            TokenizerError, match="document 2: .*at character 3 is a lone"
        ):
            train_tokenizer(
                ["fine", "a\nb\udc00"], tmp_path / "t.model", vocab_size=400
            )

    def test_an_error_of_the_documents_comes_through(self, tmp_path):
        def documents():
            yield "hello"
            raise OSError("the disk went away")

        with pytest.raises(OSError, match="the disk went away"):
            train_tokenizer(documents(), tmp_path / "t.model", vocab_size=400)


def saved_files(directory):
    return [path for path in directory.rglob("*") if path.is_file()]
