"""The custom call of paged attention over pools of float32 and bfloat16."""

from typing import Any

from pallas_kernels.cpu_calls.handler import does, make_handler
from pallas_kernels.paged_attention.cpu_decode import add_floats, score_floats
from pallas_kernels.paged_attention.cpu_items import begin, do_item, end


@does()
def _do(frame, memory, item):  # type: ignore[no-untyped-def]
    return do_item(frame, memory, item, score_floats, add_floats)


def make_call() -> Any:
    """The handler of the custom call whose operands and results `cpu.paged_attention` names."""
    return make_handler(begin, _do, end)
