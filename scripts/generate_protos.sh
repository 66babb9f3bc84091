#!/usr/bin/env bash
# Regenerates the gRPC code from the protos of jaxserve/server (needs grpcio-tools).
# Usage: scripts/generate_protos.sh [OUTPUT_DIR]   (default: the repository, beside the protos)
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-.}"
"${PYTHON:-python}" -m grpc_tools.protoc -I . \
  --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" \
  jaxserve/server/v1/jaxserve.proto jaxserve/server/kserve/open_inference.proto
