"""A bundle's graphs over a given sequence: the logits behind every token, in any pass shape.

This is not the decoding loop: nothing is drafted, accepted or rolled back, and every row is fed once and in
order, so that what comes out is the graphs' own numerical error and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dflash_rt import Bundle
from dflash_rt.backends.onnxruntime_session import open_session
from dflash_rt.backends.state import make_states
from dflash_rt.bundle.dtypes import NUMPY_TYPES, ONNX_TYPES, as_float32
from dflash_rt.errors import BackendError

__all__ = ["Pass", "Replay"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass of the target.

    Attributes:
        first_row: position of its first row.
        features: float32 ``[rows, taps * hidden]``.
        first_token: the new token that ``logits[0]`` chooses.
        logits: float32 ``[tokens, vocab]``: of the pass's rows that choose a new token; none in most of the
            prompt.
    """

    first_row: int
    features: Array
    first_token: int
    logits: Array


class Replay:
    """Graphs ``embed``, ``target`` and ``lm_head`` of a bundle, loaded apart from any backend.

    A quantised bundle is computed with its dequantised weights and float activations. With ``fused`` the
    target is the bundle's fused form, which must be there; otherwise the plain graph.
    ``threads`` as for the backend ``onnxruntime``. Raises BackendError when ONNX Runtime can't load a graph.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None, fused: bool = False) -> None:
        self._manifest = bundle.manifest
        self._chunk = bundle.manifest.limits.prefill_chunk
        self._specs = {name: bundle.manifest.graphs[name] for name in ("embed", "target", "lm_head")}
        self._none = np.zeros((0, bundle.manifest.target.vocab_size), np.float32)
        paths = {name: bundle.graph_path(name) for name in self._specs}
        if fused:
            path = bundle.fused_path("target")
            assert path is not None
            paths["target"] = path
        # Quantised weights as they are, without the rounding of activations that a CPU's speed asks for.
        config = {"session.disable_quant_qdq": "1"}
        self._sessions = {
            name: open_session(name, path, threads=threads, config=config) for name, path in paths.items()
        }

    @classmethod
    def all_forms(cls, bundle: Bundle, *, threads: int | None = None) -> list[Replay]:
        """Of every form of the target that the bundle has, and the one that decodes on a CPU first."""
        forms = [False] if bundle.fused_path("target") is None else [True, False]
        return [cls(bundle, threads=threads, fused=fused) for fused in forms]

    def passes(self, prompt: Sequence[int], new_tokens: Sequence[int], width: int) -> Iterator[Pass]:
        """Feed the prompt in prefill chunks, then all new tokens but the last, ``width`` rows at a time.

        With ``width`` the rows of a verify pass these are the shapes in which drafted decoding runs the
        target, and with 1 those of plain decoding.
        """
        fed = np.array([[*prompt, *new_tokens[:-1]]], np.int64)
        prompt_rows, rows = len(prompt), fed.shape[1]
        caches = make_states(self._manifest, 1, most_rows=rows)["target"].allocate(rows)
        starts = [*range(0, prompt_rows, self._chunk), *range(prompt_rows, rows, width)]
        for start, stop in zip(starts, [*starts[1:], rows], strict=True):
            (embeddings,) = self._run("embed", {"input_ids": fed[:, start:stop]}, {})
            inputs = {"embeddings": embeddings, "start": np.array([start], np.int64)}
            hidden, features = self._run("target", inputs, caches)
            skipped = max(0, prompt_rows - 1 - start)
            chosen = hidden[:, skipped:]
            # The last row of a prompt chunk chooses a token only if it is the prompt's last.
            logits = self._run("lm_head", {"hidden": chosen}, {})[0][0] if chosen.shape[1] else self._none
            yield Pass(
                first_row=start,
                features=as_float32(features[0]),
                first_token=start + skipped - (prompt_rows - 1),
                logits=logits,
            )

    def _run(self, graph: str, inputs: Mapping[str, Array], caches: Mapping[str, Array]) -> list[Array]:
        """Run one graph; caches are updated in place. Returns the other outputs, in order."""
        spec, session = self._specs[graph], self._sessions[graph]
        binding = session.io_binding()
        rows = next(array.shape[1] for array in inputs.values() if array.ndim > 1)
        outputs = []
        arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        for tensor in spec.inputs:
            array = caches[tensor.name] if tensor.name in caches else arrays[tensor.name]
            binding.bind_input(
                tensor.name, "cpu", 0, ONNX_TYPES[tensor.dtype], array.shape, array.ctypes.data
            )
        for tensor in spec.outputs:
            if tensor.name in spec.aliases:
                array = caches[spec.aliases[tensor.name]]
            else:
                array = np.zeros(tensor.sized(batch=1, rows=rows), NUMPY_TYPES[tensor.dtype])
                outputs.append(array)
            binding.bind_output(
                tensor.name, "cpu", 0, ONNX_TYPES[tensor.dtype], array.shape, array.ctypes.data
            )
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's own classes share no public base
            raise BackendError(
                f"ONNX Runtime failed in graph {graph}",
                found=error,
                expected=f"a run of {rows} rows",
                remedy="check the bundle with `dflash-export inspect`; if it is whole, report this",
            ) from error
        return outputs
