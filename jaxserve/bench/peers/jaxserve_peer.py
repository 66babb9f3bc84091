"""jaxserve's own side, under the same rules as its peers: the offline `LLM`, float32 by default."""

from harness import Spec, main


class JaxservePeer:
    """`jaxserve.LLM` over a GGUF file; warm once constructed."""

    def __init__(self, spec: Spec) -> None:
        import jax

        from jaxserve import LLM, SamplingParams

        self.version = f"jaxserve, jax {jax.__version__}"
        self._params = SamplingParams(temperature=0, max_tokens=spec["output_len"], ignore_eos=True)
        self._llm = LLM(
            spec["model"],
            dtype="float32",
            prefix_cache=False,  # the prompts come again and again
            max_num_seqs=spec["max_concurrency"],
            max_model_len=spec["max_len"],
            **spec["jaxserve_options"],
        )

    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Generate for all prompts, all given to the engine at once."""
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        results = self._llm.generate(requests, self._params, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]


if __name__ == "__main__":
    main(JaxservePeer)
