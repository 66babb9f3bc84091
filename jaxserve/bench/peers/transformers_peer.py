"""Peer: Hugging Face transformers' own batched `generate` on CPU, float32."""

import importlib
from pathlib import Path

from harness import Spec, main


class TransformersPeer:
    """A float32 model read from the GGUF file, generating greedily and past EOS."""

    def __init__(self, spec: Spec) -> None:
        torch = importlib.import_module("torch")
        transformers = importlib.import_module("transformers")
        torch.set_num_threads(spec["threads"])
        transformers.logging.set_verbosity_error()
        path = Path(spec["model"])
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self._torch = torch
        self._output_len = spec["output_len"]
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()
        # A model's own settings (sampling, EOS) must not shape the work: no EOS, no sampling.
        self._model.generation_config = transformers.GenerationConfig(
            max_new_tokens=self._output_len, do_sample=False, eos_token_id=None, pad_token_id=0
        )

    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Generate for all prompts, which are of one length, as one batch."""
        inputs = self._torch.tensor(prompts)
        with self._torch.inference_mode():
            out = self._model.generate(inputs, attention_mask=self._torch.ones_like(inputs))
        return out[:, inputs.shape[1] :].tolist()


if __name__ == "__main__":
    main(TransformersPeer)
