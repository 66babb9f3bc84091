"""JAX's profiler behind `engine.profiling.Profiler`."""

from pathlib import Path

import jax


class JaxProfiler:
    """Traces of XLA's host and device work, which XProf, TensorBoard and Perfetto read.

    Files go to `DIRECTORY/plugins/profile/TIME/`. Python frames are left out: tracing them slows
    the engine's loop, which is what one wants to see.
    """

    def start(self, directory: Path) -> None:
        """Begin to record.

        Raises:
            RuntimeError: somebody else in this process records already.
        """
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.profiler.start_trace(str(directory), profiler_options=options)

    def stop(self) -> None:
        """End, and write the files."""
        jax.profiler.stop_trace()
