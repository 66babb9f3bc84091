"""Facts and figures about the server, as messages of vLLM's engine protocol."""

import datetime
import importlib.metadata
import json
from collections.abc import Sequence

from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxserve.core.errors import InvalidRequest
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.outputs import EngineLoad
from jaxserve.engine.records import StepRecord

THROUGHPUT_SECONDS = 10.0  # over which tokens per second are counted


def model_info(engine: AsyncEngine) -> pb.GetModelInfoResponse:
    """What is served; fields without a value here are left empty."""
    info, tokenizer = engine.model_info, engine.tokenizer
    return pb.GetModelInfoResponse(
        model_path=info.name,
        served_model_name=info.name,
        model_type=info.family,
        is_generation=True,
        max_context_length=info.max_model_len,
        max_req_input_len=info.max_model_len - 1,  # and one token to answer
        vocab_size=info.vocab_size,
        eos_token_ids=info.eos_token_ids,
        bos_token_id=tokenizer.bos_token_id or 0,
        # Gateways fill them into requests, by the names that vLLM has, too.
        default_sampling_params_json=json.dumps(dict(info.default_sampling_params)),
    )


def server_info(engine: AsyncEngine, uptime_seconds: float) -> pb.GetServerInfoResponse:
    """How it is served. The shards of a mesh are one rank, since none can be asked for."""
    info, load = engine.model_info, engine.load()
    return pb.GetServerInfoResponse(
        active_requests=load.num_running + load.num_waiting,
        uptime_seconds=uptime_seconds,
        server_type="jaxserve",
        data_parallel_size=1,
        kv_cache_dtype=info.kv_cache_dtype,
        block_size=info.page_size,
        attention_backend=info.attention_implementation,
        model_dtype=info.dtype,
        max_num_seqs=info.max_num_seqs,
        constrained_decoding_start="first_token",
    )


def loads(engine: AsyncEngine, request: pb.GetLoadsRequest) -> pb.GetLoadsResponse:
    """The engine's load. Of the sections that can be asked for there is only the core one.

    Raises:
        InvalidRequest: another rank than 0 is asked for.
    """
    if request.dp_rank:
        raise InvalidRequest("there is only dp_rank 0", param="dp_rank")
    load = engine.load()
    info = engine.model_info
    records = engine.records
    used, total = load.num_used_pages, load.num_total_pages
    hits = load.num_device_hit_tokens + load.num_store_hit_tokens
    core = pb.SchedulerLoad(
        num_running_reqs=load.num_running,
        num_waiting_reqs=load.num_waiting,
        num_total_reqs=load.num_running + load.num_waiting,
        num_used_tokens=used * info.page_size,
        max_total_num_tokens=total * info.page_size,
        token_usage=used / total,
        gen_throughput=throughput(records.steps(), records.now()),
        cache_hit_rate=hits / load.num_queried_tokens if load.num_queried_tokens else 0.0,
        utilization=_utilization(load, info.max_num_seqs),
        max_running_requests=info.max_num_seqs,
    )
    return pb.GetLoadsResponse(
        timestamp=datetime.datetime.now(datetime.UTC).isoformat(),
        version=importlib.metadata.version("jaxserve"),
        dp_rank_count=1,
        loads=[core],
    )


def _utilization(load: EngineLoad, max_num_seqs: int) -> float:
    """Of slots or pages, whichever is scarcer."""
    return max(load.num_running / max_num_seqs, load.num_used_pages / load.num_total_pages)


def throughput(steps: Sequence[StepRecord], now: float) -> float:
    """Tokens per second that were generated of late.

    Args:
        steps: the last ones, oldest first.
        now: seconds on their clock.
    """
    recent = [step for step in steps if step.collected > now - THROUGHPUT_SECONDS]
    if not recent:
        return 0.0
    # The ring may hold less than the whole time.
    seconds = now - max(recent[0].launched, now - THROUGHPUT_SECONDS)
    return sum(step.num_generated for step in recent) / seconds if seconds > 0 else 0.0
