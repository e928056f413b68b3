"""Which kernels a step spends its time in, by PyTorch's profiler; for a GPU.

python benchmarks/gpu_kernels.py BUNDLE --backend onnxruntime-cuda --context 1024 --width 16 --width 1
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

_WARM = 3


def main() -> int:
    """Print a table for each width; microseconds and calls are means over the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="onnxruntime-cuda")
    parser.add_argument("--context", type=int, default=1024, help="rows of the prompt, random tokens")
    parser.add_argument("--width", type=int, action="append", required=True, help="rows of a step; repeat")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--top", type=int, default=18)
    options = parser.parse_args()
    import torch
    from torch.profiler import ProfilerActivity, profile

    from dflash_bench.gpu.device_clock import prefill
    from dflash_rt import Bundle
    from dflash_rt.backends import create_backend

    if not torch.cuda.is_available():
        print("PyTorch sees no GPU here, and its profiler is what this uses.", file=sys.stderr)
        return 2
    bundle = Bundle.open(options.bundle)
    # One by one: a captured graph is a single launch.
    backend = create_backend(options.backend, bundle, options={"cuda_graph": False, "run_ahead": False})
    torch.zeros(1).cuda()
    limits, vocab = bundle.manifest.limits, bundle.manifest.target.vocab_size
    prefill(
        backend, np.random.default_rng(0).integers(0, vocab, options.context).tolist(), limits.prefill_chunk
    )
    place = options.context
    for width in options.width:
        for warm in (True, False):
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                for _ in range(_WARM if warm else options.steps):
                    # Its anchor's row is committed and no draft: what random weights mostly come to.
                    backend.step(np.array([1]), np.array([place]), verify_len=width, inject=None)
                    place += 1
        events = sorted(profiler.key_averages(), key=lambda event: -event.device_time_total)
        total = sum(event.device_time_total for event in events)
        print(f"\n{width} rows: {total / options.steps / 1e3:.2f} ms of kernels a step\n")
        print("| us | calls | kernel |\n| --- | --- | --- |")
        for event in events[: options.top]:
            time, calls = event.device_time_total / options.steps, event.count / options.steps
            print(f"| {time:.0f} | {calls:.0f} | `{event.key[:110]}` |")
    backend.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
