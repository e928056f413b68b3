"""The training loop: AdamW on the drafter's weights, with checkpoints and a budget of minutes."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dflash_export.errors import RecipeError
from dflash_rt.errors import NumericalError
from examples.train_drafter.blocks import (
    block_hidden,
    block_labels,
    block_loss,
    dense_attention,
    flex_attention_for,
    position_weights,
)
from examples.train_drafter.budget import Budget
from examples.train_drafter.checkpoint import load_state, save_state
from examples.train_drafter.dataset import Batch, Sequences, generator
from examples.train_drafter.drafter import Drafter
from examples.train_drafter.target import features_of

__all__ = ["Outcome", "TrainOptions", "Trainer", "default_gamma", "steps_through"]


@dataclass(frozen=True)
class TrainOptions:
    """What makes two runs the same. One ends after ``steps`` steps or ``minutes`` minutes, what comes first.

    ``minutes`` counts all calls of a run that is resumed. The learning rate rises over the first ``warmup``
    share of the way to that end and falls to zero on a cosine. ``validation`` sequences are never trained on.
    """

    steps: int | None = None
    minutes: float | None = None
    batch: int = 16
    anchors: int = 64
    learning_rate: float = 6e-4
    warmup: float = 0.04
    weight_decay: float = 0.01
    clip: float = 1.0
    gamma: float | None = None
    validation: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise RecipeError(
                "training has no end",
                found="neither steps nor minutes",
                expected="at least one: the learning rate falls to zero at the end",
                remedy="give --steps or --minutes",
            )


@dataclass
class Outcome:
    """How far a run is. ``seconds`` and ``blocks`` count all calls; ``curve`` has an entry a validation."""

    step: int = 0
    seconds: float = 0.0
    blocks: int = 0
    finished: bool = False
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class _Pass:
    """A forward pass: mean loss, its weights' sum, and the tokens of each block with the bonus.

    ``tokens`` int64 ``[batch, blocks]``: what a decoding step from the anchor decides; 0 where there is none.
    """

    loss: torch.Tensor
    weight: torch.Tensor
    tokens: torch.Tensor


def default_gamma(block_size: int) -> float:
    """The paper's decay of the loss over a block: 4, 5 and 7 for blocks of 8, 10 and 16; others in line."""
    return max(1.0, min(block_size / 2, 5 + (block_size - 10) / 3))


class Trainer:
    """One run. Owns the optimizer and the counts; the drafter's weights change in place."""

    def __init__(
        self,
        drafter: Drafter,
        target: Any,
        sequences: Sequences,
        options: TrainOptions,
        *,
        dtype: torch.dtype,
        compiled: bool,
        log: Callable[[str], None],
    ) -> None:
        """``dtype`` bfloat16 trains under autocast. ``compiled`` uses torch.compile and FlexAttention."""
        if len(sequences) <= options.validation:
            raise RecipeError(
                "there is too little data",
                found=f"{len(sequences)} sequences, {options.validation} of them for validation",
                expected="more sequences than those for validation",
                remedy="make more data, or lower --validation",
            )
        self.drafter, self.options, self.outcome = drafter, options, Outcome()
        self._config = drafter.config
        self._target, self._sequences, self._log = target, sequences, log
        self._device, self._dtype, self._compiled = target.device, dtype, compiled
        drafter.model.to(self._device)
        named = dict(drafter.model.named_parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in named.values() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        fused = self._device.type == "cuda"
        self._optimizer = torch.optim.AdamW(groups, options.learning_rate, betas=(0.9, 0.95), fused=fused)
        self.gamma = options.gamma or default_gamma(self._config.block_size)
        self._weights = position_weights(self._config.block_size, self.gamma).to(self._device)

    # --- The loop ---

    def run(
        self,
        state: Path,
        *,
        call: Budget,
        checkpoint_minutes: float = 5.0,
        validation_share: float = 0.1,
        log_every: int = 20,
    ) -> Outcome:
        """Train to the end of the run or of the call's budget, from ``state`` if that file exists.

        Writes ``state`` at the end and every ``checkpoint_minutes``; a run that has ended is left as it is.
        Checkpoints are validated while that takes no more than ``validation_share`` of the time, the first
        weights and the last ones always.
        Raises NumericalError when the loss or what is to be written isn't finite; the last checkpoint is kept
        then.
        """
        if state.is_file():
            counts = load_state(state, self.drafter.model, self._optimizer, run=self._identity())
            self.outcome = Outcome(**counts)
            self._log(f"train: going on from step {self.outcome.step}, {self.outcome.seconds:.0f} s")
        if self.outcome.finished:
            return self.outcome
        begun = call.seconds
        if self.outcome.step == 0:
            self.validate()
        earlier, saved, before = self.outcome.seconds, call.seconds, None
        validated, cost = saved, saved - begun
        while (progress := self._progress()) < 1 and call.allows_another(before):
            before = call.seconds
            loss, accepted, rate = self._step(progress)
            outcome = self.outcome
            outcome.step, outcome.seconds = outcome.step + 1, earlier + call.seconds
            if outcome.step % log_every == 0:
                self._report(float(loss), float(accepted), rate)
            if call.seconds - saved > 60 * checkpoint_minutes:
                start = call.seconds
                if cost <= validation_share * (start - validated):
                    self.validate()
                    validated = call.seconds
                    cost = validated - start
                self._save(state)
                saved = call.seconds
        self.outcome.finished = self._progress() >= 1
        self.validate()
        self.outcome.seconds = earlier + call.seconds
        self._save(state)
        return self.outcome

    def _progress(self) -> float:
        """Share of the run that is done: by steps or by time, whichever is further."""
        options, outcome = self.options, self.outcome
        by_steps = outcome.step / options.steps if options.steps else 0.0
        by_time = outcome.seconds / (60 * options.minutes) if options.minutes else 0.0
        return max(by_steps, by_time)

    def _step(self, progress: float) -> tuple[torch.Tensor, torch.Tensor, float]:
        options = self.options
        rate = options.learning_rate * schedule(progress, options.warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        step, seed = self.outcome.step, options.seed
        chosen = self._sequences.shuffled(step, options.batch, seed, skip=options.validation)
        draw = generator(seed + 1, step)
        batch = self._sequences.batch(chosen, options.anchors, draw, fixed_shape=self._compiled)
        self.outcome.blocks += int(batch.real.sum())
        batch = batch.to(self._device)
        passed = self._forward(batch, self._features(batch))
        self._optimizer.zero_grad(set_to_none=True)
        passed.loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.drafter.model.parameters(), options.clip)
        self._optimizer.step()
        return passed.loss.detach(), passed.tokens.sum() / batch.real.sum().clamp(min=1), rate

    def _features(self, batch: Batch) -> torch.Tensor:
        return features_of(self._target, batch.ids, self._config.feature_layers)

    def _forward(self, batch: Batch, features: torch.Tensor) -> _Pass:
        model, config = self.drafter.model, self._config
        size, rows = config.block_size, batch.ids.shape[1]
        labels, counts = block_labels(batch.ids, batch.lengths, batch.anchors, batch.real, size)
        first = batch.ids.gather(1, batch.anchors)[:, :, None]
        masks = torch.full_like(labels, config.mask_token_id)
        raw = self._target.get_input_embeddings().weight
        embedded = torch.nn.functional.embedding(torch.cat([first, masks], dim=2), raw)
        embedded = embedded.float() * config.input_embedding_scale
        attention = flex_attention_for if self._compiled else dense_attention
        attend = attention(batch.anchors, rows, size)
        with self._autocast():
            hidden = block_hidden(
                model, features.float(), embedded, batch.anchors, attend, compiled=self._compiled
            )
            weights = (counts * self._weights).flatten()
            head = self._target.get_output_embeddings()
            drafts = hidden[:, :, 1:].flatten(0, 2)
            loss, drafted = block_loss(
                model, head, drafts, labels.flatten(), weights, compiled=self._compiled
            )
        right = (drafted.view_as(labels) == labels) & counts
        accepted = right.cumprod(dim=-1).sum(-1) + 1
        return _Pass(loss, weights.sum(), accepted * batch.real)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._dtype)

    @torch.no_grad()
    def validate(self) -> None:
        """Loss at every anchor of the sequences that aren't trained on, and the tokens of decoding's steps.

        An answer is the target's greedy one and every place of it has been an anchor, so decoding's steps can
        be read off: each begins where the one before ended. Once a step: a checkpoint may be a call's last
        step too.
        """
        count, curve = self.options.validation, self.outcome.curve
        if count == 0 or (curve and curve[-1]["step"] == self.outcome.step):
            return
        sums = torch.zeros(2)
        tokens = steps = 0
        for start in range(0, count, min(self.options.batch, count)):
            features, blocks = None, []
            for batch in self._validation_batches(start):
                features = self._features(batch) if features is None else features
                passed = self._forward(batch, features)
                sums += torch.stack([passed.loss * passed.weight, passed.weight]).float().cpu()
                blocks.append(passed.tokens)
            for row in torch.cat(blocks, dim=1).tolist():
                decided = [number for number in row if number]
                tokens, steps = tokens + len(decided), steps + steps_through(decided)
        loss, weight = sums.tolist()
        values = {"loss": loss / weight, "tokens_per_step": tokens / steps}
        self._require_finite(values["loss"])
        point = {"step": self.outcome.step, "seconds": round(self.outcome.seconds, 1)}
        self.outcome.curve.append(point | {key: round(value, 4) for key, value in values.items()})
        self._log(
            f"validation: step {self.outcome.step}, loss {values['loss']:.4f}, "
            f"tokens a step {values['tokens_per_step']:.3f}"
        )

    def _validation_batches(self, start: int) -> Iterator[Batch]:
        """Sequences from ``start`` on. The last batch is filled up with blocks that don't count.

        So all have one shape, which is what compiled code is made for.
        """
        count = self.options.validation
        places = torch.arange(start, start + min(self.options.batch, count))
        chosen = places.clamp(max=count - 1)
        for batch in self._sequences.all_anchors(chosen, self.options.anchors, fixed_shape=self._compiled):
            yield replace(batch, real=batch.real & (places < count)[:, None]).to(self._device)

    def _report(self, loss: float, accepted: float, rate: float) -> None:
        outcome = self.outcome
        self._require_finite(loss)
        self._log(
            f"train: step {outcome.step}, loss {loss:.4f}, tokens a step {accepted:.3f}, rate {rate:.2e}, "
            f"{outcome.seconds:.0f} s, {outcome.blocks} blocks"
        )

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise self._diverged("the loss", loss)

    def _require_finite_state(self) -> None:
        """Look at all that a checkpoint holds, weights and moments."""
        for name, parameter in self.drafter.model.named_parameters():
            moments = self._optimizer.state[parameter].values()
            if not all(bool(torch.isfinite(value).all()) for value in (parameter.detach(), *moments)):
                raise self._diverged("the drafter's weights or moments", f"NaN or infinity in {name}")

    def _diverged(self, what: str, found: object) -> NumericalError:
        # The same steps would follow from the checkpoint, and another learning rate is another run.
        return NumericalError(
            f"training diverged: {what} not finite at step {self.outcome.step}",
            found=found,
            expected="finite numbers; nothing was written over the last checkpoint",
            remedy="delete state.safetensors, if there is one, and train again with a lower --learning-rate; "
            "the data stays",
        )

    def _save(self, state: Path) -> None:
        self._require_finite_state()
        counts = asdict(self.outcome)
        save_state(state, self.drafter.model, self._optimizer, counts, run=self._identity())

    def _identity(self) -> str:
        data = {"sequences": len(self._sequences), "tokens": int(self._sequences.lengths.sum())}
        return json.dumps({**asdict(self.options), **data, "config": dict(self.drafter.raw)}, sort_keys=True)


def steps_through(tokens: Sequence[int]) -> int:
    """Decoding steps of an answer. From its i-th place as an anchor a step decides ``tokens[i]`` >= 1."""
    place = steps = 0
    while place < len(tokens):
        place, steps = place + tokens[place], steps + 1
    return steps


def schedule(progress: float, warmup: float) -> float:
    """Factor of the learning rate at a share of the run in [0, 1]: linear rise, then a cosine to zero."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
