"""Errors for people: each says what is wrong, where, and what to do.

Every error that a user can cause is a `LlamaError`; those about a value are
`ValueError`s too. The command line prints them as one line, without a traceback.
"""


class LlamaError(Exception):
    """What is wrong, where it is, and what would put it right."""


class ConfigError(LlamaError, ValueError):
    """A model, data or training configuration that cannot be used."""


class RecipeError(LlamaError, ValueError):
    """A recipe that cannot be found, loaded or resolved."""


class CheckpointError(LlamaError):
    """A checkpoint that is missing, damaged, incomplete or of another model."""


class TokenizerError(LlamaError, ValueError):
    """A tokenizer that is missing, damaged or does not fit the model."""


class DialogError(LlamaError, ValueError):
    """A conversation that Llama 2 chat models do not accept."""


class DataError(LlamaError, ValueError):
    """A data set that is missing, damaged, empty or does not fit the run."""


class GenerationError(LlamaError, ValueError):
    """A request for text that cannot be served as asked."""


class TrainingError(LlamaError):
    """A run that cannot go on: a loss that is not a number, memory exhausted."""


class PlanError(LlamaError, ValueError):
    """A topology that does not exist, or a plan that cannot be made."""
