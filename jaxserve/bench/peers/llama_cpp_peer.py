"""Peer: llama.cpp through the C interface of llama-cpp-python, N sequences in each batch."""

import importlib
from pathlib import Path

from harness import Spec, main

N_BATCH = 2048  # tokens per llama_decode call, at most
N_UBATCH = 512  # tokens per graph, llama.cpp's default


class LlamaCppPeer:
    """llama.cpp's continuous batch, driven the way its own `batched-bench` drives it."""

    def __init__(self, spec: Spec) -> None:
        llama_cpp = importlib.import_module("llama_cpp")
        self._lib, self._np = llama_cpp.llama_cpp, importlib.import_module("numpy")
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self._output_len = spec["output_len"]
        sequences, max_len = spec["max_concurrency"], spec["max_len"]
        self._quiet = self._lib.llama_log_callback(lambda *_: None)  # kept: C holds a pointer
        self._lib.llama_log_set(self._quiet, None)
        self._lib.llama_backend_init()

        if "quantise" in spec:
            self._quantise(Path(spec["model"]), spec["quantise"])
        model_params = self._lib.llama_model_default_params()
        self._model = self._lib.llama_model_load_from_file(spec["model"].encode(), model_params)
        params = self._lib.llama_context_default_params()
        params.n_seq_max = sequences
        params.n_ctx = sequences * (-(-max_len // 256) * 256)
        params.n_batch, params.n_ubatch = N_BATCH, N_UBATCH
        params.n_threads = params.n_threads_batch = spec["threads"]
        params.kv_unified = spec.get("kv_unified", False)
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp could not make a context")
        vocab = self._lib.llama_model_get_vocab(self._model)
        self._vocab_size = self._lib.llama_vocab_n_tokens(vocab)
        self._batch = self._lib.llama_batch_init(N_BATCH, 0, 1)

    def _quantise(self, target: Path, wanted: dict[str, str]) -> None:
        """Write the quantised model with llama.cpp's own rules, unless it is there."""
        if target.exists():
            return
        params = self._lib.llama_model_quantize_default_params()
        name = f"LLAMA_FTYPE_MOSTLY_{wanted['type'].upper()}"
        if not hasattr(self._lib, name):
            raise RuntimeError(f"llama.cpp knows no quantisation {wanted['type']}")
        params.ftype = getattr(self._lib, name)
        partial = target.with_name(target.name + ".partial")
        source = wanted["source"].encode()
        if self._lib.llama_model_quantize(source, str(partial).encode(), params):
            raise RuntimeError(f"llama.cpp could not quantise {wanted['source']}")
        partial.replace(target)

    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Prefill all prompts in batches of up to N_BATCH tokens, then decode them together."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        last = [self._prefill(group, first) for first, group in self._groups(prompts)]
        tokens = [token for group in last for token in group]
        outputs = [[token] for token in tokens]
        position = len(prompts[0])
        for step in range(self._output_len - 1):
            rows = [(token, position + step, seq, True) for seq, token in enumerate(tokens)]
            tokens = self._decode(rows)
            for output, token in zip(outputs, tokens, strict=True):
                output.append(token)
        return outputs

    def _groups(self, prompts: list[list[int]]) -> list[tuple[int, list[list[int]]]]:
        """Prompts in groups that fit one llama_decode call, each with its first index."""
        size = N_BATCH // len(prompts[0])
        if size == 0:
            raise RuntimeError(f"prompts of more than {N_BATCH} tokens")
        return [(first, prompts[first : first + size]) for first in range(0, len(prompts), size)]

    def _prefill(self, prompts: list[list[int]], first: int) -> list[int]:
        rows = [
            (token, position, first + index, position == len(prompt) - 1)
            for index, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        return self._decode(rows)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Run (token, position, sequence, wants logits) rows; the argmax of those that want."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wants) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wants
        code = self._lib.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode failed with code {code}")
        return [self._argmax(i) for i, row in enumerate(rows) if row[3]]

    def _argmax(self, index: int) -> int:
        logits = self._lib.llama_get_logits_ith(self._context, index)
        return int(self._np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())


if __name__ == "__main__":
    main(LlamaCppPeer)
