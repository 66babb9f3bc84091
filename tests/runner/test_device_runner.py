"""What a runner keeps on its devices is laid out as its programs expect it, and moved as told."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

from jaxserve.cache.page_keys import page_key
from jaxserve.core.step import FetchDone, PageCopy, PageFetch, PageSave, StepPlan
from jaxserve.models.shard import shard_model
from jaxserve.parallel.mesh import make_mesh
from jaxserve.runner.compile_counter import CompileCounter
from jaxserve.runner.device_runner import _zeros
from jaxserve.runner.program_cache import CompileWatch
from tests.runner.small_runner import SmallRunner
from tests.runner.test_memory import model_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiles")]


@pytest.mark.parametrize(("order", "programs"), [(None, 0), ((0, 1, 2), 0), ((2, 0, 1), 1)])
def test_zeros(order: tuple[int, ...] | None, programs: int):
    """Only a layout that is not the device's own takes a program."""
    _, rules = shard_model(model_config("llama"), make_mesh("data=2"))
    sharding = rules.sharding("data")
    placed = sharding if order is None else Format(Layout(order), sharding)
    counter = CompileCounter()
    watch = CompileWatch(counter)
    zeros = _zeros(jax.ShapeDtypeStruct((4, 3, 5), jnp.int32, sharding=placed))
    watch.close()
    assert zeros.sharding == sharding
    layout = zeros.format.layout  # type: ignore
    assert isinstance(layout, Layout)
    assert layout.major_to_minor == (order or (0, 1, 2))
    np.testing.assert_array_equal(np.asarray(zeros), np.zeros((4, 3, 5)))
    assert counter.before_ready == programs


@pytest.mark.parametrize("mesh", ["", "data=2,tensor=2"])
def test_requests_go_on_in_pages_that_were_moved(mesh: str, program_cache_dir: Path):
    """Saved, overwritten and fetched elsewhere, or copied: decoding sees what was in the pages."""
    made = SmallRunner(mesh, program_cache_dir, model_config("llama"), moves_pages=True)
    counter = CompileCounter()
    watch = CompileWatch(counter)
    counter.ready()
    prompt, stranger, shard = list(range(1, 11)), list(range(40, 52)), made.last_shard

    def after(*pages: int) -> list[list[float]]:
        """What the model has in mind behind the prompt and one token more, from these pages."""
        plan = StepPlan((made.row([11], pages, 10, probe=True),))
        hidden = made.runner.collect(made.runner.launch(plan)).hidden
        assert hidden is not None
        return hidden.tolist()

    made.step(made.row(prompt, (0, 1, 2)))
    expected = after(0, 1, 2)
    keys = tuple(page_key(b"parent", [i]) for i in range(4))
    assert all(map(made.store.expect, keys[:3]))
    saves = tuple(PageSave(shard, i, keys[i]) for i in range(3))
    copies = (PageCopy(shard, 2, 7),)
    made.step(made.row(stranger, (0, 1, 2)), saves=saves, copies=copies)
    fetches = (
        PageFetch(5, shard, (3, 4), keys[:2]),
        PageFetch(6, shard, (5, 6), (keys[2], keys[3])),  # the last one was never saved
    )
    assert made.step(fetches=fetches) == []
    done: list[FetchDone] = []
    while len(done) < 2:
        done += made.runner.poll(wait=True)
    assert done == [FetchDone(5, 2), FetchDone(6, 1)]
    assert after(3, 4, 5) == after(3, 4, 7) == expected
    for other in ((0, 4, 5), (3, 1, 5), (3, 4, 2)):
        assert after(*other) != expected
    assert made.runner.poll(wait=True) == []
    made.runner.close()
    made.runner.close()
    assert not made.store.expect(keys[3]), "the store is open"
    watch.close()
    assert counter.after_ready == 0


@pytest.mark.parametrize("mesh", ["", "data=2,tensor=2"])
def test_hidden_states_of_probed_rows(mesh: str, program_cache_dir: Path):
    """They are what the head makes the sampled tokens of, in the order of the plan."""
    made = SmallRunner(mesh, program_cache_dir, model_config("llama"))
    rows = [
        made.row([1, 2, 3], (0,), slot=0, samples=False),
        made.row([4], (1,), slot=1, probe=True),
        made.row([5, 6, 7, 8, 9], (2, 3), slot=2, probe=True),
        made.row([7, 7], (4,), slot=3),
    ]
    result = made.runner.collect(made.runner.launch(StepPlan(tuple(rows))))
    assert result.hidden is not None and result.hidden.dtype == np.float32
    assert result.hidden.shape == (2, 48)
    logits = made.logits(result.hidden)
    assert logits.argmax(axis=1).tolist() == result.token_ids[1:3].tolist()
    assert len(set(result.token_ids.tolist())) == 4, "too plain to tell a fault"
    unsampled = rows[0]._replace(probe=True)
    result = made.runner.collect(made.runner.launch(StepPlan((unsampled,))))
    assert result.hidden is not None and result.token_ids.tolist() == [-1]
    whole = made.runner.launch(StepPlan((unsampled._replace(samples=True),)))
    logits = made.logits(result.hidden)
    assert logits.argmax(axis=1).tolist() == made.runner.collect(whole).token_ids.tolist()
    assert made.runner.collect(made.runner.launch(StepPlan((rows[3],)))).hidden is None
    made.runner.close()
