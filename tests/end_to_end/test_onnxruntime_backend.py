"""The CPU backend itself: what stays where it is, what grows, and what it survives."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from dflash_export import build
from dflash_rt import Bundle, Generator
from dflash_rt.backends.cpu.backend import OnnxRuntimeBackend
from dflash_rt.backends.host_arrays import zeros
from dflash_rt.bundle.graph_names import STEP_GRAPHS
from dflash_rt.errors import BackendError, NumericalError
from tests.pairs import TargetSpec, drafter_config, make_drafter, make_target, run_loop

LIMIT, BLOCK, CHUNK, BUCKET = 1000, 4, 32, 128
SHORT, LONG = [1, 2, 3, 4, 5], [7, 1, 5] * 60
SPEC = TargetSpec("smollm2", head_dim=64)
CACHES = 2 * 3 + 2 * 2  # keys and values of three target layers and two drafter layers

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("pair")
    make_target(folder / "target", SPEC, spread=0.4)
    make_drafter(folder / "drafter", drafter_config(SPEC, block_size=BLOCK, head_dim=64))
    return build(
        folder / "target", folder / "drafter", folder / "bundle", max_seq_len=LIMIT, prefill_chunk=CHUNK
    )


@pytest.fixture(params=[True, False], ids=["fused", "plain"])
def make(bundle: Bundle, request: pytest.FixtureRequest) -> Callable[[], OnnxRuntimeBackend]:
    return lambda: OnnxRuntimeBackend(bundle, threads=1, fused=request.param)


@pytest.fixture
def backend(make: Callable[[], OnnxRuntimeBackend]) -> Iterator[OnnxRuntimeBackend]:
    made = make()
    yield made
    made.close()


def caches(backend: OnnxRuntimeBackend) -> dict[tuple[str, str], Array]:
    return {
        (owner, name): array
        for owner, state in backend._states.items()
        for name, array in state.arrays.items()
    }


def addresses(backend: OnnxRuntimeBackend) -> dict[tuple[str, str], int]:
    return {key: array.ctypes.data for key, array in caches(backend).items()}


def capacities(backend: OnnxRuntimeBackend) -> set[int]:
    return {array.shape[2] for array in caches(backend).values()}


def answer(generator: Generator, prompt: list[int]) -> tuple[int, ...]:
    return generator.generate(prompt, max_new_tokens=24, stop_token_ids=[]).token_ids


def decode_both_ways(backend: OnnxRuntimeBackend, bundle: Bundle) -> list[list[int]]:
    return [run_loop(backend, bundle, LONG, 40, width).token_ids for width in (BLOCK, 1)]


# --- Steady steps ---


def test_steady_steps_move_bind_and_allocate_nothing(backend: OnnxRuntimeBackend, bundle: Bundle) -> None:
    backend.reserve(LIMIT)
    first = decode_both_ways(backend, bundle)
    places, bindings, smallest = (
        addresses(backend),
        dict(backend._bindings),
        min(array.nbytes for array in caches(backend).values()),
    )
    tracemalloc.start()  # numpy tells it of every array
    try:
        assert decode_both_ways(backend, bundle) == first
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(places) == CACHES
    assert {run.graph for run, _ in bindings} == set(bundle.manifest.graphs) - set(STEP_GRAPHS)
    assert addresses(backend) == places
    assert backend._bindings == bindings  # the same objects: they have no equality of their own
    assert peak < smallest / 2


def test_each_cache_output_is_bound_to_its_input(
    backend: OnnxRuntimeBackend, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: dict[str, list[tuple[int, str, int]]] = {"bind_input": [], "bind_output": []}
    for method, seen in bound.items():
        real = getattr(ort.IOBinding, method)

        def watched(
            self: Any, name: str, *rest: Any, _real: Any = real, _seen: list[tuple[int, str, int]] = seen
        ) -> None:
            _seen.append((id(self), name, rest[-1]))
            _real(self, name, *rest)

        monkeypatch.setattr(ort.IOBinding, method, watched)
    decode_both_ways(backend, bundle)
    places = addresses(backend)
    current = {id(binding): run.graph for (run, _), binding in backend._bindings.items()}
    inputs = {(key, name): address for key, name, address in bound["bind_input"] if key in current}
    outputs = {(key, name): address for key, name, address in bound["bind_output"] if key in current}
    seen_graphs = set()
    for key, graph in current.items():
        owner = "target" if graph == "target" else "draft"
        for output, source in bundle.manifest.graphs[graph].aliases.items():
            assert inputs[key, source] == outputs[key, output] == places[owner, source]
            seen_graphs.add(graph)
    assert seen_graphs == {"target", "inject", "draft"}


def test_graphs_write_the_caches_in_place(backend: OnnxRuntimeBackend) -> None:
    backend.prefill(np.array([SHORT]), np.array([0]), inject=True)
    for key, cache in caches(backend).items():
        assert np.abs(cache[:, :, : len(SHORT)]).min() > 0, key
        assert not cache[:, :, len(SHORT) :].any(), key


# --- Growth ---


def test_caches_grow_in_buckets(backend: OnnxRuntimeBackend) -> None:
    assert capacities(backend) == {BUCKET}
    backend.prefill(np.array([SHORT]), np.array([0]), inject=True)
    before = {key: cache.copy() for key, cache in caches(backend).items()}
    sizes = []
    for rows in (BUCKET - BLOCK, BUCKET - BLOCK + 1, 2 * BUCKET, 900, 900, LIMIT):
        backend.reserve(rows)
        assert capacities(backend) == {backend.capacity}
        assert backend.cache_bytes == sum(cache.nbytes for cache in caches(backend).values())
        sizes.append(backend.capacity)
    assert sizes == [BUCKET, 2 * BUCKET, 3 * BUCKET, LIMIT + BLOCK, LIMIT + BLOCK, LIMIT + BLOCK]
    for key, cache in caches(backend).items():
        assert np.array_equal(cache[:, :, :BUCKET], before[key]), key
        assert not cache[:, :, BUCKET:].any(), key


def test_growth_is_an_eighth_at_least(backend: OnnxRuntimeBackend) -> None:
    backend.reserve(5 * BUCKET - BLOCK)
    assert backend.capacity == 5 * BUCKET
    backend._capacity = 8 * BUCKET  # an eighth of this is a bucket
    backend._limit = 100 * BUCKET
    backend.reserve(8 * BUCKET - BLOCK + 1)
    assert backend.capacity == 9 * BUCKET
    backend._capacity = 16 * BUCKET
    backend.reserve(16 * BUCKET - BLOCK + 1)
    assert backend.capacity == 18 * BUCKET


def test_a_grown_backend_answers_like_one_that_began_large(
    make: Callable[[], OnnxRuntimeBackend], bundle: Bundle
) -> None:
    found = []
    for rows in (0, LIMIT):
        backend = make()
        backend.reserve(rows)
        found.append(decode_both_ways(backend, bundle))
        backend.close()
    assert found[0] == found[1]


def test_a_sequence_cannot_outgrow_the_bundle(backend: OnnxRuntimeBackend) -> None:
    before = addresses(backend)
    with pytest.raises(BackendError, match="a sequence outgrew the bundle") as caught:
        backend.reserve(LIMIT + 1)
    assert f"found: {LIMIT + 1} rows" in str(caught.value)
    assert f"expected: at most {LIMIT}" in str(caught.value)
    assert addresses(backend) == before


# --- Options ---


def test_threads_reach_the_sessions(bundle: Bundle) -> None:
    for threads, wanted in ((2, 2), (None, 0)):
        backend = OnnxRuntimeBackend(bundle, threads=threads)
        found = {
            name: session.get_session_options().intra_op_num_threads
            for name, session in backend._sessions.items()
        }
        backend.close()
        assert found == {"embed": 1, **dict.fromkeys(("target", "lm_head", "inject", "draft"), wanted)}


# --- Failures ---


@pytest.mark.parametrize("graph", ["target", "draft"])
def test_what_is_not_finite_ends_the_request_and_nothing_else(
    backend: OnnxRuntimeBackend, bundle: Bundle, graph: str
) -> None:
    with Generator(bundle, backend, num_draft_tokens=BLOCK - 1) as generator:
        wanted = answer(generator, SHORT)
        with generator.stream(SHORT, max_new_tokens=24, stop_token_ids=[]) as stream:
            next(stream)
            backend._states[graph].arrays["value.0"][0, 0, 0, 0] = np.nan
            with pytest.raises(NumericalError, match="not finite"):
                list(stream)
        assert answer(generator, SHORT) == wanted


class NoRoom:
    """numpy.zeros, which fails at the ``fail_at``-th cache."""

    def __init__(self, fail_at: int) -> None:
        self.left, self.real = fail_at, np.zeros

    def __call__(self, shape: Any, *rest: Any, **options: Any) -> Array:
        if isinstance(shape, tuple) and len(shape) == 4:
            self.left -= 1
            if self.left == 0:
                raise MemoryError
        return self.real(shape, *rest, **options)


@pytest.mark.parametrize("fail_at", [1, 4, CACHES])
def test_growth_that_finds_no_memory_changes_nothing(
    make: Callable[[], OnnxRuntimeBackend], bundle: Bundle, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    with Generator(bundle, make(), num_draft_tokens=BLOCK - 1) as fresh:
        wanted_long = answer(fresh, LONG)
    backend = make()
    with Generator(bundle, backend, num_draft_tokens=BLOCK - 1) as generator:
        wanted, before = answer(generator, SHORT), addresses(backend)
        with monkeypatch.context() as patch:
            patch.setattr(np, "zeros", NoRoom(fail_at))
            with pytest.raises(BackendError, match="enough memory for a cache of 256 rows") as caught:
                answer(generator, LONG)
        assert f"found: no room for {2 * 256 * 64 * 4} more bytes" in str(caught.value)
        assert "what to do: " in str(caught.value)
        assert (addresses(backend), capacities(backend), backend.capacity) == (before, {BUCKET}, BUCKET)
        assert answer(generator, SHORT) == wanted
        assert answer(generator, LONG) == wanted_long


class Interrupts(dict[str, Array]):
    """Caches, of which the ``after``-th replacement is interrupted."""

    after = 4

    def __setitem__(self, name: str, cache: Array) -> None:
        self.after -= 1
        if self.after == 0:
            raise KeyboardInterrupt
        super().__setitem__(name, cache)


def test_growth_that_is_interrupted_is_done_again(
    make: Callable[[], OnnxRuntimeBackend], bundle: Bundle
) -> None:
    with Generator(bundle, make(), num_draft_tokens=BLOCK - 1) as fresh:
        wanted = [answer(fresh, prompt) for prompt in (SHORT, LONG)]
    backend = make()
    with Generator(bundle, backend, num_draft_tokens=BLOCK - 1) as generator:
        backend._states["target"].arrays = Interrupts(backend._states["target"].arrays)
        with pytest.raises(KeyboardInterrupt):
            answer(generator, LONG)
        assert [answer(generator, prompt) for prompt in (SHORT, LONG)] == wanted


def test_no_memory_for_a_buffer(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    real = np.zeros

    def no_room(shape: Any, *rest: Any, **options: Any) -> Array:
        if shape == (CHUNK * 2 * SPEC.hidden,):
            raise MemoryError
        return real(shape, *rest, **options)

    monkeypatch.setattr(np, "zeros", no_room)
    with pytest.raises(BackendError, match=f"enough memory for features of {CHUNK} rows"):
        OnnxRuntimeBackend(bundle, threads=1)


@pytest.mark.parametrize("shape", [(2**50,), (2**31, 2**31, 2**31)])
def test_no_machine_has_that_much(shape: tuple[int, ...]) -> None:
    with pytest.raises(BackendError, match="enough memory for all of it"):
        zeros(shape, "float32", "all of it")


def test_a_chunk_needs_no_more_rows_than_a_prompt_can_have(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.root, folder)
    document = json.loads((folder / "manifest.json").read_text())
    document["limits"]["prefill_chunk"] = 2**31 - 1
    (folder / "manifest.json").write_text(json.dumps(document))
    found = []
    for root in (bundle.root, folder):
        with Generator(root, threads=1, num_draft_tokens=BLOCK - 1) as generator:
            longest = LONG * 5
            plain = generator.generate(longest, stop_token_ids=[], speculative=False)
            found.append((answer(generator, longest), plain.token_ids))
    assert found[0] == found[1]
    assert len(found[0][1]) == LIMIT - len(LONG * 5)
