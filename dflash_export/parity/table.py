"""A parity report as text."""

from __future__ import annotations

from collections.abc import Sequence

from dflash_export.parity.error_stats import ErrorStats
from dflash_export.parity.measure import PYTORCH
from dflash_export.parity.report import Difference, ReferenceDrafting, Token, VerifyReport

__all__ = ["render"]

_PROMPT_WIDTH = 40
_MAX_DIFFERENCES = 20


def render(report: VerifyReport) -> str:
    """The whole table."""
    parts = [_head(report), _prompts(report), _differences(report), _errors(report), _tokens(report)]
    parts += [_drafting(report), _verdict(report)]
    return "\n\n".join(part for part in parts if part)


def _head(report: VerifyReport) -> str:
    bundle, target, packages = report.bundle, report.target, report.environment
    ours = ", ".join(run.name for run in report.prompts[0].runs if run.name != PYTORCH)
    revision = f" at {target['revision']}" if target["revision"] else ""
    rows = [
        (
            "bundle",
            f"{bundle['name']}, {bundle['precision']}, manifest {str(bundle['manifest_sha256'])[:16]}",
        ),
        ("target", f"{target['id']}{revision}, the files that the bundle records"),
        ("PyTorch", f"{packages['torch']} in fp32, transformers {packages['transformers']}"),
        ("compared", f"{ours} and generate(do_sample=False), up to {report.max_new_tokens} new tokens"),
    ]
    if bundle["quantization"] is not None:
        rows.append(("weights", f"{bundle['quantization']}, dequantised in PyTorch and in the bundle"))
        rows.append(("", "so this judges graphs and loop; what quantisation costs is in the manifest"))
    return _aligned(rows)


def _prompts(report: VerifyReport) -> str:
    names = [run.name for run in report.prompts[0].runs if run.name != PYTORCH]
    head = ["#", "prompt", "in", "new", *names, "least margin", "verdict"]
    rows = [head]
    for prompt in report.prompts:
        new = next(len(run.token_ids) for run in prompt.runs if run.name == PYTORCH)
        equal = [str(run.equal_to_pytorch) for run in prompt.runs if run.name != PYTORCH]
        margin = f"{prompt.smallest_margin:.2g}"
        counts = [str(len(prompt.prompt_token_ids)), str(new), *equal]
        rows.append([str(prompt.index), _short(prompt.text), *counts, margin, prompt.verdict])
    title = "leading tokens that equal PyTorch's (least margin: PyTorch's best minus second best logit)"
    right = set(range(2, len(head) - 1))
    return f"{title}\n{_aligned(rows, indent='  ', right=right)}"


def _differences(report: VerifyReport) -> str:
    # Runs that diverge from another one in the same way share an entry.
    alike: dict[tuple[object, ...], list[Difference]] = {}
    for prompt in report.prompts:
        for item in prompt.differences:
            key = (prompt.index, item.token, item.tokens, item.between[1])
            alike.setdefault(key, []).append(item)
    if not alike:
        return ""
    entries = list(alike.items())
    lines = [line for key, items in entries[:_MAX_DIFFERENCES] for line in _difference(key[0], items)]
    if len(entries) > _MAX_DIFFERENCES:
        lines.append(f"  and {len(entries) - _MAX_DIFFERENCES} more, in the JSON report")
    return "\n".join(["first differences", *lines])


def _difference(prompt: object, items: Sequence[Difference]) -> list[str]:
    first = items[0]
    names = " and ".join(item.between[0] for item in items)
    best, second = (f"{_token(token)} {token.logit:.6g}" for token in first.top_two)
    numbers = f"margin {first.margin:.2g}, short by {first.logit_gap:.2g}"
    sides = f"{names} {_side(first.tokens[0])}, {first.between[1]} {_side(first.tokens[1])}"
    return [
        f"  prompt {prompt}, new token {first.token} (position {first.position}): {sides}",
        f"    PyTorch: {best}, then {second}; {numbers}: {first.verdict}",
    ]


def _side(token: Token | None) -> str:
    return "had ended" if token is None else f"chose {_token(token)}"


def _token(token: Token) -> str:
    return f"{token.id} {token.text!r}" if token.text else str(token.id)


def _errors(report: VerifyReport) -> str:
    limits = report.limits
    rows = [["", "logits", "max", "rms", "median row", "99 % of rows", "worst row"]]
    for width, stats in report.logit_errors.items():
        rows.append([f"{width} row{'s' if width > 1 else ''} a pass", *_stats(stats)])
    worst = f"{limits.worst_row:.1e}"
    tail = [worst, ""] if limits.mixture else ["", worst]
    allowed = ["allowed", "", "", "", f"{limits.median_row:.1e}", *tail]
    rows += [allowed, ["PyTorch token by token", *_stats(report.pytorch_repeated)]]
    if report.pytorch_16_bit is not None:
        rows.append([f"PyTorch in {report.bundle['precision']}", *_stats(report.pytorch_16_bit)])
    taps = ", ".join(f"layer {item.layer} {item.rms:.1e}" for item in report.features)
    return "\n".join(
        [
            "logits against one pass of PyTorch in fp32 (rows: root mean square / standard deviation)",
            _aligned(rows, indent="  ", right=set(range(1, 7))),
            f"  features, relative to each row's norm: {taps}",
        ]
    )


def _stats(stats: ErrorStats) -> list[str]:
    count = f"{stats.values / 1e6:.1f} M" if stats.values >= 100_000 else str(stats.values)
    rows = (stats.relative(error) for error in (stats.median_row, stats.row_99, stats.worst_row))
    numbers = (stats.max_abs, stats.rms, *rows)
    return [count, *(f"{number:.1e}" for number in numbers)]


def _tokens(report: VerifyReport) -> str:
    runs = [run for prompt in report.prompts for run in prompt.runs if run.name != PYTORCH]
    total = sum(len(run.token_ids) for run in runs)
    near = sum(run.near_ties for run in runs)
    faults = sum(len(run.faults) for run in runs)
    close = sum(prompt.close_calls for prompt in report.prompts)
    short = max(run.worst_logit_gap for run in runs)
    own = max(run.worst_own_logit_gap or 0.0 for run in runs)
    limits = report.limits
    best = total - near - faults
    return (
        f"our {total} tokens, each given those before it: {best} the best, {near} near ties, {faults} bugs\n"
        f"  furthest below PyTorch's best: {short:.1e}; near tie up to {limits.near_tie:.1e}"
        f" ({close} positions are that close)\n"
        f"  furthest below the bundle's own best, one row at a time: {own:.1e};"
        f" near tie up to {limits.own_tie:.1e}"
    )


def _drafting(report: VerifyReport) -> str:
    lines = []
    for item in report.drafting:
        shares = " ".join(f"{100 * share:.0f}" for share in item.accepted_by_position)
        lines.append(
            f"  width {item.width}: {item.tokens_per_step:.2f} tokens a step in {item.steps} steps;"
            f" accepted by position: {shares} %"
        )
    return "\n".join(["drafting", *lines, f"  {_reference(report.reference)}"])


def _reference(found: ReferenceDrafting) -> str:
    if found.skipped is not None:
        return f"reference loop: skipped, {found.skipped}"
    return (
        f"reference loop (dflash {found.version}), width {found.width}: {found.tokens_per_step:.2f} tokens a"
        f" step, ours {found.our_tokens_per_step:.2f};"
        f" as many accepted in {found.same} of {found.compared} steps"
    )


def _verdict(report: VerifyReport) -> str:
    meaning = {
        "equal": "equal: every token is PyTorch's",
        "near tie": "near ties: every token that isn't PyTorch's is as good to within the measured error",
        "bug": "BUG",
    }
    lines = [f"warning: {text}" for text in report.warnings]
    lines += [f"bug: {text}" for text in report.problems]
    return "\n".join([*lines, f"verdict: {meaning[report.verdict]}"])


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _PROMPT_WIDTH else line[: _PROMPT_WIDTH - 1] + "…"


def _aligned(rows: Sequence[Sequence[str]], *, indent: str = "", right: set[int] | None = None) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        indent
        + "  ".join(
            cell.rjust(width) if i in (right or ()) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
