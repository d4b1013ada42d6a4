"""Exact match of models on the held-out questions of a zoo."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from expert_merging.backbone import import_transformers
from expert_merging.errors import InputError
from expert_merging.writing import write_atomically

WEIGHTS = "*.safetensors"
CACHED_SCORES = "scores.json"
BATCH_SIZE = 250

Scores = dict[str, float]


def exact_match(model_folder: Path, test_folder: Path) -> Scores:
    """Percentage of questions that a model answers exactly, for each task.

    Args:
        model_folder: A saved causal language model with its tokenizer.
        test_folder: ``<task>.json`` files with ``question`` and ``response``, as a zoo has in ``test/``.

    Returns:
        ``{task: percentage in [0, 100]}``, in the order of the file names.

    Raises:
        InputError: A folder holds no model or no questions.
    """
    require_model(model_folder)
    tests = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(test_folder.glob("*.json"))}
    if not tests:
        raise InputError(f"{test_folder} holds no test questions (no <task>.json there)")
    answers = iter(answer(model_folder, [entry for entries in tests.values() for entry in entries]))
    return {
        task: percentage_right([next(answers) for _ in entries], [entry["response"] for entry in entries])
        for task, entries in tests.items()
    }


def require_model(folder: Path) -> None:
    """Check that ``folder`` holds a model.

    Raises:
        InputError: It does not, or there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give a run (a folder with model/ in it) or a model")
    if not (folder / "config.json").is_file() or not any(folder.glob(WEIGHTS)):
        raise InputError(f"{folder} holds no model: config.json or {WEIGHTS} is missing there and in model/")


def percentage_right(answers: Sequence[str], responses: Sequence[str]) -> float:
    """Share of ``answers`` equal to their ``responses``, in percent."""
    right = sum(answer == response for answer, response in zip(answers, responses, strict=True))
    return 100 * right / len(responses)


def answer(model_folder: Path, entries: Sequence[Mapping[str, str]]) -> list[str]:
    """Greedy answers of a causal language model to the questions of ``entries``.

    With one thread: models of a zoo are so small that more would wait for each other.
    """
    import torch

    transformers = import_transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder, padding_side="left", trust_remote_code=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder, dtype="float32", trust_remote_code=False
    ).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    longest = max(len(tokenizer(entry["response"], add_special_tokens=False)["input_ids"]) for entry in entries)
    answers: list[str] = []
    for start in range(0, len(entries), BATCH_SIZE):
        questions = [entry["question"] for entry in entries[start : start + BATCH_SIZE]]
        batch = tokenizer(questions, padding=True, return_tensors="pt", return_token_type_ids=False)
        # One token more than the longest answer, so that an answer that goes on is not mistaken for a right one.
        tokens = model.generate(**batch, max_new_tokens=longest + 1, do_sample=False)
        answers += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    torch.set_num_threads(threads)
    return answers


def cached_exact_match(model_folder: Path, zoo: Path) -> Scores:
    """``exact_match`` of a model of the zoo itself, kept in its folder while weights and questions stay the same."""
    require_model(model_folder)
    path = zoo / CACHED_SCORES
    known: dict[str, Scores] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    key = f"{model_folder.name} {_fingerprint([*model_folder.glob(WEIGHTS), *(zoo / 'test').glob('*.json')])}"
    if key not in known:
        known[key] = exact_match(model_folder, zoo / "test")
        write_atomically(path, (json.dumps(known, indent=2) + "\n").encode())
    return known[key]


def _fingerprint(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
