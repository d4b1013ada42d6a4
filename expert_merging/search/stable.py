"""AdaMMS: the point between two models whose answers change least when it is moved.

No answer is known to be right, and no expert is asked. Points on a grid are merged in memory and answer the questions.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from expert_merging.context import Context
from expert_merging.documents import read_object
from expert_merging.errors import InputError, Problems
from expert_merging.method import Method, Preparation
from expert_merging.methods.interpolation import prepare_ends
from expert_merging.processes import from_main_process, is_main_process
from expert_merging.run import Run
from expert_merging.search.options import StableOptions
from expert_merging.writing import write_atomically

if TYPE_CHECKING:
    from expert_merging.running.samples import Samples

logger = logging.getLogger(__name__)

# Each point is a merge and answers all questions; a step that makes more has been mistyped.
_MOST_POINTS = 1000
# In the plan.
_MOST_TOLD = 20


def prepare(context: Context, options: StableOptions, method: Method) -> Preparation:
    """Check experts, samples and grid; answering and choosing is the work to be done.

    Args:
        context: the run.
        options: the method's options.
        method: the interpolation.

    Raises:
        InputError: every problem found.
    """
    from expert_merging.running.samples import check_samples

    problems = Problems()
    with problems.collecting():
        prepare_ends(context)
    with problems.collecting():
        grid = grid_of(options)
    with problems.collecting():
        asked = check_samples(context, options, batch_tokens=None)
    problems.check()

    def work() -> dict[str, Any]:
        chosen = 0.0
        if is_main_process():  # elsewhere an answer may differ
            chosen = _choose(context, asked, grid, method)
        return {"t": from_main_process(chosen)}

    told = grid if len(grid) <= _MOST_TOLD else [*grid[:3], "...", grid[-1]]
    note = (
        f"the way from the first model to the last is cut at {len(grid)} points ({', '.join(told)}), and each answers "
        f"{len(asked.samples)} questions"
    )
    return Preparation(work, asked.inputs, (note,))


def grid_of(options: StableOptions) -> list[str]:
    """The points, from the first model on, as texts.

    Raises:
        InputError: there is none that has two neighbours, or there are very many.
    """
    count = int(options.largest_t / options.t_step + 1e-9) + 1
    if count < 3:
        raise InputError(
            f"--t_step {options.t_step:g} leaves no point between 0 and --largest_t {options.largest_t:g} that has a "
            "neighbour on both sides; give a smaller step"
        )
    if count > _MOST_POINTS:
        raise InputError(
            f"--t_step {options.t_step:g} makes {count} points up to --largest_t {options.largest_t:g}, each a "
            f"merge that answers all questions; give a step that makes at most {_MOST_POINTS}"
        )
    return [f"{number * options.t_step:.6g}" for number in range(count)]


def _choose(context: Context, asked: Samples, grid: Sequence[str], method: Method) -> float:
    """The most stable point; the run remembers all answers, so an interrupted one goes on with the next point."""
    answers = _remembered(context, grid, len(asked.samples))
    if answers:
        logger.info("continuing after %d of %d points", len(answers), len(grid))
    if len(answers) < len(grid):
        _answer(context, asked, grid, method, answers)
    changed = changes([answers[point] for point in grid])
    chosen = most_stable(changed)
    by_point = dict(zip(grid[1:-1], changed, strict=True))
    logger.info("answers that change beside each point: %s; chosen: %s", by_point, grid[1 + chosen])
    _note(context, {"chosen": float(grid[1 + chosen]), "changes": by_point, "answers": answers})
    return float(grid[1 + chosen])


def _answer(
    context: Context, asked: Samples, grid: Sequence[str], method: Method, answers: dict[str, list[str]]
) -> None:
    """Let every point answer that has not."""
    import torch

    from expert_merging.running.in_memory import InMemory
    from expert_merging.running.sharding import load_on

    device = torch.device(context.device)
    maker = asked.target_maker(context, (), device)
    model = load_on(device, context.backbone, context.plan.base, asked.dtype, sharded=False)
    memory = InMemory(model, context.plan, context.backbone.file_name, device)
    known = {"seed": context.seed, "experts": tuple(context.plan.experts)}
    with context.progress("answering", len(grid), "point") as advance:
        advance(len(answers))
        for point in grid:
            if point not in answers:
                memory.merge(method.rule(known, {"t": float(point)}), method.unit)
                answers[point] = maker.written(model, asked.samples)
                _note(context, {"answers": answers})
                advance(1, point)


def changes(answers: Sequence[Sequence[str]]) -> list[int]:
    """Of each inner point, the number of questions that it answers otherwise than one of its neighbours.

    Args:
        answers: of each point, in their order; upper and lower case are the same.
    """
    lowered = [[answer.lower() for answer in own] for own in answers]
    return [
        sum(not before == own == after for before, own, after in zip(*lowered[place - 1 : place + 2], strict=True))
        for place in range(1, len(lowered) - 1)
    ]


def most_stable(changed: Sequence[int]) -> int:
    """Place of the smallest number; of several, the middle one, which is the furthest from where answers change."""
    equals = [place for place, number in enumerate(changed) if number == min(changed)]
    return equals[(len(equals) - 1) // 2]


def _remembered(context: Context, grid: Sequence[str], count: int) -> dict[str, list[str]]:
    """Answers of an earlier part of the run, by point; none where the record is damaged."""
    try:
        kept = read_object(context.run.stability).get("answers")
    except InputError:
        return {}
    found = {point: kept.get(point) for point in grid} if isinstance(kept, dict) else {}
    return {
        point: own
        for point, own in found.items()
        if isinstance(own, list) and len(own) == count and all(isinstance(answer, str) for answer in own)
    }


def for_card(run: Run) -> str:
    """What the card of a run's model says of the choice; empty where there was none."""
    try:
        chosen = read_object(run.stability).get("chosen")
    except InputError:
        return ""
    return f"It is {chosen:g} of the way from the first model to the last." if isinstance(chosen, float) else ""


def _note(context: Context, record: Mapping[str, Any]) -> None:
    context.run.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_atomically(context.run.stability, text.encode())
