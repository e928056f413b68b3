"""Steps of changing width on exported graphs: the drafter's caches are as if it had drafted all the time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from dflash_rt import Bundle, Generator
from dflash_rt.backends.base import Inject, IntArray, StepOutput
from dflash_rt.backends.onnxruntime import OnnxRuntimeBackend
from dflash_rt.loop import decode
from dflash_rt.sequence import Sequence

from ._pairs import TargetSpec, build, drafter_config, make_drafter, make_target

BLOCK, CHUNK, NEW = 5, 8, 90
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("widths")
    spec = TargetSpec("qwen3", vocab=12, tied=False)
    target = make_target(folder / "target", spec, seed=3, spread=0.3)
    drafter = make_drafter(folder / "drafter", drafter_config(spec, layers=2, block_size=BLOCK), seed=3, spread=0.2)
    return build(target, drafter, folder / "bundle", prefill_chunk=CHUNK)


@dataclass
class Told:
    widths: list[int]
    widest: int = BLOCK
    steps: int = field(default=0)

    def choose(self) -> int:
        self.steps += 1
        return self.widths[(self.steps - 1) % len(self.widths)]

    def observe(self, width: int, accepted: int) -> None:
        pass
