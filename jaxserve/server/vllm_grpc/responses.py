"""What the engine says, as messages of vLLM's engine protocol."""

from collections.abc import Sequence

from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.engine.outputs import TokenDelta


class AnswerMessages:
    """Makes the messages of one answer out of its deltas.

    A stream has a chunk per delta and then the complete answer, otherwise there is only that.
    Counts in chunks are of the chunk, as vLLM has them; gateways add them up.

    Args:
        index: which of the n answers.
        prompt: token ids of the prompt.
        streams: whether there are chunks.
    """

    def __init__(self, index: int, prompt: Sequence[int], *, streams: bool) -> None:
        self._index = index
        self._prompt = prompt
        self._streams = streams
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: Sequence[TokenLogprobs] | None = None

    def add(self, delta: TokenDelta) -> list[pb.GenerateResponse]:
        """The messages that a delta makes."""
        self._token_ids += delta.token_ids
        messages = []
        if self._streams:
            messages.append(pb.GenerateResponse(chunk=self._chunk(delta)))
        else:
            self._logprobs += delta.logprobs
            self._prompt_logprobs = delta.prompt_logprobs or self._prompt_logprobs
        if delta.finish_reason is not None:
            messages.append(pb.GenerateResponse(complete=self._complete(delta)))
        return messages

    def _chunk(self, delta: TokenDelta) -> pb.GenerateStreamChunk:
        return pb.GenerateStreamChunk(
            token_ids=delta.token_ids,
            prompt_tokens=delta.num_prompt_tokens,
            completion_tokens=len(delta.token_ids),
            cached_tokens=delta.num_cached_tokens,
            output_logprobs=_output_logprobs(delta.logprobs),
            input_logprobs=self._input_logprobs(delta.prompt_logprobs),
            index=self._index,
        )

    def _complete(self, delta: TokenDelta) -> pb.GenerateComplete:
        complete = pb.GenerateComplete(
            output_ids=self._token_ids,
            finish_reason=delta.finish_reason,
            prompt_tokens=delta.num_prompt_tokens,
            completion_tokens=delta.num_output_tokens,
            cached_tokens=delta.num_cached_tokens,
            output_logprobs=_output_logprobs(self._logprobs),
            input_logprobs=self._input_logprobs(self._prompt_logprobs),
            index=self._index,
        )
        if isinstance(delta.stop_reason, str):
            complete.matched_stop_str = delta.stop_reason
        elif delta.stop_reason is not None:
            complete.matched_token_id = delta.stop_reason
        return complete

    def _input_logprobs(self, places: Sequence[TokenLogprobs] | None) -> pb.InputLogProbs | None:
        if not places:
            return None
        message = pb.InputLogProbs(token_ids=self._prompt)
        message.token_logprobs.add()  # nothing comes before the first token
        message.top_logprobs.add()
        for place in places:
            message.token_logprobs.add(value=place.logprob)
            message.top_logprobs.add(values=place.top_logprobs, token_ids=place.top_ids)
        return message


def _output_logprobs(places: Sequence[TokenLogprobs]) -> pb.OutputLogProbs | None:
    if not places:
        return None
    message = pb.OutputLogProbs(
        token_logprobs=[place.logprob for place in places],
        token_ids=[place.token_id for place in places],
    )
    if any(place.top_ids for place in places):
        for place in places:
            message.top_logprobs.add(values=place.top_logprobs, token_ids=place.top_ids)
    return message
