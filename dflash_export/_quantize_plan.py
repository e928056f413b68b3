"""What of a bundle is quantised, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dflash_rt.errors import RecipeError
from dflash_rt.manifest import QuantizationInfo

from .graph_passes import TracedGraph
from .quantization import METHOD, WeightFormat
from .quantize_pass import quantize_graph

__all__ = ["QuantizePlan", "make_plan"]

# Measured on the demo pair: about as fast as 64, and more exact. 128 is no divisor of its 576 inputs.
_DEFAULT_BLOCK = 32


@dataclass(frozen=True)
class QuantizePlan:
    """``target`` is the format of the target's linear layers, ``head`` that of the LM head, if any."""

    target: WeightFormat
    head: WeightFormat | None
    measure: bool

    def apply(self, graphs: Mapping[str, TracedGraph]) -> dict[str, TracedGraph]:
        """The graphs with the planned ones replaced. Raises what :func:`quantize_graph` raises."""
        changed = {"target": quantize_graph(graphs["target"], self.target)}
        if self.head is not None:
            changed["lm_head"] = quantize_graph(graphs["lm_head"], self.head)
        return {**graphs, **changed}

    def info(self, before: Mapping[str, TracedGraph], after: Mapping[str, TracedGraph]) -> QuantizationInfo:
        """What the manifest says, but for the cost."""
        return QuantizationInfo(
            weights=self.target.weights,
            head=None if self.head is None else "int8",
            block_size=self.target.block_size,
            method=METHOD,
            bytes=_bytes(after),
            bytes_before=_bytes(before),
            cost=None,
        )


def make_plan(
    quantize: str | None,
    block_size: int | None,
    *,
    head: bool | None,
    measure: bool | None,
    measure_tokens: int | None = None,
) -> QuantizePlan | None:
    """The plan behind a build's options, each of which may be ``None``; ``None`` if nothing is quantised.

    Raises:
        RecipeError: an option about quantisation without ``quantize``, or one about a measurement without it.
    """
    if quantize is None:
        given = {
            "quantize_block": block_size,
            "quantize_head": head,
            "measure_quantization": measure,
            "measure_tokens": measure_tokens,
        }
        useless = [name for name, value in given.items() if value is not None]
        if useless:
            raise RecipeError(
                f"{' and '.join(useless)} without quantize",
                found="no quantize",
                expected="quantize: int4 or int8, which the option is about",
                todo="add --int4 or --int8, or leave the option out",
            )
        return None
    if measure is False and measure_tokens is not None:
        raise RecipeError(
            "measure_tokens without a measurement",
            found="measure_quantization: false",
            expected="a measurement, whose length the option is about",
            todo="leave one of the two out",
        )
    size = _DEFAULT_BLOCK if block_size is None else block_size
    # The head chooses the tokens, of the target and of the drafter: 4 bits cost too much there.
    form = WeightFormat(quantize, size)  # type: ignore[arg-type]  # checked with the other options
    return QuantizePlan(form, WeightFormat("int8", size) if head else None, measure is not False)


def _bytes(graphs: Mapping[str, TracedGraph]) -> int:
    """Bytes of the weights that a plain step reads."""
    return sum(weight.nbytes for name in ("target", "lm_head") for weight in graphs[name].weights.values())
