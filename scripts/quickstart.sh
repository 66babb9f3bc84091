#!/usr/bin/env bash
# From nothing to a streamed answer over gRPC; then it keeps serving until Ctrl-C.
# Usage: scripts/quickstart.sh [--extra EXTRA] [--port PORT] [--http-port PORT] [--exit]
#   --extra EXTRA     what to serve on: cuda12, cuda13 or tpu (default: the CPU)
#   --port PORT       gRPC port (50051; 0 takes a free one)
#   --http-port PORT  port of the OpenAI-compatible API and the page (8000; 0 takes a free one)
#   --exit            stop the server and leave once the answer is there
set -euo pipefail
cd "$(dirname "$0")/.."

model=smollm2-135m
question="What is the capital of France, and what is it known for?"
port=50051
http_port=8000
extra=""
leave=false
usage() {
  sed -n '3,7s/^# //p' "$0" >&2
  exit 2
}
while (($#)); do
  case "$1" in
    --extra)
      extra="${2:-}"
      [[ $extra =~ ^(cuda12|cuda13|tpu)$ ]] || usage
      shift 2 ;;
    --port) port="${2:?--port needs a number}"; shift 2 ;;
    --http-port) http_port="${2:?--http-port needs a number}"; shift 2 ;;
    --exit) leave=true; shift ;;
    *) usage ;;
  esac
done

server=""
output="$(mktemp)"
stop_server() {
  local status=$? drained=0
  trap '' INT TERM  # one signal drains the server, a second would cut it short
  if [[ -n $server ]]; then
    kill -TERM "$server" 2>/dev/null || true
    wait "$server" || drained=$?
  fi
  rm -f "$output"
  exit $((status ? status : drained))
}
trap stop_server EXIT
trap 'exit 0' INT TERM

scripts/make_venv.sh "$extra"
export PATH="$PWD/.venv/bin:$PATH"
jaxserve pull "$model" >/dev/null

echo "starting the server (the first start compiles, later ones load what was compiled)" >&2
set -m  # a process group of its own: Ctrl-C reaches this script, which then drains the server
jaxserve serve "$model" --port "$port" --http-port "$http_port" >"$output" &
server=$!
set +m
until grep -q '^READY' "$output"; do
  if ! kill -0 "$server" 2>/dev/null; then
    status=0
    wait "$server" || status=$?
    server=""
    exit $((status ? status : 1))
  fi
  sleep 0.2
done
cat "$output"
read -r _ address _ <"$output"
http="$(sed -n 's/^READY.* http=\([^ ]*\).*/\1/p' "$output")"

printf '\n> %s\n' "$question"
python scripts/chat_client.py "$question" --target "$address"
if $leave; then exit 0; fi

cat <<HELP

Serving on $address until Ctrl-C. Look at it in a browser: http://$http/

Call it over gRPC:

  .venv/bin/python scripts/chat_client.py "Tell me a joke." --target $address

  grpcurl -plaintext -d '{"chat": {"messages": [{"role": "user", "content": "Tell me a joke."}]},
    "sampling_params": {"temperature": 0.7, "max_tokens": 64}}' \\
    $address jaxserve.v1.Jaxserve/Generate

as any client of OpenAI's API does:

  curl http://$http/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "$model", "messages": [{"role": "user", "content": "Tell me a joke."}]}'

or measure it:

  .venv/bin/jaxserve bench serve --host ${address%:*} --port ${address##*:} --num-prompts 32 --max-concurrency 8
HELP
wait "$server" && server=""
