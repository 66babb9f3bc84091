"""Ask a jaxserve server over gRPC and print the answer as it arrives.

Usage: python scripts/chat_client.py "Why is the sky blue?" [--target HOST:PORT]

It needs grpcio, protobuf and the generated code in jaxserve/server/v1, but no JAX.
"""

import argparse
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxserve.server.v1 import jaxserve_pb2 as pb
from jaxserve.server.v1 import jaxserve_pb2_grpc


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a jaxserve server over gRPC.")
    parser.add_argument("message")
    parser.add_argument("--target", default="127.0.0.1:50051", help="the server (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for the answer")
    args = parser.parse_args()
    request = pb.GenerateRequest(
        chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=args.message)]),
        sampling_params=pb.SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens),
    )
    with grpc.insecure_channel(args.target) as channel:
        try:
            check_serving(channel)
            stream = jaxserve_pb2_grpc.JaxserveStub(channel).Generate(request, timeout=args.timeout)
            for delta in stream:
                print(delta.text, end="", flush=True)
        except grpc.RpcError as error:
            # A failed call is the error and the call in one object.
            sys.exit(f"{error.code().name}: {error.details()}")  # type: ignore[attr-defined]
    print()


def check_serving(channel: grpc.Channel) -> None:
    """Leave with a message unless the server says that it is ready."""
    health = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service="jaxserve.v1.Jaxserve")
    reply = health.Check(request, timeout=10)  # pyright: ignore[reportAttributeAccessIssue]
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        sys.exit("the server is not ready (still warming up, or draining)")


if __name__ == "__main__":
    main()
