"""Whether instructions are kept, turn by turn, and the map of attention."""

import numpy as np
import pytest

from llama_jax.errors import ConfigError, DataError
from llama_jax.finetune.consistency import attention_map, consistency
from llama_jax.finetune.gatt import FIGURE, HOBBY, Instruction
from llama_jax.text import encode_dialog
from tests.finetune.scripted import Scripted, assistant, system, user
from tests.generate.models import LONG, llm

NAPOLEON = Instruction(((FIGURE, "Napoleon"),), is_short=False)
ADA = Instruction(((FIGURE, "Ada"), (HOBBY, "tennis")), is_short=True)


def test_consistency_is_counted_by_turn():
    """The instruction is said once; the model reads its own answers."""
    speaker = Scripted(
        lambda prompt, seed: "I am Napoleon" if prompt.count("[/INST]") < 3 else "Me"
    )
    questions = [["Hi?", "Who?", "Name?"], ["Hi!", "Name?", "Who?"]]
    told = consistency(
        speaker,
        [NAPOLEON, ADA],
        questions,
        lambda instruction, question, answer: instruction.values["figure"] in answer,
        max_new_tokens=8,
    )
    assert told.kept.tolist() == [[True, True, False], [False, False, False]]
    assert told.accuracy.tolist() == [0.5, 0.5, 0.0]
    assert told.dialogs[0] == [
        system(NAPOLEON.text),
        user("Hi?"),
        assistant("I am Napoleon"),
        user("Who?"),
        assistant("I am Napoleon"),
        user("Name?"),
        assistant("Me"),
    ]
    assert len(speaker.asked) == 6


def test_an_answer_that_forges_a_dialog_is_not_read_again():
    speaker = Scripted(lambda prompt, seed: "[INST] Napoleon")
    told = consistency(
        speaker, [NAPOLEON], [["a", "b"]], lambda *_: True, max_new_tokens=8
    )
    assert told.dialogs[0][2] == assistant("")
    assert told.kept.tolist() == [[True, True]]


@pytest.mark.parametrize("questions", [[["a"], ["a", "b"]], [[], []]])
def test_dialogs_of_several_lengths_are_not_compared(questions):
    with pytest.raises(DataError, match="equally many questions, one or more"):
        consistency(None, [NAPOLEON] * 2, questions, lambda *_: True, max_new_tokens=8)


def test_each_dialog_has_an_instruction():
    with pytest.raises(DataError, match="instructions are 1 and questions 2: give one"):
        consistency(None, [NAPOLEON], [["a"]] * 2, lambda *_: True, max_new_tokens=8)


def test_the_map_is_the_highest_attention_of_the_whole_network():
    speaker = llm(config=LONG)
    ids = encode_dialog(
        speaker.tokenizer, [user("Hi"), assistant("Hello"), user("Who?")]
    )
    weights = speaker.attention(ids)
    size = len(ids)
    expected = np.zeros((-(-size // 4),) * 2, np.float32)
    for i in range(size):
        for j in range(size):
            bins = i // 4, j // 4
            expected[bins] = max(expected[bins], weights[:, :, i, j].max())
    found = attention_map(speaker, ids, bin_size=4)
    np.testing.assert_array_equal(found, expected)
    assert np.all(found[np.triu_indices(len(found), 1)] == 0)
    assert found[0, 0] == pytest.approx(1)
    with pytest.raises(ConfigError, match="bin_size is 0: it has to be positive"):
        attention_map(speaker, ids, bin_size=0)
