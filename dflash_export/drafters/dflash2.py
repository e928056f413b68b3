"""DFlash 2: convolutions around each half of a layer, and a selector among the best candidates of each row.

It follows its reference, PyPI dflash 0.1.0, ``dflash/model.py``: ``GroupedDynamicCausalConv`` and
``CandidateSelector``. Parameter names are the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from dflash_export.drafters.config import DrafterConfig, DrafterKind
from dflash_export.drafters.zlab import DFLASH2_KEYS, parse_layers, refuse_variants
from dflash_export.graphs.graph import GraphTensor, TracedGraph
from dflash_export.graphs.trace import rows, trace
from dflash_export.sources.config_reader import Findings
from dflash_export.sources.weights import Weights
from dflash_rt.errors import Problem

__all__ = ["Convolution", "DFlash2", "Selector"]

_STEEPEST = 1e38  # 1 / temperature, kept finite in float32, as dflash_rt/sampling/distribution.py keeps it
_REMEDY = "use the config.json that was published with the drafter"


@dataclass(frozen=True)
class Convolution:
    """Causal convolutions around each half of a layer: taps, and channels that share a kernel."""

    kernel_size: int
    group_size: int


@dataclass(frozen=True)
class Selector:
    """The candidate selector: width of its codebooks, and candidates for each row."""

    rank: int
    top_k: int


@dataclass(frozen=True)
class DFlash2(DrafterKind):
    """The second generation."""

    convolution: Convolution
    selector: Selector

    name = "dflash-v2"
    told_by = "architectures ['DFlash2DraftModel']"
    reference_class = "DFlash2DraftModel"
    graph_names = ("select",)
    shape_keys = frozenset({"conv_group_size", "conv_kernel_size", "selector_rank"})

    @classmethod
    def matches(cls, raw: Mapping[str, Any]) -> bool:
        return raw.get("architectures") == ["DFlash2DraftModel"]

    @classmethod
    def parse(cls, raw: Mapping[str, Any], findings: Findings) -> DrafterConfig:
        refuse_variants(raw)
        return parse_layers(
            raw,
            findings,
            lambda read: cls(
                Convolution(read.count("conv_kernel_size"), read.count("conv_group_size")),
                Selector(read.count("selector_rank"), read.count("selector_top_k")),
            ),
            DFLASH2_KEYS,
        )

    @property
    def selector_top_k(self) -> int:
        return self.selector.top_k

    def tensor_shapes(self, config: DrafterConfig) -> dict[str, tuple[int, ...]]:
        hidden, rank, shapes = config.hidden_size, self.selector.rank, dict[str, tuple[int, ...]]()
        taps, groups = self.convolution.kernel_size, hidden // self.convolution.group_size
        for layer in range(config.num_layers):
            for name in ("attention_conv", "mlp_conv"):
                shapes[f"layers.{layer}.{name}.base_kernel"] = (2, taps, hidden)
                shapes[f"layers.{layer}.{name}.kernel_projection.weight"] = (2 * taps * groups, hidden)
        shapes["candidate_selector.hidden_projection.weight"] = (rank, hidden)
        for name in ("predecessor_codebook", "successor_codebook"):
            shapes[f"candidate_selector.{name}"] = (config.vocab_size, rank)
        return shapes

    def problems(
        self, config: DrafterConfig, target_layers: int, weights: Weights, wrong: Set[str]
    ) -> Iterator[Problem]:
        if wrong & {"hidden_size", "vocab_size", "conv_group_size", "selector_top_k"}:
            return
        size, top_k = self.convolution.group_size, self.selector.top_k
        if config.hidden_size % size:
            found = f"conv_group_size {size}, hidden_size {config.hidden_size}"
            expected = "a divisor of hidden_size"
            yield Problem("the drafter's convolution groups don't fit", found, expected, _REMEDY)
        if top_k > config.vocab_size:
            found, expected = f"selector_top_k {top_k}", f"at most the vocabulary, {config.vocab_size}"
            yield Problem("the drafter selects among too many candidates", found, expected, _REMEDY)

    def layer_modules(self, config: DrafterConfig) -> dict[str, nn.Module]:
        sizes = config.hidden_size, self.convolution.kernel_size, self.convolution.group_size
        return {name: _GroupedCausalConv(*sizes) for name in ("attention_conv", "mlp_conv")}

    def modules(self, config: DrafterConfig) -> dict[str, nn.Module]:
        return {"candidate_selector": _Selector(config, self.selector.rank)}

    def graphs(
        self, config: DrafterConfig, drafter: nn.Module, dtype: ir.DataType
    ) -> Iterator[tuple[str, TracedGraph]]:
        """``select``."""
        float32, int64, top_k = ir.DataType.FLOAT, ir.DataType.INT64, self.selector.top_k
        selector = drafter.candidate_selector
        assert isinstance(selector, nn.Module)
        select = trace(
            _Select(selector, top_k, config.block_size - 1),
            [
                GraphTensor("hidden", dtype, rows(config.hidden_size)),
                GraphTensor("logits", float32, rows(config.vocab_size)),
                GraphTensor("anchors", int64, ("batch",)),
                GraphTensor("temperature", float32, ("batch",)),
                GraphTensor("uniforms", float32, ("batch", "rows")),
            ],
            [
                GraphTensor("token_ids", int64, ("batch", "rows")),
                GraphTensor("candidates", int64, rows(top_k)),
                GraphTensor("probabilities", float32, rows(top_k)),
            ],
        )
        yield "select", select


class _Selector(nn.Module):
    """Parameters of the selector under their names in the checkpoint; :class:`_Select` uses them."""

    def __init__(self, config: DrafterConfig, rank: int) -> None:
        super().__init__()
        self.hidden_projection = nn.Linear(config.hidden_size, rank, bias=False)
        self.predecessor_codebook = nn.Parameter(torch.empty(config.vocab_size, rank))
        self.successor_codebook = nn.Parameter(torch.empty(config.vocab_size, rank))


class _GroupedCausalConv(nn.Module):
    """Two causal convolutions over the rows of a block: before a sublayer and after it.

    A kernel is a learnt base plus a part that each row computes for each group of channels; both convolutions
    take that part from the sublayer's input. Rows before the block count as zeros.
    """

    def __init__(self, hidden_size: int, kernel_size: int, group_size: int) -> None:
        super().__init__()
        self.kernel_size, self.group_size = kernel_size, group_size
        self.groups = hidden_size // group_size
        self.base_kernel = nn.Parameter(torch.empty(2, kernel_size, hidden_size))
        self.kernel_projection = nn.Linear(hidden_size, 2 * kernel_size * self.groups, bias=False)

    def prepare(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Convolve the sublayer's input ``[batch, rows, hidden]``; also what :meth:`finish` needs."""
        dynamic = self.kernel_projection(hidden)
        dynamic = dynamic.view(*hidden.shape[:-1], 2, self.kernel_size, self.groups)
        return self._convolve(hidden, dynamic[:, :, 0], 0), dynamic[:, :, 1]

    def finish(self, hidden: torch.Tensor, dynamic: torch.Tensor) -> torch.Tensor:
        """Convolve the sublayer's output with the dynamic part ``[batch, rows, taps, groups]``."""
        return self._convolve(hidden, dynamic, 1)

    def _convolve(self, hidden: torch.Tensor, dynamic: torch.Tensor, side: int) -> torch.Tensor:
        base = self.base_kernel[side].view(self.kernel_size, self.groups, self.group_size)
        kernel = base + dynamic[..., None]  # [batch, rows, taps, groups, channels]
        blocks = hidden.view(*hidden.shape[:-1], self.groups, self.group_size)
        output = kernel[:, :, 0] * blocks
        for offset in range(1, self.kernel_size):
            output = output + kernel[:, :, offset] * _later(blocks, offset)
        return output.flatten(2)


class _Select(nn.Module):
    """Choose a path through the candidates of each row: DFlash 2's selector, its walk included.

    A candidate scores its logit + ``<predecessor[previous] * projected hidden, successor[candidate]>``; the
    previous token is the one chosen in the row before. The reference walks row by row. Here each row is a
    function from the row before's choice to its own, computed for all candidates of that row at once, and the
    functions are composed in log2(rows) steps of doubling span: no loop, and any number of rows.
    """

    def __init__(self, selector: nn.Module, top_k: int, most_rows: int) -> None:
        super().__init__()
        self.candidate_selector = selector
        self.top_k = top_k
        self.most_rows = most_rows

    def forward(
        self,
        hidden: torch.Tensor,
        logits: torch.Tensor,
        anchors: torch.Tensor,
        temperature: torch.Tensor,
        uniforms: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens ``[batch, rows]``; candidates, and the probabilities of the choice, ``[batch, rows, k]``.

        ``temperature`` float32 ``[batch]``: 0 takes the best score; above it the row's number of ``uniforms``
        float32 ``[batch, rows]``, in ``[0, 1)``, picks from the softmax of scores divided by it.
        """
        unary, candidates = torch.topk(logits, self.top_k, dim=-1)
        scores = unary[:, :, None] + self._transitions(hidden, candidates, anchors)
        samples = temperature[:, None, None] > 0
        steady = torch.where(samples, temperature[:, None, None], 1.0)[..., None]
        # From the best one down: 0 times the steepest slope is still 0, and far below it a weight is 0.
        slope = (1.0 / steady).clamp(max=_STEEPEST)
        probabilities = torch.softmax((scores - scores.amax(-1, keepdim=True)) * slope, dim=-1)
        sums = probabilities.cumsum(-1)
        picked = (sums <= uniforms[:, :, None, None] * sums[..., -1:]).sum(-1)
        choices = torch.where(samples, picked.clamp(max=self.top_k - 1), scores.argmax(-1))
        path = self._composed(choices)[:, :, :1]  # [batch, rows, 1]; the anchor is every predecessor of row 0
        before = _later(path, 1)
        taken = probabilities.gather(2, before[..., None].expand(-1, -1, -1, self.top_k))[:, :, 0]
        certain = (torch.arange(self.top_k) == path).float()
        return candidates.gather(-1, path)[..., 0], candidates, torch.where(samples, taken, certain)

    def _transitions(
        self, hidden: torch.Tensor, candidates: torch.Tensor, anchors: torch.Tensor
    ) -> torch.Tensor:
        """float32 ``[batch, rows, k, k]``: what each candidate gains behind each one of the row before."""
        selector = self.candidate_selector
        first = anchors[:, None, None].expand(-1, 1, self.top_k)
        previous = torch.cat([first, candidates], dim=1)[:, : candidates.shape[1]]
        assert isinstance(selector.predecessor_codebook, torch.Tensor)
        assert isinstance(selector.successor_codebook, torch.Tensor)
        assert isinstance(selector.hidden_projection, nn.Linear)
        predecessors = nn.functional.embedding(previous, selector.predecessor_codebook)
        successors = nn.functional.embedding(candidates, selector.successor_codebook)
        projected = selector.hidden_projection(hidden)[:, :, None]
        return torch.matmul(predecessors * projected, successors.transpose(-1, -2)).float()

    def _composed(self, choices: torch.Tensor) -> torch.Tensor:
        """int64 ``[batch, rows, k]``: each row's choice as a function of row 0's predecessor."""
        itself = torch.arange(self.top_k)[None, None]
        span = 1
        while span < self.most_rows:
            identity = itself.expand(choices.shape[0], span, -1)
            earlier = torch.cat([identity, choices], dim=1)[:, : choices.shape[1]]
            choices = choices.gather(-1, earlier)
            span *= 2
        return choices


def _later(states: torch.Tensor, offset: int) -> torch.Tensor:
    """``states [batch, rows, …]`` moved by ``offset`` rows; zeros come in."""
    zeros = [0, 0] * (states.dim() - 2) + [offset, 0]
    return nn.functional.pad(states, zeros)[:, : states.shape[1]]
