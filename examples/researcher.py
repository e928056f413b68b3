"""A researcher: export a drafter with its target, prove that no token changes, measure what drafting gains.

    python examples/researcher.py Qwen/Qwen3-4B runs/my-drafter engines/my-drafter

Needs the extra export.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dflash_bench.run.measure import run_bench
from dflash_bench.run.report import render as render_bench
from dflash_export import build, render, verify
from dflash_rt import Bundle

PROMPTS = ["def reverse(text):", "The capital of France is", "1, 2, 3, 4,"]


def study(target: str, drafter: str, output: Path, *, max_new_tokens: int = 64) -> bool:
    """Print both reports. Whether every token is PyTorch's, or its difference is explained."""
    bundle = Bundle.open(output) if output.exists() else build(target, drafter, output, max_seq_len=2048)
    parity = verify(bundle, prompts=PROMPTS, target=target, drafter=drafter, max_new_tokens=max_new_tokens)
    print(render(parity))
    speed = run_bench(bundle, prompts=PROMPTS, max_new_tokens=max_new_tokens, repeats=2)
    print(render_bench(speed))
    return not parity.problems


if __name__ == "__main__":
    sys.exit(0 if study(sys.argv[1], sys.argv[2], Path(sys.argv[3])) else 1)
