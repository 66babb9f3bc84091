"""Pages travel between the pool and the store unharmed, in order with the steps, and never hang."""

import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.stages import Compiled

from jaxserve.cache.page_keys import page_key
from jaxserve.cache.page_store import PageStore
from jaxserve.core.step import FetchDone, PageCopy, PageFetch, PageSave, StepPlan
from jaxserve.models.backend import KernelBackend
from jaxserve.models.graph import ModelGraph
from jaxserve.models.shard import shard_model
from jaxserve.parallel.mesh import make_mesh
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.compile_counter import CompileCounter
from jaxserve.runner.lowering import StepLowering
from jaxserve.runner.page_mover import PageMover
from jaxserve.runner.page_programs import COPIES, PIECES, piece_sizes
from jaxserve.runner.page_transfers import MAX_FETCHED_PIECES
from jaxserve.runner.program_cache import CompileWatch
from jaxserve.runner.step_program import StepProgram
from pallas_kernels.kv_pages import KvPages
from tests.runner.test_memory import model_config

PAGES = 60  # per shard
# Heads split, and (six query heads on four devices) heads replicated.
MESHES = ["", "data=2,tensor=2", "data=2,tensor=4"]


def key(number: int) -> bytes:
    return page_key(b"parent", [number])


def keys(numbers: Sequence[int]) -> tuple[bytes, ...]:
    return tuple(map(key, numbers))


class Store(PageStore):
    """A store that may be told to fail or to block, and remembers what was called off."""

    def __init__(self, lowering: StepLowering) -> None:
        layout = lowering.page_layout
        super().__init__(layout.shape, layout.dtype, host_bytes=2**24)
        self.may_put, self.may_fetch = threading.Event(), threading.Event()
        self.may_put.set()
        self.may_fetch.set()
        self.bad: set[bytes] = set()
        self.cancelled: set[bytes] = set()

    def put(self, key: bytes, page: np.ndarray) -> None:
        assert self.may_put.wait(30)
        if key in self.bad:
            raise OSError("a bad page")
        super().put(key, page)

    def fetch(self, keys: Sequence[bytes], out: np.ndarray) -> int:
        assert self.may_fetch.wait(30)
        if self.bad & set(keys):
            raise OSError("a bad page")
        return super().fetch(keys, out)

    def cancel(self, key: bytes) -> None:
        self.cancelled.add(key)
        super().cancel(key)


@functools.cache
def lowering(mesh: str, dtype: str) -> StepLowering:
    config, rules = shard_model(model_config("llama"), make_mesh(mesh))
    graph = ModelGraph(config)
    buckets = Buckets((8,), (8,), max_rows=8, max_pages=8)
    program = StepProgram(graph, KernelBackend(rules, "xla"), buckets)
    return StepLowering(program, jnp.dtype(dtype), PAGES * rules.data, 8, jnp.dtype(dtype))


@functools.cache
def programs(mesh: str, dtype: str) -> dict[str, Compiled]:
    store = Store(lowering(mesh, dtype))
    mover = PageMover(lowering(mesh, dtype), store, copies=True)
    mover.close()
    return {name: job().compile() for name, job in mover.jobs().items()}


class Device:
    """A mover with a pool of random pages, and what the pool should hold.

    The scales of a quantised one are made of its values: they should go wherever those go.
    """

    def __init__(self, mesh: str = "", *, dtype: str = "float32", **options: Any) -> None:
        self.lowering = lowering(mesh, dtype)
        self.shards = self.lowering.rules.data
        self.store = Store(self.lowering)
        self.mover = PageMover(self.lowering, self.store, copies=True, **options)
        shape = self.lowering.kv_pages.shape
        values = (9 * np.random.default_rng(0).standard_normal(shape)).astype(dtype)
        self.expected = values.view(self.lowering.page_dtype)
        wanted = jax.tree.leaves(self.lowering.kv_pages)
        arrays = [
            jax.device_put(array.copy(), abstract.format)
            for array, abstract in zip(self.arrays(), wanted, strict=True)
        ]
        pool = jax.tree.unflatten(jax.tree.structure(self.lowering.kv_pages), arrays)
        self.pool = self.mover.use(programs(mesh, dtype), pool)

    def arrays(self) -> list[np.ndarray]:
        """What the pool's arrays should hold."""
        if not isinstance(self.lowering.kv_pages, KvPages):
            return [self.expected]
        scales = self.expected[..., :4].copy().view(np.float32)[..., 0]
        return [self.expected, scales]

    def launch(self, **movements: Any) -> None:
        for save in movements.get("saves", ()):
            assert self.store.expect(save.key)
        self.pool = self.mover.launch(StepPlan((), **movements), self.pool)

    def poll(self, *, wait: bool = False) -> list[FetchDone]:
        self.pool, done = self.mover.poll(self.pool, wait=wait)
        return done

    def page(self, shard: int, page: int) -> np.ndarray:
        """What a page should hold, to be looked at or changed."""
        return self.expected[:, shard * PAGES + page]

    def check(self) -> None:
        for array, expected in zip(jax.tree.leaves(self.pool), self.arrays(), strict=True):
            np.testing.assert_array_equal(np.asarray(array), expected)


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    device.store.may_put.set()
    device.store.may_fetch.set()
    device.mover.close()


@pytest.mark.parametrize(
    ("mesh", "dtype"),
    [*itertools.product(MESHES, ["float32", "bfloat16"]), ("", "int8"), (MESHES[1], "int8")],
)
def test_pages_travel_unharmed(mesh: str, dtype: str):
    """Random movements against an oracle in NumPy; sets of all sizes, and of both shards."""
    device = Device(mesh, dtype=dtype)
    device.check()
    random = np.random.default_rng(1)
    stored: dict[int, np.ndarray] = {}
    for turn in range(4):
        saves, copies, fetches = [], [], []
        for shard in range(device.shards):
            count = int(random.integers(0, 2 * PIECES[-1]))
            for page in random.permutation(PAGES)[:count].tolist():
                stored[len(stored)] = device.page(shard, page).copy()
                saves.append(PageSave(shard, page, key(len(stored) - 1)))
            count = int(random.integers(0, PAGES // 2))
            pages = random.permutation(PAGES)[: 2 * count].tolist()
            for source, target in zip(pages[:count], pages[count:], strict=True):
                copies.append(PageCopy(shard, source, target))
                device.page(shard, target)[...] = device.page(shard, source)
        device.launch(saves=tuple(saves), copies=tuple(copies))
        device.check()
        for shard in range(device.shards):
            count = min(len(stored), int(random.integers(1, 2 * PIECES[-1])))
            pages = random.permutation(PAGES)[:count].tolist()
            numbers = random.permutation(len(stored))[:count].tolist()
            ticket = turn * device.shards + shard
            fetches.append(PageFetch(ticket, shard, tuple(pages), keys(numbers)))
            for page, number in zip(pages, numbers, strict=True):
                device.page(shard, page)[...] = stored[number]
        device.launch(fetches=tuple(fetches))
        done: list[FetchDone] = []
        while len(done) < len(fetches):
            done += device.poll(wait=True)
        assert done == [FetchDone(each.ticket, len(each.pages)) for each in fetches]
        device.check()
    assert device.poll(wait=True) == []
    device.mover.close()


def test_movements_of_one_plan_happen_in_their_order(device: Device):
    """A page is saved, then copied over; and fetched elsewhere with what it held at first."""
    first = device.page(0, 3).copy()
    device.launch(
        saves=(PageSave(0, 3, key(0)),),
        copies=(PageCopy(0, 5, 3),),
        fetches=(PageFetch(7, 0, (9,), (key(0),)),),
    )
    device.page(0, 3)[...] = device.page(0, 5)
    device.page(0, 9)[...] = first
    assert device.poll(wait=True) == [FetchDone(7, 1)]
    device.check()


@pytest.mark.parametrize("count", [1, COPIES, COPIES + 1])
def test_copies_fill_their_programs(device: Device, count: int):
    device.launch(copies=tuple(PageCopy(0, 0, 1 + i) for i in range(count)))
    for i in range(count):
        device.page(0, 1 + i)[...] = device.page(0, 0)
    device.check()


@pytest.mark.parametrize("missing", [0, 4, 6])
def test_a_fetch_ends_at_the_first_page_that_the_store_lacks(device: Device, missing: int):
    device.launch(saves=tuple(PageSave(0, i, key(i)) for i in range(7)))
    device.store.discard([key(missing)])
    device.launch(fetches=(PageFetch(1, 0, tuple(range(20, 27)), keys(range(7))),))
    for i in range(missing):
        device.page(0, 20 + i)[...] = device.page(0, i)
    assert device.poll(wait=True) == [FetchDone(1, missing)]
    device.check()


def test_nothing_waits_for_the_store(device: Device):
    """Steps go on while saves and fetches are stuck; then both come to an end."""
    device.store.may_put.clear()
    device.store.may_fetch.clear()
    device.launch(saves=(PageSave(0, 0, key(0)),), fetches=(PageFetch(1, 0, (8,), (key(0),)),))
    saved = device.page(0, 0).copy()
    device.launch(copies=(PageCopy(0, 4, 0),))
    device.page(0, 0)[...] = device.page(0, 4)
    assert device.poll() == []
    device.check()
    device.store.may_fetch.set()
    assert device.poll() == [], "fetched before it was saved"
    device.store.may_put.set()
    assert device.poll(wait=True) == [FetchDone(1, 1)]
    device.page(0, 8)[...] = saved
    device.check()


def test_a_long_fetch_comes_in_pieces_that_make_room_for_each_other(device: Device):
    pages = PIECES[-1] * (MAX_FETCHED_PIECES + 1)
    device.launch(saves=tuple(PageSave(0, i, key(i)) for i in range(PAGES)))
    numbers = [i % PAGES for i in range(pages)]
    device.launch(fetches=(PageFetch(1, 0, tuple(numbers), keys(numbers)),))
    assert device.poll(wait=True) == [FetchDone(1, pages)]
    device.check()


def test_a_save_that_fails_is_called_off_and_the_others_are_not(
    device: Device, caplog: pytest.LogCaptureFixture
):
    device.store.bad = {key(1)}
    device.launch(saves=tuple(PageSave(0, i, key(i)) for i in (0, 1, 5)))  # a piece each
    device.launch(fetches=(PageFetch(1, 0, (30,), (key(5),)),))
    assert device.poll(wait=True) == [FetchDone(1, 1)]
    assert device.store.cancelled == {key(1)}
    assert [device.store.match([key(i)]) for i in (0, 1, 5)] == [1, 0, 1]
    assert "1 KV pages could not be saved" in caplog.text


@pytest.mark.parametrize("bad", [0, 5])
def test_a_fetch_that_fails_reports_what_came_before(
    device: Device, caplog: pytest.LogCaptureFixture, bad: int
):
    device.launch(saves=tuple(PageSave(0, i, key(i)) for i in range(6)))  # fetched as 4 + 1 + 1
    device.launch(fetches=(PageFetch(0, 0, tuple(range(30, 36)), keys(range(6))),))
    assert device.poll(wait=True) == [FetchDone(0, 6)]
    device.store.bad = {key(bad)}
    device.launch(fetches=(PageFetch(1, 0, tuple(range(10, 16)), keys(range(6))),))
    assert device.poll(wait=True) == [FetchDone(1, bad)]
    assert "pages could not be fetched" in caplog.text
    for i in range(6):
        device.page(0, 30 + i)[...] = device.page(0, i)
    for i in range(bad):
        device.page(0, 10 + i)[...] = device.page(0, i)
    device.check()


def test_pages_beyond_what_may_wait_are_given_up(caplog: pytest.LogCaptureFixture):
    device = Device(max_saving_bytes=20 * lowering("", "float32").page_bytes)
    device.store.may_put.clear()
    device.launch(saves=tuple(PageSave(0, i, key(i)) for i in range(26)))  # 16 + 4 + 4 + 1 + 1
    assert device.store.cancelled == set(keys(range(20, 26)))
    assert "faster than the host" in caplog.text
    device.store.may_put.set()
    device.launch(fetches=(PageFetch(1, 0, tuple(range(30, 56)), keys(range(26))),))
    assert device.poll(wait=True) == [FetchDone(1, 20)]
    device.launch(saves=(PageSave(0, 0, key(30)),))  # there is room again
    device.mover.close()
    assert key(30) not in device.store.cancelled


def close_in_time(device: Device) -> None:
    thread = threading.Thread(target=device.mover.close, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "close hangs"


def test_close_finishes_saves_and_gives_up_fetches(device: Device):
    brought = []
    device.store.put = lambda key, page: brought.append((key, page.copy()))  # type: ignore
    numbers = [i % PAGES for i in range(PIECES[-1] * (MAX_FETCHED_PIECES + 2))]
    device.launch(saves=tuple(PageSave(0, i, key(i)) for i in range(21)))
    device.launch(fetches=(PageFetch(1, 0, tuple(numbers), keys(numbers)),))  # nobody polls
    close_in_time(device)
    assert [key for key, _ in brought] == list(keys(range(21)))
    for i, (_, page) in enumerate(brought):
        np.testing.assert_array_equal(page, device.page(0, i))
    close_in_time(device)


def test_close_does_not_wait_for_a_page_that_nobody_brings(device: Device):
    assert device.store.expect(key(0))  # for a plan that was never launched
    device.launch(fetches=(PageFetch(1, 0, (3,), (key(0),)), PageFetch(2, 0, (4,), (key(0),))))
    close_in_time(device)


@pytest.mark.parametrize(
    ("with_store", "copies", "names"),
    [
        (False, False, set()),
        (False, True, {"copy-pages"}),
        (True, False, {f"{what}-pages-{n}" for what in ("save", "fetch") for n in PIECES}),
    ],
)
def test_no_program_is_compiled_that_no_plan_can_ask_for(
    device: Device, with_store: bool, copies: bool, names: set[str]
):
    store = Store(device.lowering) if with_store else None
    mover = PageMover(device.lowering, store, copies=copies)
    assert set(mover.jobs()) == names
    plans: dict[str, Callable[[], StepPlan]] = {
        "no page store": lambda: StepPlan((), saves=(PageSave(0, 0, key(0)),)),
        "there is no page store": lambda: StepPlan((), fetches=(PageFetch(0, 0, (0,), (key(0),)),)),
        "without copies": lambda: StepPlan((), copies=(PageCopy(0, 0, 1),)),
    }
    for message, plan in plans.items():
        if copies if "copies" in message else with_store:
            continue
        with pytest.raises(ValueError, match=message):
            mover.launch(plan(), device.pool)
    mover.close()


def test_moving_pages_compiles_nothing():
    """Not the first time either, on any mesh: all is warm once the programs are there."""
    device = Device("data=2,tensor=2")
    counter = CompileCounter()
    watch = CompileWatch(counter)
    counter.ready()
    saves = tuple(PageSave(i % 2, i, key(i)) for i in range(45))
    copies = tuple(PageCopy(1, i, 30 + i) for i in range(20))
    device.launch(saves=saves, copies=copies)
    device.launch(fetches=(PageFetch(0, 1, tuple(range(21)), keys(range(21))),))
    assert device.poll(wait=True) == [FetchDone(0, 21)]
    jax.block_until_ready(device.pool)
    watch.close()
    assert counter.after_ready == 0
    device.mover.close()


def test_large_pages_go_in_small_pieces():
    assert piece_sizes(2**20) == PIECES
    assert piece_sizes(3 * 2**20) == PIECES[:2]
    assert piece_sizes(2**30) == (1,)
