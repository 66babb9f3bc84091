"""Tenants, priorities, salts and targets over gRPC: applied, or refused by name."""

import asyncio
import math

import grpc
import pytest

from jaxserve.scheduling.policies import PolicySettings, make_policy
from jaxserve.server.v1 import jaxserve_pb2 as pb


def test_smaller_priorities_are_served_first(make_engine, serving, make_request) -> None:
    finished: list[int] = []

    async def main() -> None:
        engine = make_engine(policy=make_policy("priority"), max_num_seqs=1, step_seconds=0.002)
        async with serving(engine) as s:

            async def ask(priority: int) -> None:
                service = pb.ServiceParams(priority=priority)
                await s.ask(make_request([priority + 5] * 3, service_params=service))
                finished.append(priority)

            await asyncio.gather(*(ask(priority) for priority in (0, 4, 2, -3, 1)))

    asyncio.run(main())
    assert [p for p in finished if p > 0] == [1, 2, 4]


def test_usage_tells_cached_tokens_of_the_own_salt_only(make_engine, serving, make_request) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:

            async def cached(tenant: str = "", cache_salt: str = "") -> int:
                service = pb.ServiceParams(tenant=tenant, cache_salt=cache_salt)
                request = make_request(list(range(20)), service_params=service)
                return (await s.ask(request))[-1].usage.cached_tokens

            assert [await cached(tenant="a"), await cached(tenant="a")] == [0, 19]
            assert await cached(tenant="b") == 0
            assert [await cached(cache_salt="x"), await cached(tenant="b", cache_salt="x")] == [
                0,
                19,
            ]

    asyncio.run(main())


def test_a_request_that_comes_too_late_is_shed(
    make_engine, serving, make_request, wait_idle
) -> None:
    policy = make_policy("deadline", PolicySettings(shed_overdue=True))

    async def main() -> None:
        engine = make_engine(policy=policy, max_num_seqs=1, step_seconds=0.01)
        async with serving(engine) as s:
            first = asyncio.ensure_future(s.ask(make_request([1], max_tokens=40)))
            await asyncio.sleep(0.05)
            late = make_request([2], service_params=pb.ServiceParams(ttft_target_ms=1))
            code, details = await s.refusal(late)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "target" in details
            assert len(await first) > 0
            await wait_idle(engine)
            load = await s.stub.GetLoad(pb.GetLoadRequest())
            assert (load.num_shed, load.num_finished) == (1, 1)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("service", "named"),
    [
        ({"tenant": "t" * 257}, "tenant"),
        ({"cache_salt": "s" * 257}, "cache_salt"),
        ({"ttft_target_ms": 0}, "ttft_target"),
        ({"ttft_target_ms": -1}, "ttft_target"),
        ({"tpot_target_ms": math.inf}, "tpot_target"),
        ({"tpot_target_ms": math.nan}, "tpot_target"),
        ({"priority": -(2**31)}, "priority"),
    ],
)
def test_what_makes_no_sense_is_refused(
    make_engine, serving, make_request, service: dict, named: str
) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            request = make_request([1], service_params=pb.ServiceParams(**service))
            code, details = await s.refusal(request)
            assert code is grpc.StatusCode.INVALID_ARGUMENT and named in details

    asyncio.run(main())
