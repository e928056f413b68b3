"""Pairs whose steps stay on a device, and ways to run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dflash_export import build
from dflash_rt import Bundle
from dflash_rt.backends import create_backend
from dflash_rt.backends.device.backend import DeviceBackend, DeviceOptions
from dflash_rt.backends.device.host import HostDevice
from dflash_rt.backends.device.onnxruntime import OnnxRuntimeEngines
from dflash_rt.backends.device.protocols import Captured, Work
from dflash_rt.decoding.loop import decode
from dflash_rt.decoding.sequence import Sequence
from tests.export.drafters.speculators_pairs import make_speculators, speculators_config
from tests.pairs import Run, TargetSpec, drafter_config, make_drafter, make_target

FULL, SLIDING = "full_attention", "sliding_attention"
CHUNK, LENGTH = 8, 90
TELLING = [0, 3, 4, 5, 3, 2, 1, 2, 2, 4]  # goes on with drafts of several tokens
PROMPT = [1, 2, 0, 3, 1, 2, 0, 3, 1, 2, 0]  # two chunks


@dataclass(frozen=True)
class Pair:
    """A target, and what writes its drafter."""

    target: TargetSpec
    save: Callable[[Path], object]


def zlab(target: TargetSpec, **more: Any) -> Pair:
    raw = drafter_config(target, **more)
    return Pair(target, partial(make_drafter, raw=raw, seed=3, spread=0.3))


def speculators(target: TargetSpec, *layers: str, **more: Any) -> Pair:
    raw = speculators_config(target, layer_types=list(layers), **more)
    return Pair(target, partial(make_speculators, raw=raw, seed=5, spread=0.5))


def sliding(size: int, *layers: str) -> dict[str, Any]:
    return {
        "layer_types": list(layers),
        "layers": len(layers),
        "sliding_window": size,
        "use_sliding_window": True,
    }


DFLASH2 = {"conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 6, "selector_top_k": 3}
PAIRS = {
    "full": zlab(TargetSpec("qwen3", vocab=6, layers=2), layers=1),
    "windowed": zlab(TargetSpec("qwen2", vocab=5, layers=2), block_size=5, **sliding(7, SLIDING)),
    "own vocabulary, from the anchor": speculators(
        TargetSpec("smollm2", vocab=4, tied=False),
        SLIDING,
        FULL,
        block_size=3,
        own_vocab=3,
        window=3,
        sample_from_anchor=True,
    ),
    "dflash 2": zlab(
        TargetSpec("qwen3", vocab=4, layers=2),
        block_size=4,
        architectures=["DFlash2DraftModel"],
        **sliding(9, SLIDING),
        is_causal=False,
        dflash_config=DFLASH2 | {"final_logit_softcapping": 5.0},
    ),
}
MODES = {
    "graph, ahead": {},
    "graph": {"run_ahead": False},
    "ahead": {"cuda_graph": False},
    "neither": {"cuda_graph": False, "run_ahead": False},
}


def on_device(bundle: Bundle, **options: Any) -> DeviceBackend:
    backend = create_backend("onnxruntime-device", bundle, threads=1, options=options)
    assert isinstance(backend, DeviceBackend)
    return backend


@dataclass
class Told:
    """Widths that a test chooses; the last one again and again."""

    widths: list[int]
    widest: int = 4

    def choose(self) -> int:
        return self.widths.pop(0) if len(self.widths) > 1 else self.widths[0]

    def observe(self, width: int, accepted: int, seconds: float | None = None) -> None:
        pass


def tokens_of(backend: Any, prompt: list[int], new_tokens: int, widths: list[int], **more: Any) -> Run:
    sequence = Sequence(np.array(prompt, np.int64))
    policy = Told(list(widths))
    for _ in decode(
        backend, sequence, max_new_tokens=new_tokens, verify_len=policy, prefill_chunk=CHUNK, **more
    ):
        pass
    return Run(sequence.new_tokens, sequence.accepted_per_step)


class Counting(HostDevice):
    """Counts how many marks were set and not waited for, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.captures = 0

    def capture(self, record: Work) -> Captured:
        captured = super().capture(record)
        self.captures += 1

        class Launching:
            def launch(_) -> None:  # noqa: N805
                self.launches += 1
                captured.launch()

        return Launching()


def made(bundle: Bundle, device: HostDevice, **options: Any) -> DeviceBackend:
    engines = OnnxRuntimeEngines(bundle, cuda=False, threads=1)
    return DeviceBackend(bundle, device, engines, name="test", options=DeviceOptions(**options))


def device_bundles(factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Bundles of :data:`PAIRS` by name, each built when it is first asked for."""
    made: dict[str, Bundle] = {}

    def get(name: str) -> Bundle:
        if name not in made:
            folder, pair = factory.mktemp("pair"), PAIRS[name]
            make_target(folder / "target", pair.target, seed=3, spread=0.5)
            pair.save(folder / "drafter")
            made[name] = build(
                folder / "target",
                folder / "drafter",
                folder / "bundle",
                max_seq_len=LENGTH,
                prefill_chunk=CHUNK,
            )
        return made[name]

    return get
