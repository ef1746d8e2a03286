import pytest

from llama_jax.config.data import DataConfig
from llama_jax.errors import ConfigError

GOOD = {"paths": ("a", "b"), "weights": (3.0, 1.0), "sequence_length": 8, "seed": 0}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("paths", (), "name one or more directories"),
        ("paths", ("a", ""), "name one or more directories"),
        ("paths", ("a", "a"), "twice"),
        ("weights", (1.0,), "1 numbers for 2 paths"),
        ("weights", (1.0, 0.0), "0.0"),
        ("weights", (1.0, float("nan")), "nan"),
        ("sequence_length", 0, "positive"),
        ("seed", -1, "from 0 to 4294967295"),
        ("seed", 2**32, "from 0 to 4294967295"),
        ("validation_split", "train", "not trained on"),
        ("validation_split", "", "not trained on"),
    ],
)
def test_what_cannot_be_read_is_refused(field, value, message):
    DataConfig(**GOOD)
    with pytest.raises(ConfigError, match=message):
        DataConfig(**GOOD | {field: value})
