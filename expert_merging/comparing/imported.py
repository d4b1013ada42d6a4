"""Results that other toolkits have written, read as scores of a model."""

from __future__ import annotations

from pathlib import Path

from expert_merging.comparing.columns import NO_SHARE, Measured
from expert_merging.comparing.grounding import read_grounding
from expert_merging.comparing.harness_results import read_results, result_files
from expert_merging.comparing.preferences import read_preferences
from expert_merging.comparing.vlmevalkit import read_vlmevalkit
from expert_merging.errors import InputError, about, first_of


def read_folder(folder: Path, metric: str | None = None) -> Measured:
    """Scores in a folder of VLMEvalKit, lmms-eval, lm_eval, InternVL's script for RefCOCO, or AlpacaEval.

    Args:
        folder: where a toolkit has written the results of one model.
        metric: name of the metric or filter that is taken where a task of a harness has it.

    Raises:
        InputError: there are no such results, or they cannot be read.
    """
    with about(f"--import {folder}"):
        if not folder.is_dir():
            raise InputError("there is no such folder")
        files = result_files(folder)
        found = read_results(files, metric) if files else Measured()
        for read in (read_vlmevalkit, read_grounding, read_preferences):
            found.add(read(folder))
        if not found.tasks and found.left_out:
            raise InputError(f"{NO_SHARE} of {first_of(found.left_out, 5)}")
        if not found.tasks:
            raise InputError(
                "no results are there; lm_eval and lmms-eval write them as results_DATE.json and DATE_results.json, "
                "VLMEvalKit as MODEL_DATASET_acc.csv and MODEL_DATASET_JUDGE_score.csv in a folder called MODEL, "
                "InternVL's script as refcoco_val_DATE.json, alpaca_eval as annotations.json"
            )
        return found
