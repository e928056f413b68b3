"""What the commands do, one function each; :mod:`__main__` has their options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from dflash_export.errors import RecipeError
from dflash_rt.text.prompt_files import read_prompts
from examples.train_drafter.budget import Budget
from examples.train_drafter.card import read_record, write_card
from examples.train_drafter.dataset import read_sequences
from examples.train_drafter.drafter import (
    Drafter,
    check_written,
    continued_drafter,
    new_drafter,
    write_drafter,
)
from examples.train_drafter.evaluation import evaluate as score
from examples.train_drafter.generation import make_data
from examples.train_drafter.prompts import own_prompts, training_prompts
from examples.train_drafter.self_prompts import BEGINNINGS, read_beginnings, self_prompts, write_prompts
from examples.train_drafter.target import Target, open_target
from examples.train_drafter.training import Outcome, Trainer, TrainOptions

__all__ = ["Run", "data", "evaluate", "open_run", "train"]

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Run:
    """A target on a device and the folder of a run: ``data/``, ``initial/``, ``drafter/``, records."""

    target: Target
    device: torch.device
    precision: str
    output: Path
    held_out: list[str]

    @property
    def on_cuda(self) -> bool:
        """Whether defaults are those of a GPU."""
        return self.device.type == "cuda"

    @property
    def state(self) -> Path:
        """The last checkpoint; while there is one, training is under way and its data is settled."""
        return self.output / "state.safetensors"

    @property
    def dtype(self) -> torch.dtype:
        """Of the target's weights; training under autocast when it is bfloat16."""
        return _PRECISIONS[self.precision]


def log(line: str) -> None:
    """Progress, on stderr."""
    click.echo(line, err=True)


def open_run(given: Mapping[str, Any]) -> Run:
    """Load the target and the held-out prompts."""
    device = torch.device(given["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = given["precision"] or ("bf16" if device.type == "cuda" else "fp32")
    target = open_target(
        given["target"],
        device=device,
        dtype=_PRECISIONS[precision],
        template_kwargs=dict(given["template_kwargs"]),
    )
    return Run(target, device, precision, given["output"], read_prompts(given["held_out"]))


def data(run: Run, given: Mapping[str, Any]) -> bool:
    """Make what is still missing of ``data/``; True when all of it is there."""
    budget = Budget(given["data_minutes"])
    batch = given["data_batch"] or (512 if run.on_cuda else 16)
    prompts, sources = _prompts(run, given, batch)
    return make_data(
        run.target.model,
        run.target.encode(prompts),
        run.output / "data",
        max_new_tokens=given["max_new_tokens"],
        stop_token_ids=run.target.stop_token_ids,
        batch=batch,
        seed=given["seed"],
        prompt_source=" and ".join(sources),
        budget=budget,
        log=log,
        sealed=run.state.is_file(),
    )


def _prompts(run: Run, given: Mapping[str, Any], batch: int) -> tuple[list[str], list[str]]:
    """Training prompts, and where they are from in words."""
    own, wanted, written = given["prompt_file"], given["prompt_count"], given["self_prompts"]
    if given["beginnings"] is not None and not written:
        raise RecipeError(
            "--beginnings has nothing to begin",
            found="no --self-prompts",
            expected="both or neither: they are the first words of prompts that the target writes",
            remedy="give --self-prompts, or leave out --beginnings",
        )
    if wanted is None:  # unless only the target is asked for prompts
        wanted = 0 if written and own is None else 20_000
    prompts: list[str] = []
    sources: list[str] = []
    if own is not None:
        prompts += own_prompts(own, run.held_out)[:wanted]
        sources.append(own.name)
    elif wanted:
        prompts += training_prompts(wanted, seed=given["seed"], held_out=run.held_out)
        sources.append("templates and word lists")
    if written:
        beginnings = read_beginnings(given["beginnings"] or BEGINNINGS)
        prompts += write_prompts(
            run.output / "data" / "prompts.json",
            lambda: self_prompts(
                run.target,
                written,
                beginnings=beginnings,
                batch=batch,
                seed=given["seed"],
                held_out=run.held_out,
                log=log,
            ),
            {"self_prompts": written, "seed": given["seed"], "beginnings": beginnings},
        )
        sources.append(f"{written:,} that the target wrote itself")
    if not prompts:
        raise RecipeError(
            "there is nothing to ask the target",
            found="--prompts 0 without --self-prompts",
            expected="some prompts",
            remedy="give --prompts, --self-prompts or --prompt-file",
        )
    return list(dict.fromkeys(prompts)), sources


def train(run: Run, given: Mapping[str, Any]) -> bool:
    """Train to the end, or to the end of this call; ``drafter/`` and its card are written either way.

    True at the end of the run.
    """
    call = Budget(given["stop_after"])
    train_options = TrainOptions(
        **{
            name: given[name]
            for name in (
                "steps",
                "minutes",
                "batch",
                "anchors",
                "learning_rate",
                "gamma",
                "validation",
                "seed",
            )
        }
    )
    sequences = read_sequences(run.output / "data")
    drafter = _first_drafter(run, given)
    if not run.state.is_file():  # with one, this run is under way and has written its start
        write_drafter(run.output / "initial", drafter)
    longest = int(sequences.lengths.max())
    check_written(run.output / "initial", run.target.source, max_seq_len=longest)
    trainer = Trainer(
        drafter,
        run.target.model,
        sequences,
        train_options,
        dtype=run.dtype,
        compiled=_compiled(run, given["compiled"]),
        log=log,
    )
    outcome = trainer.run(run.state, call=call)
    write_drafter(run.output / "drafter", drafter)
    kept = train_options.validation
    count, tokens = len(sequences) - kept, sequences.new_tokens(skip=kept)
    _write_record(run, drafter, trainer, outcome, sequences=count, new_tokens=tokens)
    write_card(run.output)
    ended = "finished" if outcome.finished else "stopped"
    log(f"train: {ended} at step {outcome.step}, wrote {run.output / 'drafter'}")
    return outcome.finished


def _compiled(run: Run, wanted: bool | None) -> bool:
    if wanted and not run.on_cuda:
        raise RecipeError(
            "--compile needs CUDA",
            found=f"device {run.device}",
            expected="a CUDA device: FlexAttention has no backward pass elsewhere",
            remedy="leave out --compile for the dense mask",
        )
    return run.on_cuda if wanted is None else wanted


def _first_drafter(run: Run, given: Mapping[str, Any]) -> Drafter:
    if given["init_from"] is not None:
        surplus = [name for name in ("layers", "taps", "mask_token_id") if given[name] is not None]
        if surplus:
            raise RecipeError(
                "a drafter that exists can't be given another shape",
                found=", ".join(f"--{name.replace('_', '-')}" for name in surplus) + " with --init-from",
                expected="one or the other",
                remedy="leave out --init-from for a new drafter",
            )
        return continued_drafter(given["init_from"], block_size=given["block_size"])
    if given["mask_token_id"] is None:
        raise RecipeError(
            "a new drafter needs a mask token",
            found="no --mask-token-id",
            expected="the id of a token of the target that no text contains, such as a reserved one",
            remedy="look for one in the target's tokenizer.json and give --mask-token-id",
        )
    return new_drafter(
        run.target,
        layers=given["layers"] or 3,
        block_size=given["block_size"] or 8,
        mask_token_id=given["mask_token_id"],
        feature_layers=None if given["taps"] is None else _integers("--taps", given["taps"]),
        seed=given["seed"],
    )


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise RecipeError(
            f"{option} is wrong",
            found=text,
            expected="whole numbers with commas between them",
            remedy="write it like 1,14,27",
        ) from error


def _write_record(
    run: Run, drafter: Drafter, trainer: Trainer, outcome: Outcome, *, sequences: int, new_tokens: int
) -> None:
    device = (
        torch.cuda.get_device_name(run.device)
        if run.on_cuda
        else f"a CPU, threads: {torch.get_num_threads()}"
    )
    record = {
        "target": run.target.source.id,
        "config": dict(drafter.raw),
        "parameters": sum(parameter.numel() for parameter in drafter.model.parameters()),
        "start": drafter.start,
        "options": asdict(trainer.options),
        "gamma": trainer.gamma,
        "device": device,
        "precision": run.precision,
        "torch": str(torch.__version__),
        "sequences": sequences,
        "new_tokens": new_tokens,
        "outcome": asdict(outcome),
    }
    _write_json(run.output / "training.json", record)


def evaluate(run: Run, given: Mapping[str, Any]) -> dict[str, Any]:
    """Score ``initial/`` and ``drafter/``; returns what it writes to evaluation.json."""
    if run.dtype != torch.float32:  # what published numbers are measured in
        run = open_run({**given, "precision": "fp32"})
    names = ["initial", "drafter"] if given["before"] else ["drafter"]
    missing = [name for name in names if not (run.output / name).is_dir()]
    if missing:
        raise RecipeError(
            "there is no drafter to evaluate",
            found=f"no {' and no '.join(missing)} in {run.output}",
            expected="the folder of a run that has trained",
            remedy="train first",
        )
    prompts = run.target.encode(run.held_out[: given["limit"]])
    record: dict[str, Any] = {"prompts": len(prompts), "max_new_tokens": given["evaluation_tokens"]}
    record["drafters"] = {}
    for name in names:
        scores = score(
            run.output / name,
            run.target,
            prompts,
            widths=_integers("--widths", given["widths"]),
            max_new_tokens=given["evaluation_tokens"],
            log=log,
        )
        record["drafters"][name] = [one.to_json() for one in scores]
    _write_json(run.output / "evaluation.json", record)
    if read_record(run.output / "training.json"):
        write_card(run.output)
    return record


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
