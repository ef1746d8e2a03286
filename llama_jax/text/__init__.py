"""Text to token ids and back: the tokenizer, and the format of dialogs."""

from llama_jax.text.chat import Example, encode_dialog, encode_example
from llama_jax.text.tokenizer import (
    StreamDecoder,
    Tokenizer,
    require_fit,
    train_tokenizer,
)

__all__ = [
    "Example",
    "StreamDecoder",
    "Tokenizer",
    "encode_dialog",
    "encode_example",
    "require_fit",
    "train_tokenizer",
]
