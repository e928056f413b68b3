"""The torch modules that only some kinds of drafter have.

DFlash 2 follows its reference, PyPI dflash 0.1.0, ``dflash/model.py``: ``GroupedDynamicCausalConv`` and
``CandidateSelector``. Parameter names are the checkpoint's.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["GroupedCausalConv", "Select"]

_STEEPEST = 1e38  # 1 / temperature, kept finite in float32, as dflash_rt/sampling/distribution.py keeps it


class GroupedCausalConv(nn.Module):
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


class Select(nn.Module):
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
