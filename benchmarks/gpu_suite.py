"""Everything worth measuring on a GPU, in one command that ends in time.

    python benchmarks/gpu_suite.py                 on a machine with one GPU; no network is needed
    python benchmarks/gpu_suite.py --dry-run       on a CPU, with tiny pairs: shows that the suite runs

Results go to benchmarks/results/ as JSON and as a markdown page, written as the suite goes. What there is no
time, memory or library for is skipped, and the report says why. benchmarks/README.md describes the method.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # run as a script, this file's own folder is there instead
    from dflash_bench.gpu.command import main

    sys.exit(main(sys.argv[1:]))
