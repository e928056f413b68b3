"""What a backend is unless it says otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from dflash_rt import Bundle, Generator
from dflash_rt.backends.base import Backend
from dflash_rt.backends.scripted import ScriptedBackend
from dflash_rt.errors import BackendError
from tests.rt.bundle_maker import manifest_document, write_bundle


def test_the_defaults() -> None:
    backend: Backend = ScriptedBackend(lambda prefix: 1)
    assert (backend.max_seq_len, backend.runs_ahead, backend.share_weights()) == (None, False, None)
    backend.warm_up([1, 2])
    for call in (lambda: backend.launch(2), backend.collect):
        with pytest.raises(BackendError, match="doesn't run ahead") as caught:
            call()
        assert "scripted" in str(caught.value)


def test_a_generator_takes_no_lookalike(tmp_path: Path) -> None:
    class Lookalike:
        def step(self) -> None:
            pass

    document = manifest_document()
    document["tokenizer"] = None
    bundle = Bundle.open(write_bundle(tmp_path / "bundle", document))
    with pytest.raises(BackendError, match="isn't a backend"):
        Generator(bundle, Lookalike())  # type: ignore[arg-type]
