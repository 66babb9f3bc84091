"""Programs on their way to a runner: loaded or compiled on threads, while other things start."""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed

from jax.stages import Compiled

from jaxserve.core.at_exit import close_at_exit
from jaxserve.runner.compile_counter import CompileCounter
from jaxserve.runner.program_cache import ProgramCache
from jaxserve.runner.step_jobs import Job, StepJobs, calls_kernels

log = logging.getLogger(__name__)

_THREADS = 2  # XLA compiles outside the GIL, and each compilation on threads of its own
_NICE = 15  # of what is compiled while requests are served, on a scale to 19


class ProgramLoading:
    """Gets programs from a cache, or compiles them, from when it is made.

    Args:
        cache: where executables are kept between starts.
        jobs: what is needed, and what else there is.
        all_first: whether all of them are needed. If not, `go_on` gets the rest.
        prepare: makes the kernels known that programs call; called once, on a thread.
        counter: told that what `go_on` compiles is no surprise.
    """

    def __init__(
        self,
        cache: ProgramCache,
        jobs: StepJobs,
        *,
        all_first: bool = True,
        prepare: Callable[[], None] | None = None,
        counter: CompileCounter | None = None,
    ) -> None:
        self._cache = cache
        self._counter = counter or CompileCounter()
        self._rest: Mapping[str, Job] = {} if all_first else jobs.rest
        needed = {**jobs.needed, **(jobs.rest if all_first else {})}
        self._threads = ThreadPoolExecutor(_THREADS, "jaxserve-programs")
        self._prepared = self._threads.submit(prepare or (lambda: None))
        # Those without kernels go first: they need not wait for these.
        names = sorted(needed, key=calls_kernels)
        self._futures = {
            self._threads.submit(self._get, name, needed[name]): name for name in names
        }
        self._stopped = threading.Event()
        self._background: threading.Thread | None = None
        self._lock = threading.Lock()
        self._late: dict[str, Compiled] = {}  # what came in the background and was not taken

    @property
    def num_needed(self) -> int:
        """Programs that `needed` gives."""
        return len(self._futures)

    def needed(self) -> Iterator[tuple[str, Compiled]]:
        """The programs that are needed, each as soon as it is there.

        Raises:
            Exception: whatever lowering or compiling one of them raised.
        """
        with self._threads:
            try:
                self._prepared.result()
                for future in as_completed(self._futures):
                    yield self._futures[future], future.result()
            except BaseException:
                self._threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _get(self, name: str, job: Job) -> Compiled:
        if calls_kernels(name):
            self._prepared.result()
        return self._cache.get(name, job)

    def go_on(self) -> None:
        """Get the rest, one by one, on a thread that gives way to all others."""
        if self._rest:
            self._background = threading.Thread(
                target=self._get_rest, name="jaxserve-programs-rest", daemon=True
            )
            self._background.start()
            close_at_exit(self)

    def _get_rest(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # Linux: of this thread alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        for name, job in self._rest.items():
            if self._stopped.is_set():
                return
            try:
                with self._counter.planned():
                    program = self._cache.get(name, job)
            except Exception:
                log.exception("could not compile %s; steps are padded to what is there", name)
                continue
            with self._lock:
                self._late[name] = program
        log.info("the other %d programs are ready", len(self._rest))

    def take(self) -> dict[str, Compiled]:
        """What `go_on` has got since the last call; never waits."""
        if not self._late:
            return {}
        with self._lock:
            taken, self._late = self._late, {}
        return taken

    def close(self) -> None:
        """Get no more; returns when the program under way is done. Idempotent."""
        self._stopped.set()
        self._threads.shutdown(cancel_futures=True)
        if self._background is not None:
            self._background.join()

    def close_at_exit(self) -> None:
        """Close, if the engine was dropped without doing so: a compiler is at work."""
        self.close()
