"""The card that goes with a trained drafter, from what the commands recorded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["read_record", "write_card"]


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object that a command has written; empty when it hasn't yet."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return record


def write_card(output: Path) -> Path:
    """Write ``drafter/README.md`` from the records in ``output``, and return its path."""
    training = read_record(output / "training.json")
    data = read_record(output / "data" / "data.json")
    sections = [
        _head(training),
        _data(training, data),
        _training(training),
        _results(read_record(output / "evaluation.json")),
    ]
    path = output / "drafter" / "README.md"
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def _head(training: dict[str, Any]) -> str:
    config = training["config"]
    dflash = config["dflash_config"]
    block_size = dflash.get("block_size", config.get("block_size"))
    return _paragraphs(
        f"# A DFlash drafter for {training['target']}",
        f"DFlash v1 (arXiv 2602.06036) in z-lab's format, bfloat16, {training['parameters']:,} parameters: "
        f"{config['num_hidden_layers']} layers, hidden {config['hidden_size']}, blocks of {block_size}, "
        f"features of target layers {', '.join(map(str, dflash['target_layer_ids']))}, mask token "
        f"{dflash['mask_token_id']}. Embedding and head are the target's. Made by `examples/train_drafter`.",
    )


def _data(training: dict[str, Any], data: dict[str, Any]) -> str:
    return _paragraphs(
        "## Data",
        f"The target's own greedy answers, at most {data['max_new_tokens']} tokens each; prompts: "
        f"{data['prompt_source']}. Trained on {training['sequences']:,} sequences with "
        f"{training['new_tokens']:,} answer tokens; {training['options']['validation']} more were kept for "
        "validation. The held-out prompts below are not among them.",
    )


def _training(training: dict[str, Any]) -> str:
    outcome, options = training["outcome"], training["options"]
    state = "the whole schedule" if outcome["finished"] else "stopped before the end of its schedule"
    facts = (
        f"{outcome['step']:,} steps, {outcome['blocks']:,} blocks, {outcome['seconds'] / 3600:.2f} hours on "
        f"{training['device']} ({training['precision']}, torch {training['torch']}); {state}. Start: "
        f"{training['start']}. AdamW, learning rate {options['learning_rate']:g}, {options['batch']} "
        f"sequences of up to {options['anchors']} anchors a step; cross entropy weighted by "
        f"exp(-(k-1)/{training['gamma']:g})."
    )
    rows = [(p["step"], p["loss"], p["tokens_per_step"]) for p in outcome["curve"]]
    table = _table(("step", "validation loss", "tokens a step, as decoding takes them"), rows)
    return _paragraphs("## Training", facts, table)


def _results(evaluation: dict[str, Any]) -> str:
    if not evaluation:
        return _paragraphs("## Results", "Not evaluated yet.")
    how = (
        f"{evaluation['prompts']} held-out prompts, up to {evaluation['max_new_tokens']} new tokens, greedy, "
        "float32, the reference's own loop (`dflash.model.dflash_generate`). Tokens a step count the bonus."
    )
    rows = [
        (name, s["width"], f"{s['tokens_per_step']:.3f}", f"{s['lowest']}, {s['highest']}", s["tokens"])
        for name, scores in evaluation["drafters"].items()
        for s in scores
    ]
    head = ("drafter", "width", "tokens a step", "lowest and highest prompt", "tokens")
    return _paragraphs("## Results", how, _table(head, rows))


def _paragraphs(*parts: str) -> str:
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
