"""What the repository carries."""

from __future__ import annotations

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
MOST_BYTES = 30_000_000
SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".data", ".npz"}


def weights(folder: Path) -> dict[str, int]:
    """Bytes of each file of weights in it."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths}


def too_large(folder: Path) -> bool:
    return sum(weights(folder).values()) >= MOST_BYTES


def test_weights_stay_under_30_megabytes() -> None:
    """All of them together: whoever clones the repository gets them all."""
    assert "smollm2-135m-instruct-dflash/model.safetensors" in weights(EXAMPLES)
    assert not too_large(EXAMPLES), weights(EXAMPLES)


@pytest.mark.parametrize("sizes", [(MOST_BYTES,), (MOST_BYTES // 2, MOST_BYTES - MOST_BYTES // 2)])
def test_larger_ones_would_be_seen(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    for number, size in enumerate(sizes):
        (tmp_path / str(number)).mkdir()
        with (tmp_path / str(number) / "model.safetensors").open("wb") as file:
            file.truncate(size)
    assert too_large(tmp_path)
