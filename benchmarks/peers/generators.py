"""This project and its peers behind one function: rows of ids in, as many ids out.

    python generators.py NAME MODELS CACHE_LENGTH

What `benchmarks/generate.py` starts for each contender, with the Python that has it.
Answers each line of JSON, {"rows": ids of prompts of one length, "new": how many to
write}, with another: {"seconds": ..., "tokens": ids, greedy, past any EOS}.
"""

import functools
import importlib
import json
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Rows of ids and how many to write: the ids written after each.
Run = Callable[[list[list[int]], int], list[list[int]]]

THREADS = len(os.sched_getaffinity(0))


def ours(models: Path, cache_length: int, *, weights: str | None = None) -> Run:
    """This project."""
    llama_jax = importlib.import_module("llama_jax")
    llm = llama_jax.load(models / "orbax", cache_length=cache_length, weights=weights)

    def run(rows: list[list[int]], new: int) -> list[list[int]]:
        written = llm.generate(rows, max_new_tokens=new, sampler=llama_jax.Greedy())
        return [completion.tokens for completion in written]

    return run


def transformers(models: Path, cache_length: int, *, compiled: bool = False) -> Run:
    """PyTorch and transformers, in a loop that is no slower than their `generate`."""
    torch = importlib.import_module("torch")
    peer = importlib.import_module("transformers")
    torch.set_num_threads(THREADS)
    model = peer.LlamaForCausalLM.from_pretrained(models / "hf", dtype=torch.float32)
    forward = torch.compile(model, dynamic=False) if compiled else model

    @torch.inference_mode()
    def run(rows: list[list[int]], new: int) -> list[list[int]]:
        ids, written = torch.tensor(rows), list[Any]()
        # A cache that grows is its default; what is compiled needs one that does not.
        past = peer.StaticCache(model.config, cache_length) if compiled else None
        for _ in range(new):
            output = forward(
                ids, past_key_values=past, use_cache=True, logits_to_keep=1
            )
            ids, past = output.logits[:, -1:].argmax(-1), output.past_key_values
            written.append(ids)
        return torch.cat(written, 1).tolist()

    return run


def tunix(models: Path, cache_length: int) -> Run:
    """Google's tunix: its Llama and its sampler."""
    jnp = importlib.import_module("jax.numpy")
    llama3 = importlib.import_module("tunix.models.llama3.model")
    params = importlib.import_module("tunix.models.llama3.params")
    sampler = importlib.import_module("tunix.generate.sampler")
    hf = json.loads((models / "hf" / "config.json").read_text())
    num_layers, num_heads = hf["num_hidden_layers"], hf["num_key_value_heads"]
    head_dim = hf["hidden_size"] // hf["num_attention_heads"]
    config = llama3.ModelConfig(
        num_layers=num_layers,
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=head_dim,
        num_kv_heads=num_heads,
        rope_theta=int(hf["rope_theta"]),
        norm_eps=hf["rms_norm_eps"],
    )
    # Its attention passes no theta on, so every model gets this default.
    llama3.apply_rope.__defaults__ = (config.rope_theta,)
    model = params.create_model_from_safe_tensors(
        str(models / "hf"), config, dtype=jnp.float32
    )
    # It takes text: these are ids already, and no id pads them or ends them.
    tokenizer = types.SimpleNamespace(
        encode=list,
        decode=list,
        bos_id=lambda: None,
        eos_id=lambda: -1,
        pad_id=lambda: -1,
    )
    sizes = sampler.CacheConfig(cache_length, num_layers, num_heads, head_dim)
    sample = sampler.Sampler(model, tokenizer, sizes)

    def run(rows: list[list[int]], new: int) -> list[list[int]]:
        return [ids.tolist() for ids in sample(rows, max_generation_steps=new).tokens]

    return run


def flax(models: Path, cache_length: int) -> Run:
    """FlaxLlama, which transformers had until version 5; it sizes its own cache."""
    del cache_length
    jax = importlib.import_module("jax")
    peer = importlib.import_module("transformers")
    model = peer.FlaxLlamaForCausalLM.from_pretrained(models / "hf", from_pt=True)
    params = model.params

    # Its own `generate` compiles anew at each call.
    @jax.jit(static_argnames="new")
    def generate(params: Any, ids: Any, *, new: int) -> Any:
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return model.generate(
            ids, params=params, max_new_tokens=new, **settings
        ).sequences

    def run(rows: list[list[int]], new: int) -> list[list[int]]:
        ids = jax.numpy.asarray(rows)
        return generate(params, ids, new=new)[:, ids.shape[1] :].tolist()

    return run


def llama_cpp(models: Path, cache_length: int, *, kind: str) -> Run:
    """llama.cpp, through the C API that llama-cpp-python binds."""
    np = importlib.import_module("numpy")
    c = importlib.import_module("llama_cpp")
    file = models / f"{kind}.gguf"
    if not file.exists():
        write_gguf(models / "hf", file, kind=kind)
    model = c.llama_model_load_from_file(bytes(file), c.llama_model_default_params())
    vocab_size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))

    @functools.cache
    def context(num_rows: int) -> Any:
        settings = c.llama_context_default_params()
        settings.n_ctx = cache_length * num_rows
        settings.n_seq_max = num_rows
        settings.n_threads = settings.n_threads_batch = THREADS
        return c.llama_init_from_model(model, settings)

    def extend(state: Any, rows: list[list[int]], start: int) -> list[int]:
        batch = c.llama_batch_init(sum(map(len, rows)), 0, 1)
        for row, ids in enumerate(rows):
            for column, token in enumerate(ids):
                i = batch.n_tokens
                batch.token[i], batch.pos[i] = token, start + column
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
                batch.logits[i] = column == len(ids) - 1
                batch.n_tokens += 1
        if c.llama_decode(state, batch):
            raise RuntimeError(f"llama.cpp cannot decode {batch.n_tokens} tokens.")
        c.llama_batch_free(batch)
        # Of each row's last token, counted from the end.
        logits = [c.llama_get_logits_ith(state, i) for i in range(-len(rows), 0)]
        return [
            int(np.ctypeslib.as_array(each, (vocab_size,)).argmax()) for each in logits
        ]

    def run(rows: list[list[int]], new: int) -> list[list[int]]:
        state = context(len(rows))
        c.llama_memory_clear(c.llama_get_memory(state), False)
        steps, length = [extend(state, rows, 0)], len(rows[0])
        for position in range(length, length + new - 1):
            steps.append(extend(state, [[token] for token in steps[-1]], position))
        return [list(ids) for ids in zip(*steps, strict=True)]

    return run


def write_gguf(source: Path, target: Path, *, kind: str) -> None:
    """A checkpoint of Hugging Face's for llama.cpp, its weights "F32" or "Q8_0"."""
    gguf = importlib.import_module("gguf")
    tensors = importlib.import_module("safetensors.numpy")
    hf = json.loads((source / "config.json").read_text())
    heads, layers = hf["num_attention_heads"], hf["num_hidden_layers"]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_rope_dimension_count(hf["hidden_size"] // heads)
    writer.add_rope_freq_base(hf["rope_theta"])
    writer.add_vocab_size(hf["vocab_size"])
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    weights = tensors.load_file(source / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # Its rotary pairs are neighbours, as Meta's are; Hugging Face's halves.
            halves = weight.reshape(heads, 2, -1, weight.shape[-1])
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        stored = gguf.GGMLQuantizationType[kind if weight.ndim > 1 else "F32"]
        writer.add_tensor(
            names.get_name(name, (".weight",)),
            gguf.quantize(weight, stored),
            raw_dtype=stored,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


CONTENDERS: dict[str, Callable[[Path, int], Run]] = {
    "llama-jax": ours,
    "llama-jax int8": functools.partial(ours, weights="int8"),
    "transformers": transformers,
    "transformers, compiled": functools.partial(transformers, compiled=True),
    "tunix": tunix,
    "FlaxLlama": flax,
    "llama.cpp f32": functools.partial(llama_cpp, kind="F32"),
    "llama.cpp q8_0": functools.partial(llama_cpp, kind="Q8_0"),
}


def main() -> None:
    """Load, and answer until there are no more questions."""
    name, models, cache_length = sys.argv[1:]
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    run = CONTENDERS[name](Path(models), int(cache_length))
    for line in sys.stdin:
        question = json.loads(line)
        start = time.perf_counter()
        tokens = run(question["rows"], question["new"])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers)


if __name__ == "__main__":
    main()
