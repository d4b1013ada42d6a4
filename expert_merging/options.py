"""The values of all options, from flags, configuration file, environment and defaults."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from expert_merging.backbone import Backbone
from expert_merging.catalogue import all_methods, find_method, preset_of
from expert_merging.checkpoints.hub import read_id
from expert_merging.checkpoints.sources import below
from expert_merging.documents import parse_json, parse_yaml, read_text, resolved
from expert_merging.errors import InputError, Problems, about, near_name
from expert_merging.flags import Option, by_name, current_name, is_one_per_expert, read_options
from expert_merging.method import Method
from expert_merging.outputs import mirror
from expert_merging.parser import COMMANDS, GENERAL, all_options
from expert_merging.processes import launched_with
from expert_merging.questions.calibration import find_tasks, unknown_task
from expert_merging.running.options import SampleOptions
from expert_merging.search.automatic import AUTO, COEFFICIENT, automatic
from expert_merging.writing import can_name_file

ROOT = Path(__file__).resolve().parent.parent
_PATHS = (
    *("cache_dir", "base_model_path", "expert", "output_path"),
    *("data_dir", "questions", "coefficients", "negative_prompts"),
)
# The paths among them that may name a repository on the Hub instead.
_REPOSITORIES = ("base_model_path", "expert")


@dataclass(frozen=True)
class Resolved:
    """All options after flags, configuration file, environment and defaults are put together.

    Args:
        general: value of every general option.
        method: the method.
        options: value of every option of the method and of its modifiers.
        family: value of every option of the family's own.
        ignored: flags that were given and that the method does not have.
        modifiers: what improves the method's result, in their order.
        given: names of all flags that were given.
        defaults: value of every option where the user gives nothing.
    """

    general: Mapping[str, Any]
    method: Method
    options: Mapping[str, Any]
    family: Mapping[str, Any]
    ignored: tuple[str, ...]
    modifiers: tuple[Method, ...] = ()
    given: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> tuple[Method, ...]:
        """The method and its modifiers."""
        return (self.method, *self.modifiers)

    @property
    def reads_samples(self) -> bool:
        """Whether models are run on calibration samples, for which the family's own options are."""
        return self.aligns_on_samples or any(step.reads_samples_with(self.options) for step in self.steps)

    @property
    def aligns_on_samples(self) -> bool:
        """Whether experts are aligned by what they say about samples, whatever the method reads."""
        return _aligns_on_samples(self.general)

    def options_of(self, step: Method) -> dict[str, Any]:
        """The options of the method or of one of its modifiers."""
        return {name: self.options[name] for name in step.options}


def read_config(file: Path, backbone: Backbone) -> dict[str, Any]:
    """Options from a YAML or JSON file; of a run's ``config.json``, its options.

    Args:
        file: the file.
        backbone: the family, for the options of its own.

    Raises:
        InputError: it cannot be read, is of another family's run, or has a name that is no option.
    """
    content = read_options_file(file)
    if isinstance(content.get("options"), dict):
        family = content.get("family", backbone.name)
        if family != backbone.name:
            raise InputError(
                f"--config {file} is of a run of {family}, and this is the command of {backbone.name}; use "
                f"{family}/model_merging.py, or name the options that you want in a file of your own"
            )
        record: dict[str, Any] = {name: content[name] for name in ("method", "seed") if name in content}
        content = {**content["options"], **record}
    content = {current_name(str(name)): value for name, value in content.items()}
    known = [*all_options(backbone)]
    problems = [f"{file}: no option {name!r}. {near_name(name, known)}" for name in content if name not in known]
    if problems:
        raise InputError(*problems)
    return {name: value for name, value in content.items() if value is not None}


def read_options_file(file: Path) -> dict[str, Any]:
    """What a YAML or JSON file of options holds, whatever names are in it.

    Raises:
        InputError: it cannot be read.
    """
    with about("--config"):
        text = read_text(file, advice="write options in YAML or JSON")
    try:
        content = _parse(text)
    except ValueError as error:
        raise InputError(f"--config {file} is neither YAML nor JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {file} must hold options by name, such as 'method: expert_merging'")
    return content


def _parse(text: str) -> Any:
    """The text's value; not all JSON is YAML (tabs, numbers such as 1e-05)."""
    try:
        return parse_json(text)
    except ValueError:
        return parse_yaml(text)


def resolve(given: Mapping[str, Any], environment: Mapping[str, str], backbone: Backbone) -> Resolved:
    """Put flags, configuration file, environment, ``.env`` and defaults together, in this order of precedence.

    Args:
        given: result of `parse`.
        environment: the process's environment.
        backbone: the family, for its defaults.

    Raises:
        InputError: every value that does not fit its option.
    """
    values = _gather(given, environment, backbone)
    problems = Problems()
    method, modifiers = _find_steps(values, problems)
    steps = (*modifiers, method)  # where two have an option, the method's default counts
    aligns = _aligns_on_samples(values)
    of_steps = _options_of(steps, aligns=aligns)
    general = {name: option.default for name, option in GENERAL.items()}
    options = _defaults_of(steps, backbone, aligns=aligns)
    family = {name: option.default for name, option in backbone.options.items()}
    runs_models = aligns or any(step.reads_samples for step in steps) or values.get("run_tests")
    used_by_family = backbone.options if runs_models else {}
    known = {**used_by_family, **of_steps, **GENERAL}
    by_expert = {
        name: numbers
        for name, option in of_steps.items()
        if is_one_per_expert(option.annotation) and (numbers := by_name(values.get(name)))
    }
    for name, value in values.items():
        if name in known and name not in by_expert:
            target = next(target for target in (general, options, family) if name in target)
            with problems.collecting():
                target[name] = _absolute(name, known[name].convert(value))
    reads_samples = not problems.found and (aligns or any(step.reads_samples_with(options) for step in steps))
    if reads_samples and launched_with("DEEPSPEED", environment):
        problems.add(
            "accelerate launch was told to use DeepSpeed, with which coefficients cannot be learned; take one of the "
            "configurations in configs/accelerate (eight_gpus_fsdp2.yaml where no device has room for the model)"
        )
    problems.check()
    general |= _below_cache(general, given, backbone)
    experts = list(general["expert"] or backbone.expert_folders)
    for name, numbers in by_expert.items():
        with problems.collecting():
            options[name] = known[name].for_experts(numbers, experts, options[name])
    general |= {"method": method.name, "post": [step.name for step in modifiers] or None}
    general["exclude_params"] = _patterns(general["exclude_params"], backbone)
    general["output_path"] = general["output_path"] or str(ROOT / "results" / "logs")
    if reads_samples:
        options["data_dir"] = options["data_dir"] or str(ROOT / "dataset")
        with problems.collecting():
            problems.found += _unknown_tasks(Path(options["data_dir"]), experts, family, backbone)
    problems.check()
    # A configuration file may serve several methods; what it has in vain is no mistake.
    ignored = tuple(name for name in given if name not in known and name not in COMMANDS)
    defaults = _default_values(_defaults_of(steps, backbone, aligns=aligns), backbone)
    return Resolved(general, method, options, family, ignored, modifiers, tuple(given), defaults)


def _read_dotenv(file: Path) -> Mapping[str, str | None]:
    """Names and values of ``.env``; none where it is missing.

    Raises:
        InputError: it cannot be read, or a line is something else.
    """
    from dotenv import dotenv_values
    from dotenv.parser import parse_stream

    if not file.is_file():
        return {}
    text = read_text(file, advice="save it as UTF-8")
    for binding in parse_stream(StringIO(text)):
        if binding.error:
            raise InputError(
                f"{file}, line {binding.original.line}: this is not NAME=VALUE; put it right, or remove it"
            )
    return dotenv_values(stream=StringIO(text))


def _aligns_on_samples(general: Mapping[str, Any]) -> bool:
    """Whether experts are aligned by what they say about samples, whatever the method reads."""
    return general.get("align_experts") == "activation_matching"


def _options_of(steps: Iterable[Method], *, aligns: bool) -> dict[str, Option]:
    """Options of the method and its modifiers, and those of samples where experts are aligned on them."""
    of_samples = read_options(SampleOptions) if aligns else {}
    return {**of_samples, **{name: option for step in steps for name, option in step.options.items()}}


def _defaults_of(steps: Iterable[Method], backbone: Backbone, *, aligns: bool) -> dict[str, Any]:
    """Their defaults, with the family's values."""
    family = backbone.defaults
    of_samples = {name: family.get(name, option.default) for name, option in _options_of((), aligns=aligns).items()}
    return {**of_samples, **{name: value for step in steps for name, value in step.defaults(family).items()}}


def _default_values(of_steps: Mapping[str, Any], backbone: Backbone) -> dict[str, Any]:
    """What every option of a run is where the user gives nothing, as its record has it."""
    others = {option.name: option.default for option in (*GENERAL.values(), *backbone.options.values())}
    values = {**others, **of_steps}
    data_dir = {"data_dir": str(ROOT / "dataset")} if "data_dir" in values else {}
    return {**values, **data_dir, "exclude_params": _patterns(None, backbone)}


def _gather(given: Mapping[str, Any], environment: Mapping[str, str], backbone: Backbone) -> dict[str, Any]:
    """What flags, configuration file, launcher, environment, ``.env`` and a preset say, the former over the latter.

    A preset's own modifiers stay, before those that are given, and are not done twice where they are given too.
    """
    cache = cache_folder(environment)
    values: dict[str, Any] = {} if cache is None else {"cache_dir": cache}
    if launched_with("FSDP", environment):
        values["shard"] = True
    if "config" in given:
        values |= read_config(Path(given["config"]), backbone)
    values |= {name: value for name, value in given.items() if name not in COMMANDS}
    preset = preset_of(str(values.get("method", "")))
    if "post" in preset:
        more = GENERAL["post"].convert(values.get("post")) or []
        values["post"] = [*(own for own in preset["post"] if own not in map(str.lower, more)), *more]
    return {**preset, **values}


def cache_folder(environment: Mapping[str, str]) -> str | None:
    """``CACHE_DIR`` of the environment, or of ``.env``, which is meant from where that file lies."""
    found = _read_dotenv(ROOT / ".env").get("CACHE_DIR")
    if environment.get("CACHE_DIR"):
        return environment["CACHE_DIR"]
    return str(ROOT / os.path.expanduser(found)) if found else None


def _below_cache(general: Mapping[str, Any], given: Mapping[str, Any], backbone: Backbone) -> dict[str, Any]:
    """Checkpoints of the configuration file, below the cache folder that a flag gives."""
    if "cache_dir" not in given:
        return {}

    cache, found = Path(general["cache_dir"]), dict[str, Any]()
    if general["base_model_path"] and "base_model_path" not in given:
        found["base_model_path"] = str(below(cache, general["base_model_path"], backbone.base_folder))
    if general["expert"] and "expert" not in given:
        published = backbone.expert_folders
        found["expert"] = {
            name: str(below(cache, path, published.get(name))) for name, path in general["expert"].items()
        }
    return found


def _patterns(given: Any, backbone: Backbone) -> list[str]:
    """Patterns of parameters that keep the base's value."""
    if given is None:
        return list(backbone.exclude_params)
    return [] if given == "none" else list(given)


def _find_steps(values: Mapping[str, Any], problems: Problems) -> tuple[Method, tuple[Method, ...]]:
    """The method and its modifiers.

    Raises:
        InputError: there is no such method, or it has no coefficient to choose; what is wrong with the modifiers is
            noted.
    """
    method = find_method(str(values.get("method", GENERAL["method"].default)))
    if method.is_modifier:
        raise InputError(f"{method.name} improves what another method has merged: --method METHOD --post {method.name}")
    if values.get(COEFFICIENT) == AUTO:
        method = automatic(method)
    modifiers = []
    for name in GENERAL["post"].convert(values.get("post")) or []:
        known = [step.name for step in all_methods().values() if step.is_modifier]
        try:
            found = find_method(name)
        except InputError:
            problems.add(f"--post {name}: no such modifier. {near_name(name, known)}")
            continue
        if found.is_modifier:
            modifiers.append(found)
        else:
            problems.add(f"--post {name}: that is a method of its own. {near_name(name, known)}")
    if modifiers and method.outputs is not mirror:
        names = " ".join(step.name for step in modifiers)
        problems.add(
            f"--post {names} improves one model merged of task vectors, and {method.name} makes something else"
        )
    return method, tuple(modifiers)


def _unknown_tasks(data_dir: Path, experts: Iterable[str], family: Mapping[str, Any], backbone: Backbone) -> list[str]:
    """Tasks that an option of the family names and that have neither a file nor a default of that option."""
    if not data_dir.is_dir():
        return []  # which is told when its files are read
    files = find_tasks(data_dir, (*experts, *backbone.task_experts))
    return [
        unknown_task(name, task, data_dir, files)
        for name, option in backbone.options.items()
        if isinstance(family[name], dict)
        for task in family[name]
        if task not in {*files, *(option.default or {})}
    ]


def _absolute(name: str, value: Any) -> Any:
    """Paths as absolute ones, so that a run's config.json means the same wherever it is used."""
    if name not in _PATHS or value is None:
        return value
    if isinstance(value, dict):
        return {key: _absolute(name, path) for key, path in value.items()}
    if name == "negative_prompts" and value in ("others", "none"):
        return value
    if name in _REPOSITORIES and read_id(value) and not Path(value).exists():
        return value
    with about(f"--{name}"):
        return str(resolved(value))


def checkpoint_folders(general: Mapping[str, Any], backbone: Backbone) -> tuple[Path, dict[str, Path]]:
    """Folders of the base and of the experts, or repositories on the Hub.

    Raises:
        InputError: neither paths nor a cache folder are given, or an expert has an unusable name.
    """
    cache, experts = general["cache_dir"], general["expert"]
    if cache is None and not (experts and general["base_model_path"]):
        raise InputError(
            "where are the checkpoints? Give --cache_dir DIR (or CACHE_DIR in the environment or in .env), or "
            "--base_model_path PATH and --expert NAME=PATH for each expert"
        )
    for name in experts or {}:
        if name == "base" or not can_name_file(name):
            raise InputError(
                f"an expert cannot be called {name!r}; choose another NAME in --expert NAME=PATH, one that can be a "
                "file's and is not base"
            )
    base = Path(general["base_model_path"] or Path(cache) / backbone.base_folder)
    folders = experts or {name: str(Path(cache) / folder) for name, folder in backbone.expert_folders.items()}
    return base, {name: Path(folder) for name, folder in folders.items()}


def command_line() -> str:
    """The command as it was given, for the record."""
    import shlex

    program = Path(sys.argv[0]).name
    return shlex.join([*(["python", "-m", "expert_merging"] if program == "__main__.py" else [program]), *sys.argv[1:]])
