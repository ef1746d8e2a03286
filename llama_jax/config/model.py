"""The architecture of one Llama: nine numbers, and the presets of both papers."""

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from llama_jax.errors import ConfigError

# What a model ends with, as its parameters name it: logits of the next token, or one
# number at each position.
Head = Literal["unembed", "scalar"]

_META_KEYS = frozenset(
    {
        "dim",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "vocab_size",
        "multiple_of",
        "ffn_dim_multiplier",
        "norm_eps",
        "rope_theta",
        "use_scaled_rope",
        # Run-time sizes that Meta's `ModelArgs` also accepts; they shape no weight.
        "max_batch_size",
        "max_seq_len",
    }
)


class TextFile(Protocol):
    """A path, on a disk or in a bucket."""

    def read_text(self, encoding: str) -> str:
        """All of it."""
        ...


JsonSource = str | TextFile | Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The sizes and constants that define a Llama (paper, Table 1 and section 2.2).

    Attributes:
      vocab_size: pieces of the tokenizer, V; the embedding may be padded beyond them.
      dim: width of the residual stream, D.
      num_layers: blocks, L.
      num_heads: query heads, N.
      num_kv_heads: key and value heads, K; each serves N / K query heads.
      hidden_dim: inner width of the SwiGLU feed-forward layer, F.
      norm_eps: added to the mean square inside RMSNorm.
      rope_theta: base of the rotary frequencies; 1e4 in Llama 1 and 2, 1e6 in
        Code Llama.
      max_length: the longest sequence, in tokens, that the model is meant for.

    Raises:
      ConfigError: a size that is not a positive integer, or sizes that do not divide.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_dim: int
    norm_eps: float
    rope_theta: float
    max_length: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is float:
                _require_positive_number(field.name, value)
            else:
                _require_positive_integer(field.name, value)
        if self.dim % self.num_heads:
            raise ConfigError(
                f"dim {self.dim} does not divide into num_heads {self.num_heads}: "
                f"choose a dim that is a multiple of {self.num_heads}."
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"dim / num_heads = {self.head_dim} is odd, but rotary embeddings "
                "turn pairs of features: choose sizes that make it even."
            )
        N = self.num_heads
        if N % self.num_kv_heads:
            divisors = [k for k in range(1, N + 1) if N % k == 0]
            raise ConfigError(
                f"num_kv_heads {self.num_kv_heads} does not divide num_heads {N}: "
                f"choose one of {divisors}."
            )

    @property
    def head_dim(self) -> int:
        """Features of one head, H = D / N."""
        return self.dim // self.num_heads

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head, G = N / K."""
        return self.num_heads // self.num_kv_heads

    # The presets. Llama 2: paper, Table 1, sizes from the released `params.json`.

    @classmethod
    def _preset(
        cls,
        *,
        dim: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        norm_eps: float = 1e-5,
        max_length: int = 4096,
    ) -> Self:
        return cls(
            vocab_size=32_000,
            dim=dim,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads or num_heads,
            hidden_dim=hidden_dim(
                dim, multiple_of=multiple_of, ffn_dim_multiplier=ffn_dim_multiplier
            ),
            norm_eps=norm_eps,
            rope_theta=1e4,
            max_length=max_length,
        )

    @classmethod
    def llama2_7b(cls) -> Self:
        """Llama 2 7B: 6,738,415,616 parameters."""
        return cls._preset(dim=4096, num_layers=32, num_heads=32)

    @classmethod
    def llama2_13b(cls) -> Self:
        """Llama 2 13B: 13,015,864,320 parameters."""
        return cls._preset(dim=5120, num_layers=40, num_heads=40)

    @classmethod
    def llama2_34b(cls) -> Self:
        """Llama 2 34B: 33,743,970,304 parameters, by inference.

        Meta never released it and the paper prints no sizes. These are Code Llama
        34B's, which was trained from it (arXiv 2308.12950); eight key/value heads as
        in the paper's section A.2.1. Its rotary base is Llama 2's 1e4, not Code
        Llama's 1e6.
        """
        return cls._preset(dim=8192, num_layers=48, num_heads=64, num_kv_heads=8)

    @classmethod
    def llama2_70b(cls) -> Self:
        """Llama 2 70B: 68,976,648,192 parameters."""
        return cls._preset(
            dim=8192,
            num_layers=80,
            num_heads=64,
            num_kv_heads=8,
            multiple_of=4096,
            ffn_dim_multiplier=1.3,
        )

    @classmethod
    def llama1_7b(cls) -> Self:
        """Llama 1 7B (arXiv 2302.13971): Llama 2's sizes, half its context."""
        return cls._preset(
            dim=4096, num_layers=32, num_heads=32, norm_eps=1e-6, max_length=2048
        )

    @classmethod
    def llama1_13b(cls) -> Self:
        """Llama 1 13B (arXiv 2302.13971): Llama 2's sizes, half its context."""
        return cls._preset(
            dim=5120, num_layers=40, num_heads=40, norm_eps=1e-6, max_length=2048
        )

    @classmethod
    def llama1_33b(cls) -> Self:
        """Llama 1 33B (arXiv 2302.13971): 32,528,943,616 parameters."""
        return cls._preset(
            dim=6656, num_layers=60, num_heads=52, norm_eps=1e-6, max_length=2048
        )

    @classmethod
    def llama1_65b(cls) -> Self:
        """Llama 1 65B (arXiv 2302.13971): 65,285,660,672 parameters."""
        return cls._preset(dim=8192, num_layers=80, num_heads=64, max_length=2048)

    @classmethod
    def tiny(cls) -> Self:
        """For tests and first steps: grouped-query heads, 119,104 parameters."""
        return cls(
            vocab_size=256,
            dim=64,
            num_layers=2,
            num_heads=8,
            num_kv_heads=4,
            hidden_dim=160,
            norm_eps=1e-5,
            rope_theta=1e4,
            max_length=128,
        )

    @classmethod
    def from_params_json(
        cls,
        source: JsonSource,
        *,
        max_length: int,
        vocab_size: int | None = None,
    ) -> Self:
        """The architecture that Meta's `params.json` describes.

        Args:
          source: the file, or its content.
          max_length: the context in tokens; Meta's file does not state it.
          vocab_size: taken where the file says -1 ("ask the tokenizer"), as the
            released files do.

        Raises:
          ConfigError: the file is missing or not JSON, a key is unknown, or a size
            is absent or impossible.
        """
        where, params = _read_json(source, "params.json")
        _require_known_keys(where, params)
        if params.get("use_scaled_rope"):
            raise ConfigError(
                f"{where}: use_scaled_rope is true, which is Llama 3.1's rotary "
                "scaling: this project loads Llama 1, Llama 2 and Code Llama."
            )
        for key in ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps"):
            if key not in params:
                raise ConfigError(f"{where}: the key {key!r} is missing.")
        stated = params.get("vocab_size", -1)
        if stated == -1:
            if vocab_size is None:
                raise ConfigError(
                    f"{where}: vocab_size is -1, so it has to come from a tokenizer "
                    "or from the embedding's rows: give vocab_size."
                )
            stated = vocab_size
        try:
            for key in ("dim", "n_layers", "n_heads", "multiple_of"):
                _require_positive_integer(key, params[key])
            multiplier = params.get("ffn_dim_multiplier")
            if multiplier is not None:
                _require_positive_number("ffn_dim_multiplier", multiplier)
            rope_theta = params.get("rope_theta", 1e4)
            _require_positive_number("rope_theta", rope_theta)
            return cls(
                vocab_size=stated,
                dim=params["dim"],
                num_layers=params["n_layers"],
                num_heads=params["n_heads"],
                num_kv_heads=_given(params, "n_kv_heads", params["n_heads"]),
                hidden_dim=hidden_dim(
                    params["dim"],
                    multiple_of=params["multiple_of"],
                    ffn_dim_multiplier=multiplier,
                ),
                norm_eps=params["norm_eps"],
                rope_theta=float(rope_theta),
                max_length=max_length,
            )
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"{where}: {error}") from error

    @classmethod
    def from_hf_config(cls, source: JsonSource) -> Self:
        """The architecture that a Hugging Face `config.json` describes.

        Raises:
          ConfigError: the file is missing or not JSON, a field is absent, or it
            describes something that Llama 2 is not (named field by field).
        """
        where, config = _read_json(source, "config.json")
        llama2_only = {
            "model_type": ("llama",),
            "hidden_act": ("silu",),
            "attention_bias": (False, None),
            "mlp_bias": (False, None),
            "rope_scaling": (None,),
            "tie_word_embeddings": (False, None),
        }
        for field, allowed in llama2_only.items():
            value = config.get(field, allowed[-1])
            if value not in allowed:
                raise ConfigError(
                    f"{where}: {field} is {value!r}; a Llama 2 has {allowed[0]!r}, so "
                    "this is another model."
                )
        rope = config.get("rope_parameters") or {}  # transformers 5 moved the base here
        if rope.get("rope_type", "default") != "default":
            raise ConfigError(
                f"{where}: rope_parameters.rope_type is {rope['rope_type']!r}; Llama 2 "
                "has no rotary scaling, so this is another model."
            )
        try:
            rope_theta = rope.get("rope_theta", config.get("rope_theta", 1e4))
            _require_positive_number("rope_theta", rope_theta)
            sizes = cls(
                vocab_size=config["vocab_size"],
                dim=config["hidden_size"],
                num_layers=config["num_hidden_layers"],
                num_heads=config["num_attention_heads"],
                num_kv_heads=_given(
                    config, "num_key_value_heads", config["num_attention_heads"]
                ),
                hidden_dim=config["intermediate_size"],
                norm_eps=config["rms_norm_eps"],
                rope_theta=float(rope_theta),
                max_length=config["max_position_embeddings"],
            )
        except KeyError as error:
            raise ConfigError(f"{where}: the field {error} is missing.") from error
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"{where}: {error}") from error
        if config.get("head_dim", sizes.head_dim) not in (sizes.head_dim, None):
            raise ConfigError(
                f"{where}: head_dim is {config['head_dim']}; a Llama 2 of these sizes "
                f"has hidden_size / num_attention_heads = {sizes.head_dim}."
            )
        return sizes


def hidden_dim(dim: int, *, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """The inner width F of the feed-forward layer, by Meta's rule.

    Two thirds of 4 D, times the multiplier if there is one, each rounded down, then
    rounded up to a multiple (spec of `llama/model.py`): 70B is 21845, 28398, 28672.
    """
    width = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return multiple_of * math.ceil(width / multiple_of)


def _read_json(source: JsonSource, name: str) -> tuple[str, dict[str, Any]]:
    """What to call the source in an error, and its content."""
    if isinstance(source, Mapping):
        return name, dict(source)
    path = Path(source) if isinstance(source, str) else source
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist: it belongs beside the weights; copy it from "
            "where they came from."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not JSON: {error}. Copy it again.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, not an object.")
    return str(path), content


def _given(fields: Mapping[str, Any], name: str, default: Any) -> Any:
    """A field that may be absent or null; 0 is neither."""
    value = fields.get(name)
    return default if value is None else value


def _require_known_keys(where: str, params: Mapping[str, Any]) -> None:
    for key in params:
        if key not in _META_KEYS:
            near = difflib.get_close_matches(key, _META_KEYS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"{where}: unknown key {key!r}.{hint} It may describe something that "
                "this project would ignore, so it is refused; the known keys are "
                f"{', '.join(sorted(_META_KEYS))}."
            )


def _require_positive_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, not {value!r}.")


def _require_positive_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a positive number, not {value!r}.")
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} must be a positive number, not {value!r}.")
