"""What widths, fixed or adapting, make of answers whose drafts are known: by costs, without a clock.

    python benchmarks/width_replay.py record engines/smollm2-135m acceptance.json [--prompts FILE --limit N]
    python benchmarks/width_replay.py replay acceptance.json --costs 1,1.45,1.52,1.61,1.71,1.80,2.05,2.29

``record`` decodes the greedy prompts of the built-in mix (and chats of a file) plainly, drafts a whole block
at every position, and keeps how many of its drafts the target confirmed. ``replay`` walks through these
answers at each fixed width and with the policy that adapts, in an order that differs from run to run, and
adds up what the steps cost. It takes a block's first drafts to be those of a narrower block, which isn't
quite so.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from dflash_bench.prompts import mixed_prompts
from dflash_rt import Bundle, Generator
from dflash_rt.backends.base import Inject
from dflash_rt.backends.cpu.backend import OnnxRuntimeBackend
from dflash_rt.decoding.policy import FixedWidth, WidthPolicy
from dflash_rt.sampling.greedy import accept_greedy
from dflash_rt.speculation.width import AcceptanceHistory, AdaptiveWidth
from dflash_rt.speculation.width_correction import RunningCosts, StepCosts

NEW_TOKENS = 128
RUNS = 20


@dataclass(frozen=True)
class Answer:
    """``confirmed[i]``: drafts that the target confirms in a whole block after ``i + 1`` tokens."""

    kind: str
    confirmed: tuple[int, ...]


@dataclass(frozen=True)
class Replay:
    """Tokens over plain steps: of all answers together, and the least of a single one."""

    overall: float
    lowest: float


def record(
    backend: OnnxRuntimeBackend, kind: str, prompt: Sequence[int], *, block: int, chunk: int, stops: set[int]
) -> Answer:
    """Decode one answer. Each step counts as if all its drafts had failed: the next begins one token on.

    The protocol has no such steps: a loop that accepts drafts goes on behind them. This backend takes them:
    rows of drafts lie behind those that are used, and are overwritten.
    """
    backend.clear()
    backend.reserve(len(prompt) + NEW_TOKENS + block)
    ids, rows = np.array([prompt], np.int64), 0
    confirmed: list[int] = []
    while rows < len(prompt):
        piece = ids[:, rows : rows + chunk]
        token = int(backend.prefill(piece, np.array([rows]), inject=True)[0])
        rows += piece.shape[1]
    inject = None
    while len(confirmed) < NEW_TOKENS - 1 and token not in stops:
        output = backend.step(np.array([token]), np.array([rows]), verify_len=block, inject=inject)
        confirmed.append(int(accept_greedy(output.drafted, output.verified)[0]))
        token = int(output.verified[0, 0])
        inject = Inject(np.array([rows]), 1)
        rows += 1
    return Answer(kind, tuple(confirmed))


def steps(answer: Answer, policy: WidthPolicy, costs: StepCosts) -> float:
    """Plain steps that the answer takes. The last one may give a token too many, which isn't counted."""
    position, spent = 0, 0.0
    while position < len(answer.confirmed):
        width = policy.choose()
        accepted = min(answer.confirmed[position], width - 1)
        policy.observe(width, accepted, costs.seconds[width - 1])
        position += accepted + 1
        spent += costs.relative[width - 1]
    return spent


def replay(answers: Sequence[Answer], costs: StepCosts, make: Callable[[], WidthPolicy]) -> Replay:
    """All answers, one after another; ``make`` gives the policy of each."""
    taken = [steps(answer, make(), costs) for answer in answers]
    lengths = [len(answer.confirmed) for answer in answers]
    return Replay(sum(lengths) / sum(taken), min(map(float.__truediv__, map(float, lengths), taken)))


def replay_adaptive(answers: Sequence[Answer], costs: StepCosts, seed: int) -> Replay:
    """As a fresh generator would, with the answers in an order of its own."""
    order = list(answers)
    random.Random(seed).shuffle(order)
    running, history = RunningCosts(costs), AcceptanceHistory(costs.widest)
    return replay(order, costs, lambda: AdaptiveWidth(running, history))


def table(answers: Sequence[Answer], costs: StepCosts) -> str:
    """Lines: each fixed width, the best of them for each answer, and the one that adapts."""
    fixed = {
        width: replay(answers, costs, lambda width=width: FixedWidth(width))  # type: ignore[misc]
        for width in range(1, costs.widest + 1)
    }
    least = [min(steps(answer, FixedWidth(width), costs) for width in fixed) for answer in answers]
    adaptive = [replay_adaptive(answers, costs, seed) for seed in range(RUNS)]
    rates = [one.overall for one in adaptive]
    lines = [f"{len(answers)} answers; tokens a plain step: overall, and of the slowest answer"]
    lines += [f"width {width:2}     {one.overall:.3f}  {one.lowest:.3f}" for width, one in fixed.items()]
    lines.append(f"best of each {sum(len(answer.confirmed) for answer in answers) / sum(least):.3f}")
    lines.append(
        f"adaptive     {fmean(rates):.3f}  {min(one.lowest for one in adaptive):.3f}"
        f"  ({RUNS} orders: {min(rates):.3f} to {max(rates):.3f})"
    )
    return "\n".join(lines)


def _record_all(bundle: Bundle, prompts: Path | None, limit: int) -> list[Answer]:
    asked = [(kind, prompt) for kind, prompt, sampling in mixed_prompts(bundle) if sampling.temperature == 0]
    if prompts is not None:
        items = json.loads(prompts.read_text(encoding="utf-8"))[:limit]
        asked += [(item["kind"], [{"role": "user", "content": item["prompt"]}]) for item in items]
    backend, manifest, answers = OnnxRuntimeBackend(bundle), bundle.manifest, []
    with Generator(bundle, num_draft_tokens=0) as generator:
        for kind, prompt in asked:
            ids = generator.encode(prompt)
            answers.append(
                record(
                    backend,
                    kind,
                    ids,
                    block=manifest.drafter.block_size,
                    chunk=manifest.limits.prefill_chunk,
                    stops=set(manifest.generation.stop_token_ids),
                )
            )
            print(kind, fmean(answers[-1].confirmed or [0]), flush=True)
    return answers


def main() -> None:
    """Record, or replay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("bundle", type=Path)
    recording.add_argument("--prompts", type=Path, help="JSON list of objects with kind and prompt")
    recording.add_argument("--limit", type=int, default=32)
    replaying = commands.add_parser("replay")
    replaying.add_argument("--costs", required=True, help="of steps at width 1, 2, … in any unit")
    for command in (recording, replaying):
        command.add_argument("answers", type=Path, help="JSON file of recorded answers")
    options = parser.parse_args()
    if options.command == "record":
        answers = _record_all(Bundle.open(options.bundle), options.prompts, options.limit)
        lines = ",\n".join(json.dumps(asdict(answer)) for answer in answers)
        options.answers.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    else:
        read = json.loads(options.answers.read_text(encoding="utf-8"))
        answers = [Answer(item["kind"], tuple(item["confirmed"])) for item in read]
        print(table(answers, StepCosts(tuple(map(float, options.costs.split(","))))))


if __name__ == "__main__":
    main()
