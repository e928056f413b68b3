"""An edge device: compile a bundle that was copied to it, then answer a prompt on its GPU.

    python examples/edge_device.py bundles/qwen3-4b "Why is the sky blue?" --device jetson-thor
    python examples/edge_device.py bundles/qwen3-4b "Why is the sky blue?" \
        --backend tensorrt-rtx --device rtx-4090

Needs the extra compile and that of the backend; no PyTorch.
"""

from __future__ import annotations

import argparse
import sys

from dflash_export import compile_engines
from dflash_rt import BackendUnavailableError, Bundle, DFlashError, Generator


def open_generator(bundle: Bundle, backend: str, max_seq_len: int) -> Generator:
    """On the GPU, or on the CPU where there is none."""
    try:
        return Generator(bundle, backend=backend, backend_options={"max_seq_len": max_seq_len})
    except BackendUnavailableError as error:
        print(error, "so the CPU answers.", sep="\n", file=sys.stderr)
        return Generator(bundle)


def run(arguments: argparse.Namespace) -> None:
    """Compile what isn't compiled yet, and answer."""
    bundle = Bundle.open(arguments.bundle, verify_files=True)  # a copy may be damaged
    # Memory is what an edge device lacks: the caches are as long as this, whatever a request needs.
    max_seq_len = min(arguments.max_seq_len, bundle.manifest.limits.max_seq_len)
    compiled = compile_engines(
        bundle, backend=arguments.backend, device=arguments.device, max_seq_len=max_seq_len
    )
    print(f"built {len(compiled.built)} engines, reused {len(compiled.reused)}", file=sys.stderr)
    with open_generator(bundle, arguments.backend, max_seq_len) as generator:
        for chunk in generator.stream(arguments.prompt, max_new_tokens=arguments.max_new_tokens):
            print(chunk.text, end="", flush=True)
        print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("prompt")
    parser.add_argument("--backend", default="tensorrt")
    parser.add_argument("--device")
    parser.add_argument("--max-seq-len", type=int, default=4096)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    try:
        run(parser.parse_args())
    except DFlashError as error:
        sys.exit(str(error))
