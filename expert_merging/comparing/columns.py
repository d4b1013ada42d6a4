"""The columns of the published tables: which result of a toolkit each is, and by which rule.

As the authors of the experts compute them (Wei et al., 2025): MathVista's column is the mean of three of its skills,
MATH-Vision's of four of its subjects. RefCOCO's columns are shares of boxes that overlap the right one by half or more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from expert_merging.comparing.scores_file import SetScore, TaskScore

# The set of scores that public benchmarks are kept in, whichever toolkit has measured them.
BENCHMARKS = "benchmarks"
# Why a result is no score.
NO_SHARE = "no share of right answers is known"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        name: what it is called.
        parts: parts of the benchmark whose mean it is, each counted once; none where it is that of all questions.
    """

    name: str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """What a toolkit has measured of a model.

    Args:
        tasks: scores by column.
        left_out: results that are no scores in percent, by name.
    """

    tasks: dict[str, TaskScore] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def add(self, other: Measured) -> None:
        """Take in what another one has, which counts before what is here."""
        self.tasks.update(other.tasks)
        self.left_out.extend(name for name in other.left_out if name not in self.left_out)


# By VLMEvalKit's names of data sets.
VLMEVALKIT = {
    "VizWiz": Column("VizWiz"),
    "GQA_TestDev_Balanced": Column("GQA"),
    "MathVista_MINI": Column("MathVista", ("geometry reasoning", "algebraic reasoning", "geometry problem solving")),
    "MathVision_MINI": Column(
        "MATH-Vision",
        ("metric geometry - angle", "metric geometry - area", "metric geometry - length", "solid geometry"),
    ),
    "ChartQA_TEST": Column("ChartQA"),
    "TextVQA_VAL": Column("TextVQA"),
    "OCRVQA_TESTCORE": Column("OCRVQA"),
}
# By lmms-eval's names of tasks.
HARNESS = {
    "refcoco_bbox_rec_val": Column("RefCOCO"),
    "refcoco+_bbox_rec_val": Column("RefCOCO+"),
    "refcocog_bbox_rec_val": Column("RefCOCOg"),
}
# By the names that InternVL's own script gives data sets.
GROUNDING = {
    f"{name}_val": column for name, column in zip(("refcoco", "refcoco+", "refcocog"), HARNESS.values(), strict=True)
}
ALPACA = "AlpacaEval"
# Metrics, or filters of answers, of tasks whose first one is not the usual one.
USUAL = {**dict.fromkeys(HARNESS, "refcoco_ACC@0.5"), "gsm8k": "flexible-extract"}
_ORDER = [ALPACA, *(column.name for column in (*VLMEVALKIT.values(), *HARNESS.values()))]


def joined(earlier: SetScore | None, new: Mapping[str, TaskScore]) -> SetScore:
    """Scores on benchmarks with new ones among them, published columns in their order.

    Args:
        earlier: what has been measured before.
        new: scores by column, which replace earlier ones.
    """
    tasks = {**({} if earlier is None else earlier.tasks), **new}
    names = dict.fromkeys([*(name for name in _ORDER if name in tasks), *tasks])
    return SetScore({name: tasks[name] for name in names}, "score")
