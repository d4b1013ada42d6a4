"""Exact match of models on the held-out questions of a zoo."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_merging.backbone import Backbone
from expert_merging.checkpoints.checkpoint import read_header
from expert_merging.errors import InputError
from expert_merging.processes import choose_device
from expert_merging.questions.calibration import Sample
from expert_merging.workers import SMALL_MODEL, fitting_threads
from expert_merging.writing import write_atomically

if TYPE_CHECKING:
    import torch

WEIGHTS = "*.safetensors"
CACHED_SCORES = "scores.json"
BATCH_SIZE = 50

Scores = dict[str, float]


def exact_match(backbone: Backbone, model_folder: Path, test_folder: Path, *, questions: int | None = None) -> Scores:
    """Percentage of questions that a model answers exactly, for each task.

    The model answers in the precision that its files have, on a GPU if there is one and it is not small.

    Args:
        backbone: The family of the model.
        model_folder: A saved model with its tokenizer or processor.
        test_folder: ``<task>.json`` files with ``question`` and ``response``, as a zoo has in ``test/``.
        questions: How many are asked of each task, all by default.

    Returns:
        ``{task: percentage in [0, 100]}``, in the order of the file names.

    Raises:
        InputError: A folder holds no model or no questions.
    """
    from expert_merging.running.scores import score_by_task

    require_model(model_folder)
    samples = [sample for path in sorted(test_folder.glob("*.json")) for sample in _read_test(path)[:questions]]
    if not samples:
        raise InputError(f"{test_folder} holds no test questions (no <task>.json there)")
    model = backbone.load_model(model_folder, _precision(model_folder))
    if model.num_parameters() >= SMALL_MODEL:
        model = model.to(choose_device("auto"))
    with fitting_threads(model.num_parameters()):
        score = ExactMatch(backbone, backbone.load_processor(model_folder))
        found = score_by_task(score, model, samples)
    return {task: numbers["accuracy"] for task, numbers in found.items()}


def _precision(model_folder: Path) -> torch.dtype:
    """Type of the weights in the files."""
    _, entries = read_header(min(model_folder.glob(WEIGHTS)))
    return next(entry.torch_dtype for entry in entries if entry.is_float)


def _read_test(path: Path) -> list[Sample]:
    return [
        Sample(
            task=path.stem,
            expert=path.stem,
            question=entry["question"],
            response=entry["response"],
            identity=str(number),
            images=(path.parent / entry["image_path"],) if "image_path" in entry else (),
            file=path,
            number=number,
        )
        for number, entry in enumerate(json.loads(path.read_text(encoding="utf-8")))
    ]


def require_model(folder: Path) -> None:
    """Check that ``folder`` holds a model.

    Raises:
        InputError: It does not, or there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give a run (a folder with model/ in it) or a model")
    if not (folder / "config.json").is_file() or not any(folder.glob(WEIGHTS)):
        raise InputError(f"{folder} holds no model: config.json or {WEIGHTS} is missing there and in model/")


@dataclass(frozen=True)
class ExactMatch:
    """100 for a question that a model answers exactly, else 0; an `expert_merging.running.scores.Score` of samples.

    Args:
        backbone: the family of the model.
        processor: its tokenizer or processor.
        names: what the number is called.
    """

    backbone: Backbone
    processor: Any
    names: tuple[str, ...] = ("accuracy",)

    def measure(self, model: Any, samples: Sequence[Sample]) -> Iterator[tuple[float]]:
        """Whether each sample is answered exactly."""
        return ((100.0 * right,) for right in answers_exactly(self.backbone, self.processor, model, samples))


def answers_exactly(backbone: Backbone, processor: Any, model: Any, samples: Sequence[Sample]) -> list[bool]:
    """Whether the greedy answers of a model are the right ones, and end there."""
    from expert_merging.running.answers import Row, beginnings
    from expert_merging.running.prompts import tokenizer_of

    tokenizer, found = tokenizer_of(processor), list[bool]()
    for asked in _batches(samples):
        prompts = [backbone.encode_prompt(processor, sample, None) for sample in asked]
        answers = [tokenizer(sample.response, add_special_tokens=False)["input_ids"] for sample in asked]
        rows = dict(enumerate(map(Row, prompts, answers)))
        written = dict(beginnings(model, processor, rows))
        found += [written[number].is_all(answer) for number, answer in enumerate(answers)]
    return found


def _batches(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Samples that are asked at once, of one task each: its prompts and answers are about as long as each other."""
    for _, of_task in itertools.groupby(samples, lambda sample: sample.task):
        listed = list(of_task)
        for start in range(0, len(listed), BATCH_SIZE):
            yield listed[start : start + BATCH_SIZE]


def cached_exact_match(backbone: Backbone, model_folder: Path, zoo: Path, *, questions: int | None = None) -> Scores:
    """``exact_match`` of a model of the zoo itself, kept in its folder while weights and questions stay the same."""
    require_model(model_folder)
    path = zoo / CACHED_SCORES
    known: dict[str, Scores] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    key = f"{model_folder.name} {_fingerprint([*model_folder.glob(WEIGHTS), *(zoo / 'test').glob('*.json')])}"
    if questions is not None:
        key += f", {questions} questions"
    if key not in known:
        known[key] = exact_match(backbone, model_folder, zoo / "test", questions=questions)
        write_atomically(path, (json.dumps(known, indent=2) + "\n").encode())
    return known[key]


def _fingerprint(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
