"""The records of a run as a Markdown page: environment, goals, tables, what went wrong."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.gpu.running import BAD, Record

DATA = {"ultrafeedback": "UltraFeedback's lengths", "gsm8k": "GSM8K's lengths, pairs of a prompt together"}
FASTER = {"ultrafeedback": 2.5, "gsm8k": 5.0}  # goals, times TRL's pair tokens a second
LEANER = 0.5  # goal, of TRL's peak
NEARLY = 0.95  # of the top speed: of such settings the one with the least memory counts, for everybody
GIB = 1 << 30


def write_summary(records: Sequence[Record], *, dry_run: bool) -> str:
    title = f"# GPU suite, {_date(records)}"
    lines = [title, "", *(["**A dry run: its numbers mean nothing.**", ""] if dry_run else [])]
    for section in (_environment, _goals, _training, _kernels, _tests, _sketches, _auxdpo, _parts):
        found = section(records)
        lines += [*found, ""] if found else []
    return "\n".join(lines).rstrip() + "\n"


def best(records: Sequence[Record], data: str, contender: str) -> Record | None:
    """The training result that counts: nearly the fastest, with the least memory."""
    found = [r for r in _of(records, "training") if (r["data"], r["contender"]) == (data, contender) and r["fits"]]
    top = max((r["pair_tokens_per_second"] for r in found), default=0.0)
    near = [r for r in found if r["pair_tokens_per_second"] >= NEARLY * top]
    return min(near, key=lambda r: (r["peak_bytes"] or 0, -r["pair_tokens_per_second"]), default=None)


def _of(records: Sequence[Record], case: str) -> list[Record]:
    return [record for record in records if record["case"] == case]


def _date(records: Sequence[Record]) -> str:
    return next((record["date"] for record in _of(records, "environment")), "date unknown")


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    if not cells:
        return []
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]


def _gib(value: int | None) -> str:
    return "-" if value is None else f"{value / GIB:.2f}"


def _environment(records: Sequence[Record]) -> list[str]:
    return [
        f"GPU: {r['gpu']}; driver {r['driver']}, CUDA {r['cuda']}, Python {r['python']}; "
        + ", ".join(f"{name} {version}" for name, version in r["packages"].items())
        + "."
        for r in _of(records, "environment")
    ]


def _goals(records: Sequence[Record]) -> list[str]:
    rows = []
    for data, wanted in FASTER.items():
        ours, theirs = (best(records, data, contender) for contender in ("refcache", "trl"))
        of_speed = [f"{DATA[data]}: x TRL's pair tokens/s", f">= {wanted}", "not measured", ""]
        of_memory = [f"{DATA[data]}: of TRL's peak memory", f"<= {LEANER}", "not measured", ""]
        if ours and theirs:
            ratio = ours["pair_tokens_per_second"] / theirs["pair_tokens_per_second"]
            of_speed[2:] = [f"{ratio:.2f}", _met(ratio >= wanted)]
            if ours["peak_bytes"] and theirs["peak_bytes"]:
                share = ours["peak_bytes"] / theirs["peak_bytes"]
                of_memory[2:] = [f"{share:.2f}", _met(share <= LEANER)]
        rows += [of_speed, of_memory]
    note = (
        "Both at their best setting: of those within 5 % of the fastest the one with the least memory. "
        "Peaks are of tensors, after the first steps."
    )
    return ["## Goals", "", *_table(("what", "goal", "measured", "met"), rows), "", note]


def _met(met: bool) -> str:
    return "**yes**" if met else "no"


def _training(records: Sequence[Record]) -> list[str]:
    rows = []
    for data in DATA:
        chosen = [best(records, data, contender) for contender in ("refcache", "trl")]
        for r in _of(records, "training"):
            if r["data"] != data:
                continue
            setting = ", ".join(f"{name} {value}" for name, value in r["setting"].items())
            if not r["fits"]:
                rows.append((data, r["contender"], setting, r.get("reason", "doesn't fit"), "", "", ""))
                continue
            name = f"**{r['contender']}**" if r in chosen else r["contender"]
            first = ", ".join(f"{seconds:.1f}" for seconds in r["warm_up_seconds"])
            losses = f"{r['losses'][0]:.4f} to {r['losses'][-1]:.4f}"
            speed, peak = f"{r['pair_tokens_per_second']:,.0f}", _gib(r["peak_bytes"])
            rows.append((data, name, setting, speed, peak, first, losses))
    head = ("data", "contender", "setting", "pair tokens/s", "peak GiB", "s of first steps, not counted", "losses")
    table = _table(head, rows)
    return ["## Training", "", *table] if table else []


def _kernels(records: Sequence[Record]) -> list[str]:
    rows = []
    for r in _of(records, "kernels"):
        gradient = "-" if r["gradient_off"] is None else f"{r['gradient_off']:.1e}"
        shape = (r["data"], r["dtype"], r["kernels"], f"{r['tokens']:,}")
        cost = (f"{r['seconds'] * 1e3:.1f}", f"{r['first_seconds']:.1f}", _gib(r["peak_bytes"]))
        rows.append((*shape, *cost, f"{r['hidden_states_off']:.1e}", gradient))
    head = ("data", "dtype", "kernels", "tokens", "ms", "first s", "peak GiB", "hidden states off", "gradient off")
    table = _table(head, rows)
    note = "Forward and backward of some layers; off: of the norm of the plain kernels' in float32."
    return ["## Kernels", "", *table, "", note] if table else []


def _tests(records: Sequence[Record]) -> list[str]:
    found = _of(records, "test")
    if not found:
        return []
    counts = {outcome: sum(r["outcome"] == outcome for r in found) for outcome in ("passed", "failed", "skipped")}
    lines = ["## Tests marked gpu", "", ", ".join(f"{count} {name}" for name, count in counts.items()) + "."]
    return lines + [f"- failed: `{r['name']}`: {_last_line(r['reason'])}" for r in found if r["outcome"] == "failed"]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][-300:]


def _sketches(records: Sequence[Record]) -> list[str]:
    rows = []
    for r in _of(records, "sketch"):
        if not r.get("fits", True):
            rows.append((r["what"], r["trainable"], "doesn't fit", "", "", ""))
            continue
        share = f"{r['of_forward_and_backward']:.2f}" if "of_forward_and_backward" in r else ""
        rows.append(
            (
                r["what"],
                r["trainable"],
                f"{r['rows_per_second']:.1f}",
                share,
                r.get("numbers", ""),
                _gib(r["peak_bytes"]),
            )
        )
    head = ("what", "of", "responses/s", "of a forward and backward of all", "numbers a response", "peak GiB")
    table = _table(head, rows)
    return ["## Sketches", "", *table] if table else []


def _auxdpo(records: Sequence[Record]) -> list[str]:
    rows = []
    for r in _of(records, "auxdpo"):
        if not r.get("fits", True):
            rows.append((r["contender"], f"{r['responses']:,}", "", "doesn't fit", ""))
            continue
        responses = f"{r['responses']:,}" if "responses" in r else ""
        place = {True: "GPU", False: "host"}.get(r.get("sketches_on_device"), "")
        share = f"{r['of_dpo']:.3f}" if "of_dpo" in r else ""
        rows.append((r["contender"], responses, place, f"{r['step_seconds'] * 1e3:.1f}", share))
    table = _table(("objective", "responses", "sketches in memory of", "ms a step", "of DPO's"), rows)
    return ["## AuxDPO's step", "", *table] if table else []


def _parts(records: Sequence[Record]) -> list[str]:
    ended = _of(records, "ended")
    reasons = {r["part"]: r["reason"] for r in records if r["case"] in ("skipped", "no time")}
    rows = [(r["part"], r["status"], r["seconds"], reasons.get(r["part"], "")) for r in ended]
    lines = ["## Parts", "", *_table(("part", "ended", "seconds", "not measured"), rows)]
    for r in ended:
        if r["status"] in BAD and r["error"]:
            lines += ["", f"{r['part']} ({r['status']}) said at the end:", "", "```", r["error"], "```"]
    return lines if rows else []
