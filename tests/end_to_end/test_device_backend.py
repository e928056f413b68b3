"""A step that stays on a device gives what the graphs give when the host runs them one by one.

The device is the host, and works as a GPU's stream does: later, and in order.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_rt import Bundle, Generator, SamplingParams
from dflash_rt.backends.base import Inject
from dflash_rt.backends.cpu.backend import OnnxRuntimeBackend
from dflash_rt.backends.device.backend import DeviceBackend, DeviceOptions
from dflash_rt.backends.device.host import HostDevice
from dflash_rt.backends.device.onnxruntime import OnnxRuntimeEngines
from dflash_rt.backends.device.protocols import Work
from dflash_rt.cli.main import main
from dflash_rt.decoding.loop import decode
from dflash_rt.decoding.sequence import Sequence
from dflash_rt.errors import BackendError, NumericalError
from dflash_rt.sampling.greedy import accept_greedy
from tests.end_to_end.device_pairs import (
    CHUNK,
    LENGTH,
    MODES,
    PAIRS,
    PROMPT,
    Counting,
    Told,
    device_bundles,
    made,
    on_device,
    tokens_of,
)
from tests.pairs import run_loop


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    return device_bundles(tmp_path_factory)


@pytest.fixture(scope="module")
def bundle(bundles: Callable[[str], Bundle]) -> Bundle:
    return bundles("full")


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(bundle, threads=1)


@pytest.fixture(scope="module", params=MODES)
def device(request: pytest.FixtureRequest, bundle: Bundle) -> Iterator[DeviceBackend]:
    backend = on_device(bundle, **MODES[request.param])
    yield backend
    backend.close()


# --- The same tokens and the same accepted counts ---


@pytest.mark.parametrize("name", PAIRS)
def test_every_kind_of_drafter(name: str, bundles: Callable[[str], Bundle]) -> None:
    bundle = bundles(name)
    reference = OnnxRuntimeBackend(bundle, threads=1)
    accepted: set[int] = set()
    for mode in ("graph, ahead", "neither"):
        backend = on_device(bundle, **MODES[mode])
        for width in {2, bundle.manifest.drafter.block_size}:
            for prompt in (PROMPT, [2, 1] * 25):
                new_tokens = LENGTH - len(prompt)  # to the last row that there is
                run = run_loop(reference, bundle, prompt, new_tokens, width)
                assert run_loop(backend, bundle, prompt, new_tokens, width) == run, (mode, width)
                accepted |= set(run.accepted)
        backend.close()
    assert {0, 1} <= accepted  # otherwise nothing was tried


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_random_widths_stops_and_departures(
    data: st.DataObject, device: DeviceBackend, expected: OnnxRuntimeBackend
) -> None:
    """One request after another, some cut off between two steps, on a backend that is never cleared."""
    for _ in range(2):
        prompt = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=20))
        widths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=12))
        stops = frozenset(data.draw(st.sets(st.integers(0, 5), max_size=1)))
        new_tokens = data.draw(st.integers(1, 40))
        options: dict[str, Any] = {
            "max_new_tokens": new_tokens,
            "prefill_chunk": CHUNK,
            "stop_token_ids": stops,
        }
        leave = data.draw(st.integers(1, 20))
        runs = []
        for backend in (expected, device):
            steps = decode(backend, Sequence(np.array(prompt)), verify_len=Told(list(widths)), **options)  # type: ignore[arg-type]
            runs.append([step for _, step in zip(range(leave), steps, strict=False)])
            steps.close()
        assert runs[0] == runs[1]


def test_features_of_plain_steps_are_injected(device: DeviceBackend, expected: OnnxRuntimeBackend) -> None:
    widths = [1] * 15 + [4, 4, 1, 3, 2, 4]
    assert tokens_of(device, PROMPT, 60, widths) == tokens_of(expected, PROMPT, 60, widths)


@pytest.mark.parametrize("name", ["full", "dflash 2"])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.8, seed=7),
        SamplingParams(temperature=1.3, top_p=0.9, repetition_penalty=1.2, seed=8, logprobs=2),
        SamplingParams(presence_penalty=1.0, logprobs=1),
    ],
)
def test_sampled_requests(name: str, sampling: SamplingParams, bundles: Callable[[str], Bundle]) -> None:
    """Logits and proposals come from the device; a greedy request before and after leaves no trace."""
    results = []
    for backend in ("onnxruntime", "onnxruntime-device"):
        with Generator(bundles(name), backend, threads=1, num_draft_tokens=2) as generator:
            for request in (SamplingParams(), sampling, SamplingParams(), sampling):
                result = generator.generate(PROMPT, max_new_tokens=30, sampling=request, stop_token_ids=[])
                logprobs = [item.logprob for item in result.logprobs or ()]
                results.append(
                    (result.token_ids, result.stats.accepted_per_step, np.round(logprobs, 4).tolist())
                )
    assert results[:4] == results[4:]


def test_a_policy_that_adapts(bundle: Bundle) -> None:
    """Widths depend on the clock there; tokens don't."""
    with (
        Generator(bundle, threads=1, num_draft_tokens=0) as plain,
        Generator(bundle, "onnxruntime-device", threads=1, num_draft_tokens="auto") as adaptive,
    ):
        assert adaptive.step_costs is not None
        for prompt in (PROMPT, [3]):
            wanted = plain.generate(prompt, max_new_tokens=40, stop_token_ids=[]).token_ids
            assert adaptive.generate(prompt, max_new_tokens=40, stop_token_ids=[]).token_ids == wanted
    assert not (bundle.root / "reports").exists()  # costs of a device depend on more than their key says


# --- Running ahead ---


def test_the_next_step_is_launched_before_the_last_is_read(bundle: Bundle) -> None:
    device = Counting()
    backend = made(bundle, device)
    tokens_of(backend, PROMPT, 40, [4])  # the graphs are made and compared
    counts = []
    sequence = Sequence(np.array(PROMPT))
    before = device.launches
    for _ in decode(backend, sequence, max_new_tokens=40, verify_len=4, prefill_chunk=CHUNK):
        counts.append(device.launches - before - len(sequence.accepted_per_step))
    assert counts[0] == 0  # the prefill
    assert 1 in counts[1:]
    assert set(counts[1:]) <= {0, 1}
    assert counts[-1] == 0  # none behind a step that may have been the last


def test_a_whole_step_is_one_launch(bundle: Bundle) -> None:
    device = Counting()
    backend = made(bundle, device, run_ahead=False)
    tokens_of(backend, PROMPT, 60, [3])
    before, steps = device.launches, tokens_of(backend, PROMPT, 60, [3]).accepted
    assert device.launches - before == len(steps)


def test_too_many_launches_are_refused(bundle: Bundle) -> None:
    backend = on_device(bundle)
    backend.prefill(np.array([PROMPT[:CHUNK]]), np.array([0]), inject=True)
    backend.launch(2, np.array([1]), np.array([CHUNK]))
    backend.launch(2)
    with pytest.raises(BackendError, match="too many steps"):
        backend.launch(2)
    backend.collect()
    with pytest.raises(BackendError, match="no logits to read"):
        backend.logits()
    backend.collect()
    assert backend.logits().shape == (1, 2, 6)


def test_a_restart_while_steps_run_ahead(bundle: Bundle, expected: OnnxRuntimeBackend) -> None:
    """The step takes anchor and start from the call, not from the device; the next one goes on from there."""
    backend = on_device(bundle)
    backend.warm_up([4])
    assert backend._runner.is_warm(4, inject=True)  # captured, compared and trusted
    prompt = np.array([PROMPT[:CHUNK]])
    for anchor, start in ((2, CHUNK), (5, CHUNK - 3), (0, 1)):
        at, anchors = np.array([start]), np.array([anchor])
        for each in (backend, expected):
            each.prefill(prompt, np.array([0]), inject=True)
        backend.launch(4, np.array([1]), np.array([CHUNK]))
        backend.launch(4)
        backend.collect()
        backend.launch(4, anchors, at)  # the step before it isn't read
        backend.launch(4)
        wanted = expected.step(anchors, at, verify_len=4, inject=None)
        accepted = int(accept_greedy(wanted.drafted, wanted.verified)[0])
        following = expected.step(
            wanted.verified[:, accepted], at + accepted + 1, verify_len=4, inject=Inject(at, 4)
        )
        for right in (wanted, following):
            found = backend.collect()
            assert np.array_equal(found.drafted, right.drafted)
            assert np.array_equal(found.verified, right.verified)


# --- Few runs and few graphs ---


class Prepared(OnnxRuntimeEngines):
    """Notes what is prepared; may want caches of its own size."""

    def __init__(self, bundle: Bundle, capacity: int | None = None) -> None:
        super().__init__(bundle, cuda=False, threads=1)
        self.capacity = capacity
        self.runs: list[Any] = []

    def prepare(self, run: Any, address: Callable[[str], int], scratch: int) -> Work:
        self.runs.append(run)
        return super().prepare(run, address, scratch)


def test_runs_are_few_whatever_the_prompts_length(bundle: Bundle, expected: OnnxRuntimeBackend) -> None:
    """After settling nothing is prepared or captured any more, at any length and width."""
    engines, device = Prepared(bundle), Counting()
    backend = DeviceBackend(bundle, device, engines, name="test", options=DeviceOptions())
    backend.warm_up(range(1, 5))
    made, captures = len(engines.runs), device.captures
    assert captures == 4
    assert len(set(engines.runs)) == made
    sizes = {run.inputs[0].shape for run in engines.runs if run.graph == "target" and run.prefill}
    assert len(sizes) == 2  # 4 and 8 rows
    # One for all widths: each step injects a block.
    assert len([run for run in engines.runs if run.graph == "inject" and not run.prefill]) == 1
    for length in (*range(1, 20), LENGTH - 1):
        prompt = ([2, 1, 0, 3, 4, 1, 5] * 13)[:length]
        wanted = tokens_of(expected, prompt, min(6, LENGTH - length), [4, 2, 3, 1])
        assert tokens_of(backend, prompt, min(6, LENGTH - length), [4, 2, 3, 1]) == wanted
    assert (len(engines.runs), device.captures) == (made, captures)


def test_a_settled_width_is_one_launch_from_the_first_request_on(bundle: Bundle) -> None:
    device = Counting()
    backend = made(bundle, device, run_ahead=False)
    backend.warm_up([3])
    before, steps = device.launches, tokens_of(backend, PROMPT, 60, [3]).accepted
    assert device.launches - before == len(steps)


def test_a_generator_settles_the_widths_that_it_may_use(bundle: Bundle) -> None:
    for drafts, settled in ((2, {1, 3}), ("auto", {1, 2, 3, 4})):
        backend = on_device(bundle)
        with Generator(bundle, backend, num_draft_tokens=drafts):  # type: ignore[arg-type]
            assert {w for w in range(1, 5) if backend._runner.is_warm(w, inject=True)} == settled


def test_settling_where_there_is_hardly_room(bundle: Bundle) -> None:
    for length in (1, 2, 5):
        backend = on_device(bundle, max_seq_len=length)
        backend.warm_up(range(1, 5))
        assert backend._runner.is_warm(4, inject=True)


def test_the_engines_say_how_many_rows_a_cache_has(bundle: Bundle, expected: OnnxRuntimeBackend) -> None:
    """``max_seq_len`` is then a limit for requests only: the shapes of engines are what they are."""
    engines = Prepared(bundle, capacity=44)
    options = DeviceOptions(max_seq_len=20)
    backend = DeviceBackend(bundle, HostDevice(), engines, name="test", options=options)
    assert (backend.max_seq_len, backend.capacity) == (20, 44)
    assert tokens_of(backend, PROMPT, 9, [4]) == tokens_of(expected, PROMPT, 9, [4])
    rows = {shape[2] for run in engines.runs for shape in [i.shape for i in run.inputs] if len(shape) == 4}
    assert rows == {44}
    with pytest.raises(BackendError, match="outgrew the caches"):
        backend.reserve(21)


def test_closing_lets_go_of_everything(bundle: Bundle) -> None:
    """Contexts and sessions hold memory of the device for as long as anybody holds them."""
    backend = on_device(bundle)
    engines = backend._engines
    assert isinstance(engines, OnnxRuntimeEngines)
    sessions = [weakref.ref(session) for session in engines._sessions.values()]
    tokens_of(backend, PROMPT, 30, [4])
    backend.close()
    gc.collect()
    assert [session() for session in sessions] == [None] * len(sessions)
    backend.close()


# --- Errors ---


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("cache", "stage"), [("target.value.0", "target_head"), ("draft.value.0", "draft_head")]
)
def test_a_step_that_isnt_finite(
    mode: str, cache: str, stage: str, bundle: Bundle, expected: OnnxRuntimeBackend
) -> None:
    """The request ends, and the next one finds clean caches."""
    backend = on_device(bundle, **MODES[mode])
    wanted = tokens_of(expected, PROMPT, 40, [4])
    assert tokens_of(backend, PROMPT, 40, [4]) == wanted
    steps = decode(backend, Sequence(np.array(PROMPT)), max_new_tokens=40, verify_len=4, prefill_chunk=CHUNK)
    next(steps)
    next(steps)
    backend._memory.write(cache, np.full(8, np.nan, np.float32))
    with pytest.raises(NumericalError, match=stage):
        for _ in steps:
            pass
    assert tokens_of(backend, PROMPT, 40, [4]) == wanted


def test_a_forgotten_step_that_isnt_finite(bundle: Bundle, expected: OnnxRuntimeBackend) -> None:
    """Nobody reads it, but what it wrote would spoil the next request."""
    backend = on_device(bundle)
    backend.prefill(np.array([PROMPT[:CHUNK]]), np.array([0]), inject=True)
    backend._memory.write("target.value.0", np.full(8, np.nan, np.float32))
    backend.launch(4, np.array([1]), np.array([CHUNK]))
    assert tokens_of(backend, PROMPT, 40, [4]) == tokens_of(expected, PROMPT, 40, [4])


def test_nothing_is_written_behind_the_caches(bundle: Bundle) -> None:
    backend = on_device(bundle, max_seq_len=20)
    assert backend.capacity == 24
    with pytest.raises(BackendError, match="outgrew the caches"):
        backend.reserve(21)
    with pytest.raises(BackendError, match="behind the caches"):
        backend.launch(1, np.array([1]), np.array([21]))
    with pytest.raises(BackendError, match="behind the caches"):
        backend.prefill(np.array([[1, 2]]), np.array([19]), inject=True)
    backend.launch(4, np.array([1]), np.array([17]))
    with pytest.raises(BackendError, match="behind the caches"):
        backend.launch(1)  # it might begin at 21, and what it injects then ends behind the caches
    backend.launch(1, np.array([1]), np.array([20]))
    with pytest.raises(BackendError, match="behind the caches"):
        backend.launch(1)


def test_a_shorter_max_seq_len_is_the_generators_limit(bundle: Bundle) -> None:
    options = {"max_seq_len": 20}
    with Generator(bundle, "onnxruntime-device", backend_options=options, num_draft_tokens=3) as generator:
        assert generator.limits.max_seq_len == 20
        assert len(generator.generate(PROMPT, stop_token_ids=[]).token_ids) == 20 - len(PROMPT)


def test_options_from_the_command_line(bundle: Bundle) -> None:
    """They reach the backend: one that doesn't have an option refuses it, one that has it checks it."""
    command = ["generate", str(bundle.root), "--prompt", "x", "--backend-option", "max_seq_len=0"]
    for backend, message in (
        ("onnxruntime", "no such option"),
        ("onnxruntime-device", "max_seq_len is wrong"),
    ):
        result = CliRunner().invoke(main, [*command, "--backend", backend])
        assert result.exit_code == 1
        assert message in result.output


def test_memory_is_counted_before_it_is_taken(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "dflash_rt"):
        backend = on_device(bundle)
    budget = backend.budget
    assert [record.name for record in caplog.records] == ["dflash_rt.backends.device"] * 2
    assert str(budget) in caplog.text
    rows = LENGTH + 4
    assert budget.caches == 4 * 2 * 2 * 8 * rows * (2 + 1)  # bytes, heads, keys and values, head_dim, layers
    assert budget.total == budget.weights + budget.caches + budget.activations
    on_device(bundle, memory_limit=budget.total).close()
    with pytest.raises(BackendError, match="doesn't fit") as caught:
        on_device(bundle, memory_limit=budget.total - 1)
    assert "caches" in str(caught.value)
    with pytest.raises(BackendError, match="doesn't fit"):
        made(bundle, HostDevice(limit=budget.total - 1))


class Stranger:
    """Engines that can't be loaded, with caches of a size of their own."""

    max_seq_len, capacity, weight_bytes = 24, 28, 1000

    def load(self, device: HostDevice) -> int:
        raise BackendError("can't be loaded")

    def close(self) -> None:
        pass


def test_what_a_device_is_to_hold_is_told_before_anything_is_loaded(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level("INFO", "dflash_rt.backends.device"),
        pytest.raises(BackendError, match="can't be loaded"),
    ):
        DeviceBackend(bundle, HostDevice(), Stranger(), name="test", options=DeviceOptions())  # type: ignore[arg-type]
    assert "test on host needs weights 0.0 MB, caches" in caplog.text


def test_commands_tell_what_memory_is_wanted(bundle: Bundle) -> None:
    """On stderr, before it is taken; the library itself says nothing."""
    command = ["generate", str(bundle.root), "--prompt", "x", "--backend", "onnxruntime-device"]
    refused = CliRunner().invoke(main, [*command, "--backend-option", "memory_limit=1"])
    assert refused.exit_code == 1
    told = "onnxruntime-device on host needs weights"
    assert told in refused.stderr.partition("doesn't fit")[0]
    again = CliRunner().invoke(main, [*command, "--max-new-tokens", "2"])
    assert again.stderr.count("onnxruntime-device on host") == 2
    assert told not in again.stdout
    assert not logging.getLogger("dflash_rt.backends.device").handlers


def test_a_bundle_without_the_graphs(bundle: Bundle, tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "old"
    shutil.copytree(bundle.root, folder)
    document = json.loads((folder / "manifest.json").read_text())
    for name in ("accept", "draft_check"):
        del document["graphs"][name], document["files"][f"{name}.onnx"]
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BackendError, match="can't run on a device"):
        on_device(Bundle.open(folder))
    OnnxRuntimeBackend(Bundle.open(folder), threads=1).close()
