"""Public benchmarks through lm-evaluation-harness: it is given the loaded model, and asks it in the run's words.

Nothing of the harness's own command is used, which would load the model again and ask it bare.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from expert_merging.asking import Formats
from expert_merging.comparing.columns import Measured
from expert_merging.comparing.harness_results import Samples, scores_of
from expert_merging.errors import InputError, Problems, first_line, first_of
from expert_merging.libraries import import_transformers
from expert_merging.questions.formats import QUESTION, Format

NEEDED = "lm-eval>=0.4.13,<0.5"
# The harness's own, so that it draws the same examples as its command does.
_SEED = 1234
# Tokens that an answer may have where a task does not say.
_TOKENS = 256


@dataclass(frozen=True)
class Tasks:
    """Tasks of the harness, ready to be asked.

    Args:
        loaded: what was loaded under each name that was given.
        runs_code: what models write may be run.
    """

    loaded: Mapping[str, Any]
    runs_code: bool = False

    def check_metric(self, metric: str | None) -> None:
        """Check that a task has a metric or filter of that name, if one is given.

        Raises:
            InputError: none has.
        """
        known = {name: None for task in self._all() for name in (*task.higher_is_better(), *_filters(task))}
        if metric is not None and not {*metric.split(",", 1)} <= known.keys():
            raise InputError(f"--metric {metric}: no task has it; they have {', '.join(known)}")

    def check_context(self, longest: int | None) -> None:
        """Check that answers leave a place for questions.

        Args:
            longest: tokens that the model takes; None where that is not known.

        Raises:
            InputError: every task whose answers do not.
        """
        problems = Problems()
        for task in self._all():
            answer = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", _TOKENS)
            if task.get_config("output_type") == "generate_until" and longest is not None and answer >= longest:
                problems.add(
                    f"answers of {task.task_name} may have {answer} tokens, and the model takes {longest} with the "
                    "question; set max_gen_toks in the task's generation_kwargs"
                )
        problems.check()

    def measure(
        self, model: Any, tokenizer: Any, formats: Formats, *, count: int | None, batch: int, metric: str | None
    ) -> Iterator[Measured]:
        """Ask a model one task or group after the other.

        Args:
            model: a causal language model.
            tokenizer: its tokenizer.
            formats: in whose words it is asked, by task.
            count: questions of each task; None for all.
            batch: questions at a time.
            metric: as for `expert_merging.comparing.harness_results.scores_of`.
        """
        import torch
        from lm_eval.evaluator import evaluate

        for name, loaded in self.loaded.items():
            words = formats.tasks.get(name, formats.default)
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(_SEED)
            torch.manual_seed(_SEED)
            results = evaluate(
                _worded(model, tokenizer, words, batch),
                loaded,
                limit=count,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=not _is_bare(words),
                confirm_run_unsafe_code=self.runs_code,
            )
            yield scores_of(results, partial(_asked_in, results), metric)

    def _all(self) -> list[Any]:
        return [task for loaded in self.loaded.values() for task in loaded["tasks"].values()]


def load_tasks(names: Sequence[str], folder: Path | None, *, shots: int | None, runs_code: bool) -> Tasks:
    """Find and load tasks.

    Args:
        names: of tasks or groups.
        folder: with files of further tasks, which count before the harness's own.
        shots: examples before each question; None for what each task says.
        runs_code: what models write may be run.

    Raises:
        InputError: the harness is missing, or every task that there is not or that cannot be loaded.
    """
    if folder is not None and not folder.is_dir():
        raise InputError(f"--tasks_dir {folder}: there is no such folder")
    wanted = list(dict.fromkeys(names))
    if not wanted:
        raise InputError("--tasks names no task; give names with commas between them, such as gsm8k,arc_easy")
    manager = _manager(folder, wanted)
    problems, loaded = Problems(), {}
    for name in wanted:
        with problems.collecting():
            loaded[name] = _load(manager, name, runs_code)
            for task in loaded[name]["tasks"].values():
                _set_examples(task, shots)
    problems.check()
    return Tasks(loaded, runs_code)


def _manager(folder: Path | None, names: Sequence[str]) -> Any:
    """What knows the tasks of a folder, and the harness's own unless the names are all there.

    Reading the harness's own 14,000 takes longer than asking a small model.
    """
    import_transformers()
    try:
        import datasets
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"--tasks needs lm-evaluation-harness ({error}); pip install '{NEEDED}'") from None
    datasets.disable_progress_bars()
    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if {*names} <= {*own.all_tasks}:
            return own
    return TaskManager(include_path=None if folder is None else str(folder))


def _load(manager: Any, name: str, runs_code: bool) -> Any:
    """A task or a group with its tasks."""
    from datasets.exceptions import DatasetsError
    from yaml import YAMLError

    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, 1)
        hint = f"Did you mean {near[0]!r}?" if near else "`lm_eval ls tasks` lists all"
        raise InputError(f"--tasks names {name!r}, which is no task of the harness. {hint}")
    if runs_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the same permission, as the metric asks for it
    elif (manager.task_index[name].cfg or {}).get("unsafe_code"):
        raise _unsafe(name)
    try:
        found = manager.load([name])
    except (
        *(DatasetsError, YAMLError, ImportError, OSError),
        *(ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError),
    ) as error:
        raise InputError(f"the task {name} cannot be loaded ({first_line(error)})") from None
    if not runs_code and any(getattr(task, "UNSAFE_CODE", False) for task in found["tasks"].values()):
        raise _unsafe(name)
    seeing = [task for task, own in found["tasks"].items() if getattr(own, "MULTIMODAL", False)]
    if seeing:
        raise InputError(f"{first_of(seeing, 5)} has pictures or sounds; measure it with lmms-eval and give --import")
    return found


def _unsafe(name: str) -> InputError:
    return InputError(
        f"{name} runs code that the model writes; give --confirm_run_unsafe_code where that can do no harm, as in a "
        "container"
    )


def _set_examples(task: Any, shots: int | None) -> None:
    """Set how many examples stand before each question; a task that says none keeps none, as in the harness."""
    own = task.get_config("num_fewshot")
    if own != 0:
        task.set_config("num_fewshot", (own or 0) if shots is None else shots)


def _asked_in(results: Any, task: str) -> Samples:
    """What was asked in a task."""
    samples: Samples = results["samples"].get(task, ())
    return samples


def _filters(task: Any) -> list[str]:
    return [one["name"] for one in task.get_config("filter_list") or ()] or ["none"]


def _is_bare(words: Format) -> bool:
    return words.template is None and words.text == QUESTION


def _worded(model: Any, tokenizer: Any, words: Format, batch: int) -> Any:
    """A model as the harness takes it, which is asked in a format's words and stops where its turn ends."""
    from lm_eval.models.huggingface import HFLM

    class Worded(HFLM):  # type: ignore[misc]
        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            begun = "" if add_generation_prompt else chat_history[-1]["content"]
            turns = chat_history if add_generation_prompt else chat_history[:-1]
            return words.prompt("\n\n".join(turn["content"] for turn in turns)) + begun

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            if words.end and words.end.strip():
                for request in requests:
                    request.arguments = _until(request.args, words.end.strip())
            return list(super().generate_until(requests, disable_tqdm))

    harness = logging.getLogger("lm_eval")
    level = harness.level
    harness.setLevel(logging.ERROR)  # it warns that a loaded model needs no settings for loading
    try:
        return Worded(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch,
            add_bos_token=None if words.adds_special_tokens else False,
        )
    finally:
        harness.setLevel(level)


def _until(arguments: tuple[Any, ...], end: str) -> tuple[Any, ...]:
    """Arguments of a request, with one more text that ends an answer."""
    context, settings, *more = arguments
    given = settings.get("until") or []
    ends = [given] if isinstance(given, str) else list(given)
    return (context, {**settings, "until": list(dict.fromkeys([*ends, end]))}, *more)
