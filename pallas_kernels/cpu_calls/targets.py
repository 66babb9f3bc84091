"""Making custom calls known to XLA, once per process, when they are first needed."""

import importlib
import threading

_lock = threading.Lock()
_known: set[str] = set()


def prepare(target: str, module: str) -> None:
    """Compile a custom call, or load what was compiled, and make it known to XLA.

    To be called before a program that has the call is loaded, and while one is traced.

    Args:
        target: its name.
        module: whose `make_call()` gives its handler; imported here, since Numba takes time to
            import and only CPUs need it.
    """
    with _lock:
        if target in _known:
            return
        from pallas_kernels.cpu_calls.code_cache import code_cache

        with code_cache():
            from pallas_kernels.cpu_calls.handler import register

            register(target, importlib.import_module(module).make_call())
        _known.add(target)
