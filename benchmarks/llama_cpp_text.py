"""Greedy text from llama.cpp through its C interface: the peer on CPUs.

`generate` times it through `llama-cpp-python`, `serve` through `cyllama`; both need `gguf`.
"""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # who times or measures llama.cpp alone needs no jax
    from models.config import DecoderConfig


def write_gguf(folder: pathlib.Path, config: "DecoderConfig", file: pathlib.Path) -> None:
    """Writes a Llama's safetensors as GGUF, without a tokenizer.

    GGUF wants the rows of queries and keys in another order. They are left as they are, so the
    result is wrong, but it takes as long as the right one.
    """
    import gguf

    from models.checkpoints.gguf import LLAMA
    from models.checkpoints.tensors import open_folder

    # Where two names of GGUF mean one of ours, the first is Llama's.
    names = {theirs: name for name, theirs in reversed(LLAMA.items())}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.d_head)
    writer.add_vocab_size(config.vocab)
    writer.add_tokenizer_model("none")
    tensors = open_folder(folder)
    for name, shape in tensors.shapes.items():
        array = tensors.read(name, tuple(slice(0, n) for n in shape))
        module, _, end = name.rpartition(".")
        layer = ""
        if module.startswith("model.layers."):
            _, _, number, module = module.split(".", 3)
            layer = f"blk.{number}."
        short = array.dtype.name == "bfloat16"
        if short and len(shape) == 1:  # GGUF has no 16-bit norms
            array, short = array.astype(np.float32), False
        writer.add_tensor(
            f"{layer}{names[module]}.{end}",
            np.ascontiguousarray(array).view(np.uint8) if short else np.ascontiguousarray(array),
            raw_dtype=gguf.GGMLQuantizationType.BF16 if short else None,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def greedy(file: pathlib.Path, tokens: np.ndarray, new: int) -> Callable[[], Any]:
    """A function that continues `tokens` `[B, T]` by `new` tokens, on all processors."""
    import llama_cpp as cpp

    batch, length = tokens.shape
    cpp.llama_backend_init()
    _quiet(cpp)
    model = cpp.llama_model_load_from_file(str(file).encode(), cpp.llama_model_default_params())
    params = cpp.llama_context_default_params()
    params.n_ctx = batch * (length + new)
    params.n_batch = params.n_ubatch = batch * length
    params.n_seq_max = batch
    params.n_threads = params.n_threads_batch = os.cpu_count() or 1
    context = cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp cannot run {file}")
    vocab = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))
    batch_of_tokens = cpp.llama_batch_init(batch * length, 0, 1)

    def decode(rows: np.ndarray, first: int) -> np.ndarray:
        """Reads `rows` `[B, t]` from position `first` on; the likeliest next tokens `[B, 1]`."""
        width = rows.shape[1]
        batch_of_tokens.n_tokens = rows.size
        for i, token in enumerate(rows.reshape(-1)):
            batch_of_tokens.token[i], batch_of_tokens.pos[i] = int(token), first + i % width
            batch_of_tokens.n_seq_id[i], batch_of_tokens.seq_id[i][0] = 1, i // width
            batch_of_tokens.logits[i] = i % width == width - 1
        if cpp.llama_decode(context, batch_of_tokens):
            raise RuntimeError("llama.cpp failed")
        last = (width * (row + 1) - 1 for row in range(batch))
        logits = (
            np.ctypeslib.as_array(cpp.llama_get_logits_ith(context, i), (vocab,)) for i in last
        )
        return np.array([[row.argmax()] for row in logits])

    def run():
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        next_ = decode(tokens, 0)
        for step in range(new - 1):
            next_ = decode(next_, length + step)
        return next_

    run()
    return run


def greedy_together(
    file: pathlib.Path, streams: int, prompt: int, new: int
) -> Callable[[Sequence[Sequence[int]]], list[list[int]]]:
    """A function that continues as many prompts at once, as llama.cpp's server does it.

    It is the library of `cyllama`, a wheel of llama.cpp, with a thread for each processor. Prompts
    are read in batches of 512 tokens, and the likeliest token is chosen by llama.cpp itself.
    """
    from cyllama.llama import llama_cpp as cpp

    cpp.disable_logging()
    cpp.ggml_backend_load_all()
    model_params = cpp.LlamaModelParams()
    model_params.n_gpu_layers = 0
    model = cpp.LlamaModel(str(file), model_params)
    params = cpp.LlamaContextParams()
    params.n_ctx = streams * (prompt + new)
    params.n_seq_max = streams
    params.n_threads = params.n_threads_batch = os.cpu_count() or 1
    context = cpp.LlamaContext(model, params)
    sampler = cpp.LlamaSampler(cpp.LlamaSamplerChainParams())
    sampler.add_greedy()
    most = params.n_batch
    batch = cpp.LlamaBatch(n_tokens=most, embd=0, n_seq_max=streams)

    def step(entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Reads (token, position, sequence, chooses) of all; the tokens that follow."""
        batch.reset()
        for token, position, sequence, chooses in entries:
            batch.add(token, position, [sequence], chooses)
        context.decode(batch)
        return [sampler.sample(context, i) for i, entry in enumerate(entries) if entry[3]]

    def run(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        context.kv_cache_clear()
        entries = [
            (token, position, sequence, position == len(text) - 1)
            for sequence, text in enumerate(prompts)
            for position, token in enumerate(text)
        ]
        newest = [
            token
            for begin in range(0, len(entries), most)
            for token in step(entries[begin:][:most])
        ]
        texts = [newest]
        for made in range(new - 1):
            newest = step([(t, prompt + made, b, True) for b, t in enumerate(newest)])
            texts.append(newest)
        return [list(tokens) for tokens in zip(*texts, strict=True)]

    return run


def _quiet(cpp: Any) -> None:
    global _silent  # the callback must outlive the call
    _silent = cpp.llama_log_callback(lambda *_: None)
    cpp.llama_log_set(_silent, None)


_silent: Any = None
