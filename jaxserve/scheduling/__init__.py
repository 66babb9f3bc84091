"""Which request computes which tokens in which step. No JAX, no clock, no thread."""

from jaxserve.scheduling.scheduler import Scheduler

__all__ = ["Scheduler"]
