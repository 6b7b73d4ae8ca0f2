"""Compare trained policies with the reference: on held-out pairs, on answers that vLLM draws, on benchmark tasks.

All cells in one run share one engine, and what a model was asked once is never asked again (policies/answers.py). So a
second run, or one with a single new policy, asks only what is new.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from cache import open_reference
from pipeline.engine.process import orderly_termination
from pipeline.errors import RunFailed
from pipeline.evaluation.failing import Failing
from pipeline.evaluation.held_out import read_held_out
from pipeline.evaluation.questions import Cell, Run
from pipeline.evaluation.suite_rows import Suites
from pipeline.model.limits import check_rows, model_limits
from pipeline.params import EvaluateParams, ScoreParams
from pipeline.policies.answers import Answers
from pipeline.policies.engines import PolicyEngines, in_order
from pipeline.policies.identity import Policy, open_policy
from pipeline.progress import activity
from pipeline.reference.identity import reference_identity


class Evaluated(NamedTuple):
    """cells: content of each metrics file, by the cell's name. starts: engines built. asked: policies with questions
    that no earlier run had asked."""

    cells: dict[str, dict[str, Any]]
    starts: int
    asked: int


def evaluate_cells(
    cells: Sequence[Cell],
    *,
    pairs: Path,
    reference_model: Path,
    reference: Path,
    params: EvaluateParams,
    engine: ScoreParams,
    suites: Path | None = None,
    suites_reference: Path | None = None,
    trust_remote_code: bool = False,
) -> Evaluated:
    """Write each cell's metrics (and answers) and return them.

    engine: the score section, so that policies and reference are computed alike. suites: prepared ones, with the
    reference's log-probs of them in suites_reference; None for both: no suites. Raises RequestError before any engine
    starts for an empty test split or rows that the model can't take, CacheMismatch or CacheIncomplete if `reference`
    isn't the scored reference_model. A cell that fails does not take the others with it: RunFailed (RequestError where
    it was the only one) names those that failed when all others are written.
    """
    with activity(f"digesting {reference_model}"):
        identity = reference_identity(reference_model, dtype=engine.dtype, quantization=engine.quantization)
    held_out = read_held_out(pairs, open_reference(reference, expect=identity))
    judged = Suites.none()
    if suites is not None and suites_reference is not None:
        judged = Suites.read(suites, params.suites, open_reference(suites_reference, expect=identity))
        check_rows(
            judged.responses, model_limits(reference_model, trust_remote_code=trust_remote_code), reference_model
        )
    base = Policy("reference", reference_model, identity)
    failed: dict[str, Exception] = {}
    policies: dict[str, Policy] = {}
    for cell in cells:
        with Failing(cell.name, failed), activity(f"digesting {cell.policy}"):
            policies[cell.name] = open_policy(cell.name, cell.policy, identity)
    run = Run(held_out, judged, base, params, engine, trust_remote_code)
    distinct = {policy.identity: policy for policy in policies.values()} | {identity: base}
    with (
        orderly_termination(),
        ExitStack() as books,
        PolicyEngines(
            list(distinct.values()), reference_model, engine, log="evaluate", trust_remote_code=trust_remote_code
        ) as engines,
    ):
        run.begin(engines, {who: books.enter_context(_book(who, engine)) for who in distinct.values()})
        wanted = dict.fromkeys(distinct[policy.identity] for policy in policies.values())  # may be the reference
        asked = run.ask_all(in_order(list(wanted)), failed)
        found = {}
        for cell in cells:
            if cell.name not in policies:
                continue
            policy = distinct[policies[cell.name].identity]  # several cells may have the very same weights
            if policy.name in failed:
                failed.setdefault(cell.name, failed[policy.name])
                continue
            with Failing(cell.name, failed):
                found[cell.name] = run.write(cell, policy)
        starts = engines.starts
    _report(failed, cells)
    return Evaluated(found, starts, asked)


def _book(policy: Policy, engine: ScoreParams) -> Answers:
    return Answers(policy.identity, policy.name, rows_per_call=engine.rows_per_call)


def _report(failed: dict[str, Exception], cells: Sequence[Cell]) -> None:
    if not failed:
        return
    if len(cells) == 1:
        raise next(iter(failed.values()))
    reasons = "\n".join(f"  {name}: {error}" for name, error in failed.items())
    raise RunFailed(
        f"{len(failed)} of {len(cells)} cells could not be evaluated; the others are written, and what was measured is "
        f"kept. Run the same command again when this is mended:\n{reasons}"
    )
