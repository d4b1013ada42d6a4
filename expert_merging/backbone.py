"""What the core asks of a model family: a frozen record of facts and functions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_merging.checkpoints.checkpoint import Checkpoint, loadable
from expert_merging.checkpoints.folders import refuse_pointers
from expert_merging.checkpoints.naming import DECODER
from expert_merging.checkpoints.reading import reading
from expert_merging.errors import InputError, first_line, first_of
from expert_merging.flags import Option, read_options
from expert_merging.libraries import import_transformers
from expert_merging.questions.formats import Asking, Format

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from expert_merging.questions.calibration import Sample


# Functions of a family whose keyword-only parameters are flags.
_CONFIGURABLE = ("load_model", "parameter_names", "load_processor", "encode_prompt")


@dataclass(frozen=True)
class Evaluation:
    """How merged models of one ``model_type`` are evaluated.

    Args:
        commands: commands that evaluate a merged folder, with ``{model}`` in them for the folder and ``{eval}`` for
            VLMEvalKit's configuration.
        vlmeval: VLMEvalKit's class for the model and its settings; the merged folder gets a configuration for it.
        vlmeval_path: regular expression that a folder's path must match (`re.match`, in any case) for that class to
            take the model for what it is.
        benchmarks: VLMEvalKit's class of each benchmark that the configuration names.
        run_name: beginning of the names that runs get by default; the family's name if it is empty.
        by_expert: further commands, each for experts of that name, in any case.
        otherwise: the command where no expert has one.
    """

    commands: tuple[str, ...] = ()
    vlmeval: Mapping[str, Any] = field(default_factory=dict)
    vlmeval_path: str = ""
    benchmarks: Mapping[str, str] = field(default_factory=dict)
    run_name: str = ""
    by_expert: Mapping[str, str] = field(default_factory=dict)
    otherwise: str = ""

    def commands_for(self, experts: Iterable[str]) -> list[str]:
        """The commands that suit a model of these experts."""
        names = {name.lower() for name in experts}
        found = [*self.commands, *(command for name, command in self.by_expert.items() if name.lower() in names)]
        return found or [self.otherwise] * bool(self.otherwise)


@dataclass(frozen=True)
class Backbone:
    """One model family.

    Keyword-only parameters of `load_model`, `parameter_names`, `load_processor` and `encode_prompt` are flags of the
    family's command, as those of methods are; dictionaries among them are by task.

    Args:
        name: the family, as its folder is called.
        base_folder: the base's folder name under ``--cache_dir``.
        expert_folders: folder name of each expert by expert name, in order.
        task_experts: expert by calibration task, for the family's usual tasks that are not called like their expert.
        exclude_params: patterns of parameters that keep the base's value (`re.match` on file names).
        defaults: option defaults that differ from the methods' own, by option or, for one method, ``method.option``.
        load_model: ``(folder, dtype) -> model`` in evaluation mode, on the CPU; also takes ``words``, the folder whose
            tokenizer prompts are made with, where the model has to know of tokens (`beside`).
        parameter_names: ``(folder) -> names`` of the model's parameters, without loading weights; of one in which
            several tensors of the files are fused, those tensors' names.
        load_processor: ``(folder) -> tokenizer or processor``.
        encode_prompt: ``(processor, sample, format or None) -> model inputs``, batch of one, ending where the response
            starts; None for what the processor's own chat template says.
        asking: in whose words the family's models are asked.
        takes_images: samples may have pictures.
        picture_bounds: names of the flags that make pictures take fewer tokens.
        file_name: name in a published checkpoint of a parameter's name in memory, or in a checkpoint saved with newer
            names; published names stay, and by default all do. Parameters in memory that share one are its consecutive
            rows, in their order. What transformers itself does to names need not be in it.
        vision_tower: pattern of the vision tower's parameters, one of `exclude_params`; empty where there is none.
        test_questions: what ``--run_tests`` asks the merged model.
        evaluation: how merged models are evaluated, by ``model_type`` of the family's bases in ``config.json``; under
            an empty name for all others.
        loading: expressions with transformers that load model and processor, with ``{model}`` for the folder.
        values: values of the family's flags, once they are filled in.
    """

    name: str
    base_folder: str
    expert_folders: Mapping[str, str]
    exclude_params: tuple[str, ...]
    defaults: Mapping[str, Any]
    load_model: Callable[..., Any]
    parameter_names: Callable[[Path], list[str]]
    load_processor: Callable[[Path], Any]
    encode_prompt: Callable[[Any, Sample, Format | None], dict[str, Tensor]]
    asking: Asking = field(default_factory=Asking)
    task_experts: Mapping[str, str] = field(default_factory=dict)
    takes_images: bool = False
    picture_bounds: tuple[str, ...] = ()
    file_name: Callable[[str], str] = str
    vision_tower: str = ""
    test_questions: tuple[Sample, ...] = ()
    evaluation: Mapping[str, Evaluation] = field(default_factory=dict)
    loading: tuple[str, str] = (
        'AutoModelForCausalLM.from_pretrained("{model}", dtype="auto")',
        'AutoTokenizer.from_pretrained("{model}")',
    )
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def landmark(self) -> str:
        """Pattern of names by which published checkpoints are known."""
        return self.vision_tower or DECODER

    def evaluation_of(self, model_type: str) -> Evaluation:
        """How merged models of the type are evaluated."""
        return self.evaluation.get(model_type, self.evaluation.get("", Evaluation()))

    def beside(self, base: Path) -> Backbone:
        """The family with a base whose tokenizer serves experts as well, which may have none or another one.

        All prompts are made with the base's, so what a model is told of tokens must be the base's too.
        """
        if "words" not in inspect.signature(self.load_model).parameters:
            return self  # its models are told nothing of tokens
        load = self.load_model
        return replace(self, load_model=lambda folder, dtype: load(folder, dtype, base))

    @property
    def options(self) -> dict[str, Option]:
        """The family's own flags by name."""
        return {
            name: option for function in _CONFIGURABLE for name, option in read_options(getattr(self, function)).items()
        }

    def configured(self, values: Mapping[str, Any]) -> Backbone:
        """The family with the values of its flags filled in."""

        def fill(function: Callable[..., Any]) -> Callable[..., Any]:
            wanted = {
                name: values[name]
                for name, parameter in inspect.signature(function).parameters.items()
                if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name in values
            }
            return functools.partial(function, **wanted) if wanted else function

        functions: dict[str, Any] = {name: fill(getattr(self, name)) for name in _CONFIGURABLE}
        return replace(self, **functions, values={**values})


def empty_model(kind: str, config: Any) -> Any:
    """A model of a configuration without memory for its weights.

    Args:
        kind: one of transformers' automatic classes, such as ``AutoModelForCausalLM``.
        config: a configuration of transformers'.

    Raises:
        ValueError: it has sizes that no tensor has.
    """
    import torch

    try:
        with torch.device("meta"):
            return getattr(import_transformers(), kind).from_config(config, trust_remote_code=False)
    except RuntimeError as error:  # torch's for such sizes; memory cannot have run out
        raise ValueError(first_line(error)) from None


def load_whole(kind: str, folder: Path, dtype: torch.dtype, file_name: Callable[[str], str] = str) -> Any:
    """A model whose tensors are all there and as ``config.json`` says, in evaluation mode, without remote code.

    Args:
        kind: one of transformers' automatic classes, such as ``AutoModelForCausalLM``.
        folder: the checkpoint.
        dtype: type of the weights in memory.
        file_name: what files call a parameter, for messages.

    Raises:
        InputError: the folder lacks a tensor of the model, or has one of another shape, or its files are being changed.
    """
    with loadable(folder) as source, reading(folder, "model"), _weights_unchanged(folder):
        model, report = getattr(import_transformers(), kind).from_pretrained(
            source,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # to be refused below with the rest
            output_loading_info=True,
        )
    if report["mismatched_keys"]:
        name, stored, expected = min(report["mismatched_keys"])
        raise InputError(
            f"{folder}: {file_name(name)} has shape {list(stored)}, and {list(expected)} by config.json; "
            "download both again"
        )
    refuse_lacking(folder, {file_name(name) for name in report["missing_keys"]})
    return model.eval()


@contextmanager
def _weights_unchanged(folder: Path) -> Iterator[None]:
    """Around what loads files of weights that were whole when they were checked.

    Raises:
        InputError: they are not any more.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        Checkpoint(folder)  # which names the file that is not whole
        raise InputError(
            f"{folder}: files of weights were written while they were read ({first_line(error)}); wait until they are "
            "complete"
        ) from None


def refuse_lacking(folder: Path, names: Set[str]) -> None:
    """Refuse a checkpoint in whose files tensors of its model are not; nothing is said if there are no such names."""
    if names:
        raise InputError(
            f"{folder} lacks {first_of(sorted(names), 1)}, which the model of its config.json has; download it again"
        )


def load_tokenizer(folder: Path, **options: Any) -> Any:
    """The tokenizer of a checkpoint folder.

    Args:
        folder: the checkpoint.
        options: arguments of ``AutoTokenizer.from_pretrained``; by default no code of the folder is executed.

    Raises:
        InputError: transformers cannot read it.
    """
    refuse_pointers(folder.glob("*token*"))
    options = {"local_files_only": True, "trust_remote_code": False, **options}
    with reading(folder, "tokenizer"):
        return usable(import_transformers().AutoTokenizer.from_pretrained(folder, **options))


def usable(tokenizer: Any) -> Any:
    """The tokenizer itself, once it has made tokens: some damaged files are only noticed then."""
    tokenizer("a")
    return tokenizer
