"""What Triton's clients ask of a model beside answers: its configuration and its statistics."""

from collections.abc import Mapping

from jaxserve.engine.outputs import ModelInfo
from jaxserve.server.kserve import open_inference_pb2 as pb
from jaxserve.server.metrics.histogram import Histogram
from jaxserve.server.metrics.totals import Totals

_TYPES = {"BYTES": pb.TYPE_STRING, "BOOL": pb.TYPE_BOOL, "UINT32": pb.TYPE_UINT32}
_FACTS = ("family", "dtype", "platform", "max_model_len", "max_num_seqs", "max_num_batched_tokens")


def model_config(
    info: ModelInfo, inputs: Mapping[str, str], outputs: Mapping[str, str], required: str
) -> pb.ModelConfig:
    """The model as Triton would describe it.

    Args:
        info: facts about it.
        inputs, outputs: its tensors' types by name.
        required: the one input that may not be left out, and may have any number of elements.
    """
    config = pb.ModelConfig(name=info.name, platform="jaxserve", backend="jaxserve")
    config.model_transaction_policy.decoupled = True
    for name, datatype in inputs.items():
        is_required = name == required
        config.input.add(
            name=name,
            data_type=_TYPES[datatype],
            dims=[-1 if is_required else 1],
            optional=not is_required,
        )
    for name, datatype in outputs.items():
        config.output.add(name=name, data_type=_TYPES[datatype], dims=[-1])
    for name in _FACTS:
        config.parameters[name].string_value = str(getattr(info, name))
    return config


def model_statistics(name: str, version: str, totals: Totals | None) -> pb.ModelStatistics:
    """What was counted of a model's requests.

    Args:
        name, version: the model's.
        totals: of one moment; None before anything was counted.
    """
    found = pb.ModelStatistics(name=name, version=version)
    if totals is None:
        return found
    histograms = totals.histograms
    total = _duration(histograms["e2e_request_latency_seconds"])
    num_failed = sum(n for reason, n in totals.finished.items() if not reason.is_natural)
    found.last_inference = int(totals.last_ended * 1000)
    found.inference_count = total.count
    found.execution_count = totals.counts["steps"]
    found.inference_stats.success.CopyFrom(total)
    found.inference_stats.fail.count = num_failed
    found.inference_stats.queue.CopyFrom(_duration(histograms["request_queue_time_seconds"]))
    found.inference_stats.compute_infer.CopyFrom(
        _duration(histograms["request_inference_time_seconds"])
    )
    return found


def _duration(counted: Histogram) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=counted.count, ns=int(counted.sum * 1e9))
