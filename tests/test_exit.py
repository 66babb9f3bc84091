"""How processes end: with status 0, whatever is at work in them, closed or not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.testing.tiny_model import write_tiny_checkpoint

# Forks a process per kind, two at a time, once everything slow is imported and no thread of XLA
# runs yet. A child that leaves with `sys.exit` goes through the whole of the interpreter's end.
PROGRAM = """
import os, sys, threading

import jax
from jaxserve import LLM, SamplingParams
from jaxserve.runner.device_runner import DeviceRunner
from pallas_kernels import linear, paged_attention

model, programs, logs, *kinds = sys.argv[1:]
linear.prepare("cpu")
paged_attention.prepare("cpu", "float32")
PARAMS = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def make():
    return LLM(
        model, num_pages=32, max_num_seqs=2, max_num_batched_tokens=8,
        attention_implementation="cpu", linear_implementation="cpu",
        compilation_cache_dir=programs, host_cache_memory=0.001, length_predictor="exact",
    )


def generate(llm):
    llm.generate(["one", "two", "three"], PARAMS, use_tqdm=False)


def closed():
    globals()["llm"] = make()
    generate(llm)
    llm.close()


def not_closed():
    globals()["llm"] = make()
    generate(llm)


def forgotten():
    generate(make())


def raises():
    llm = make()
    generate(llm)
    raise RuntimeError("expected")


def device_fails():
    llm = make()
    llm._engine.executor._samplers.clear()
    generate(llm)


def in_a_thread():
    thread = threading.Thread(target=not_closed)
    thread.start()
    thread.join()


def thread_goes_on():
    globals()["llm"] = make()
    begun = threading.Event()

    def work():
        while True:
            generate(llm)
            begun.set()

    threading.Thread(target=work, daemon=True).start()
    begun.wait()


def thread_builds():
    begun = threading.Event()
    warm_up = DeviceRunner._warm_up

    def signalling(runner):
        begun.set()
        warm_up(runner)

    def work():
        while True:
            generate(make())

    DeviceRunner._warm_up = signalling
    threading.Thread(target=work, daemon=True).start()
    begun.wait()


def in_mid_stream():
    globals()["stream"] = make().stream("one", PARAMS)
    next(stream)
    next(stream)


def child(number, kind):
    log = os.open(os.path.join(logs, f"{number}-{kind}"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        globals()[kind]()
    except (RuntimeError, KeyError) as error:
        print("raised", error)
        sys.last_value = error  # as a notebook keeps it, with all that its frames hold
    sys.exit()


running = {}


def reap():
    pid, status = os.wait()
    print(running.pop(pid), os.waitstatus_to_exitcode(status), flush=True)


for number, kind in enumerate(kinds):
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        child(number, kind)
    running[pid] = kind
    while len(running) > (1 if number else 0):  # the first one fills the cache of programs
        reap()
while running:
    reap()
"""
KINDS = (
    "closed", "not_closed", "forgotten", "raises", "device_fails", "in_a_thread", "thread_goes_on",
    "in_mid_stream", "thread_builds",
)  # fmt: skip


@pytest.mark.slow
def test_thirty_scripts_with_the_cpu_kernels_end_cleanly_beside_a_busy_process(
    tmp_path: Path,
) -> None:
    model = write_tiny_checkpoint(tmp_path / "tiny")
    logs = tmp_path / "logs"
    logs.mkdir()
    kinds = (KINDS * 4)[:30]
    command = [sys.executable, "-c", PROGRAM, str(model), str(tmp_path / "programs"), str(logs)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "XLA_FLAGS": ""}
    # Threads that wait for each other do so longer beside somebody who takes a core.
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            ran = subprocess.run(
                [*command, *kinds], env=env, stdout=subprocess.PIPE, text=True, check=True
            )
        finally:
            busy.kill()
    ended = sorted(ran.stdout.split("\n"))
    said = "".join(f"\n{path.name}: {path.read_text()}" for path in sorted(logs.iterdir()))
    assert ended == ["", *sorted(f"{kind} 0" for kind in kinds)], said
    assert "Traceback" not in said
