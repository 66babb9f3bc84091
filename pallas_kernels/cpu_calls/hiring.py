"""Whether helpers are worth having: not while other programs want their cores.

With one thread more than there are free cores, the system takes turns, and the caller loses its
core for milliseconds, in the midst of an item or while others finish theirs: that is more than
helpers save. So some calls look at how far they came, and where those with helpers come less far
than those without, there are none for a while, and for longer the next time, before they are tried
again.
"""

from numba import njit

from pallas_kernels.cpu_calls.memory import words
from pallas_kernels.cpu_calls.waits import cpu_time, now

# Words of what all calls of a process know together, in nanoseconds. None is more than an estimate,
# and callers that change them at once may lose one another's.
_CALLS, _RESUME, _PAUSE = range(3)  # the number of calls; when to hire again; how long not to
_GAINED, _TOOK, _LOST = range(3, 6)  # of calls with helpers: work done, time passed, time idle
_ALONE_GAINED, _ALONE_TOOK = range(6, 8)  # of calls without
_STATE_WORDS = 8
STATE_BYTES = 8 * _STATE_WORDS
_EVERY = 4  # calls of which one is looked at: a thread's CPU time takes a system call
_TOGETHER = 0.65  # of one thread's speed that each of two has, since both read memory
_NOTICED = 10_000_000  # ns lost before anything is concluded: some turns of the system
_SUPPOSED = 30_000_000  # ns without helpers in which nothing is lost, as long as little is known
_SHORTEST, _LONGEST = 64_000_000, 1_000_000_000  # ns without helpers


@njit(cache=True)
def may_hire(state: int) -> bool:
    """Whether a call that begins now shall have helpers.

    Args:
        state: `STATE_BYTES` bytes, zeros before the first call.
    """
    resume = words(state, _STATE_WORDS)[_RESUME]
    return resume == 0 or now() >= resume


@njit(cache=True)
def look(state: int) -> int:
    """The CPU time of this thread if its call is one to be looked at; otherwise 0."""
    fields = words(state, _STATE_WORDS)
    fields[_CALLS] += 1
    return cpu_time() if fields[_CALLS] % _EVERY == 0 else 0


@njit(cache=True)
def note_alone(state: int, worked: int, took: int) -> None:
    """Learn from a call that had no helpers.

    Args:
        state: as in `may_hire`.
        worked: nanoseconds of CPU time in which the caller did items.
        took: nanoseconds until all items were done.
    """
    fields = words(state, _STATE_WORDS)
    fields[_ALONE_GAINED] += worked
    fields[_ALONE_TOOK] += took
    if fields[_ALONE_TOOK] > 10 * _NOTICED:
        fields[_ALONE_GAINED] //= 2
        fields[_ALONE_TOOK] //= 2


@njit(cache=True)
def note_helped(state: int, worked: int, took: int, own: int, items: int) -> None:
    """Learn from a call that had helpers, and conclude whether the next ones shall.

    Args:
        state, worked, took: as in `note_alone`.
        own: items that the caller did itself.
        items: of the call.
    """
    fields = words(state, _STATE_WORDS)
    fields[_GAINED] += int(worked * max(_TOGETHER * items / max(own, 1), 1.0))
    fields[_TOOK] += took
    fields[_LOST] += max(took - worked, 0)
    if fields[_LOST] < _NOTICED:
        return
    alone = (fields[_ALONE_GAINED] + _SUPPOSED) / (fields[_ALONE_TOOK] + _SUPPOSED)
    if fields[_GAINED] >= alone * fields[_TOOK]:
        fields[_RESUME] = 0
        fields[_PAUSE] //= 2
    else:
        fields[_PAUSE] = min(max(2 * fields[_PAUSE], _SHORTEST), _LONGEST)
        fields[_RESUME] = now() + fields[_PAUSE]
    fields[_GAINED] = fields[_TOOK] = fields[_LOST] = 0
