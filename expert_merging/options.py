"""The command line's flags, from signatures; their values, from flags, configuration file and environment."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from expert_merging.backbone import Backbone
from expert_merging.catalogue import all_methods, find_method
from expert_merging.checkpoints.hub import read_id
from expert_merging.checkpoints.sources import below
from expert_merging.errors import InputError, Problems, near_name
from expert_merging.flags import Option, by_name, current_name, describe_type, is_one_per_expert, read_options
from expert_merging.method import Method
from expert_merging.outputs import mirror
from expert_merging.processes import launched_with
from expert_merging.questions.calibration import find_tasks, unknown_task
from expert_merging.writing import can_name_file

ROOT = Path(__file__).resolve().parent.parent
_PATHS = ("cache_dir", "base_model_path", "expert", "output_path", "data_dir", "coefficients")
# The paths among them that may name a repository on the Hub instead.
_REPOSITORIES = ("base_model_path", "expert")


@dataclass(frozen=True, kw_only=True)
class GeneralOptions:
    """Options that every method has.

    Args:
        method: merging method; --list_methods shows all.
        post: modifiers that change what the method has merged, such as consensus, in their order.
        cache_dir: folder that holds the family's checkpoints under their published names, or a cache of the Hub's; also
            from CACHE_DIR in the environment or in .env.
        base_model_path: base model to use instead of the family's: a folder, or a repository on the Hugging Face Hub as
            ORGANISATION/NAME or ORGANISATION/NAME@REVISION.
        expert: an expert to merge, NAME=PATH, with a folder or a repository as of the base; repeat for each. They
            replace the family's experts.
        exclude_params: regular expressions of parameters that keep the base's value, matched from the start of the
            name; none merges everything.
        tokenizer: whose tokenizer the merged model gets: base, an expert's name, or union for the base's with the
            experts' added tokens. Embeddings and head are then matched by token.
        embeddings: whose rows embeddings and head have, matched by token: base, an expert's name, or mean for the mean
            of all models that have the token. Methods do not merge them then.
        output_path: folder for all runs.
        run_name: name of this run; by default derived from the options, so that the same command finds and continues
            its run.
        seed: seed of everything random; -1 draws one and records it.
        device: where to compute; auto takes the first GPU if there is one.
        log_with: experiment tracker of methods that learn, as accelerate calls it (tensorboard, wandb, ...), or none.
        chat_template_from: whose chat template the merged folder gets: an expert's name, base or family. By default the
            base's where it renders a question, else the one that all experts share, else the family's.
        run_tests: ask the merged model a few questions afterwards.
        dry_run: check everything, print the plan and write nothing.
    """

    method: str = "expert_merging"
    post: list[str] | None = None
    cache_dir: str | None = None
    base_model_path: str | None = None
    expert: dict[str, str] | None = None
    exclude_params: Literal["none"] | list[str] | None = None
    tokenizer: str | None = None
    embeddings: str | None = None
    output_path: str | None = None
    run_name: str | None = None
    seed: int = 0
    device: str = "auto"
    log_with: str = "tensorboard"
    chat_template_from: str | None = None
    run_tests: bool = False
    dry_run: bool = False


GENERAL = read_options(GeneralOptions)
# What an option is where no value is given, if that is not simply nothing.
_UNSET = {
    "data_dir": "dataset/ at the repository root",
    "population": "by coefficients",
    "rank_ratio": "1/experts",
    "scaling_coefficient": "by directions",
    "solver": "by variant",
    "step_size": "by solver",
}
# Where so many methods have an option in one meaning, help does not name them.
_MANY = 5
# Flags that are no options.
_COMMANDS = ("config", "list_methods")
# Flags that take several values, and may be repeated.
_LISTS = ("exclude_params", "post")
_GROUPS = {
    "what is merged": (
        *("method", "post", "cache_dir", "base_model_path", "expert", "exclude_params"),
        *("tokenizer", "embeddings", "chat_template_from"),
    ),
    "the run": ("output_path", "run_name", "seed", "device", "log_with", "run_tests", "dry_run"),
}


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
    """

    general: Mapping[str, Any]
    method: Method
    options: Mapping[str, Any]
    family: Mapping[str, Any]
    ignored: tuple[str, ...]
    modifiers: tuple[Method, ...] = ()
    given: tuple[str, ...] = ()

    @property
    def steps(self) -> tuple[Method, ...]:
        """The method and its modifiers."""
        return (self.method, *self.modifiers)

    @property
    def reads_samples(self) -> bool:
        """Whether models are run on calibration samples, for which the family's own options are."""
        return any(step.reads_samples for step in self.steps)

    def options_of(self, step: Method) -> dict[str, Any]:
        """The options of the method or of one of its modifiers."""
        return {name: self.options[name] for name in step.options}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help shows all options")


def build_parser(backbone: Backbone) -> argparse.ArgumentParser:
    """The command line of one family, with help from docstrings and the family's defaults."""
    from rich_argparse import RichHelpFormatter

    RichHelpFormatter.group_name_formatter = str  # by default it writes every word with a capital, flags too
    parser = _Parser(
        prog="model_merging.py",
        description=f"Merge experts of {backbone.base_folder}, or of another base, into one model.",
        formatter_class=RichHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    defaults = {
        "exclude_params": " ".join(backbone.exclude_params),
        "output_path": "results/logs at the repository root",
        "expert": ", ".join(f"{name}={folder}" for name, folder in backbone.expert_folders.items()),
        "base_model_path": f"CACHE_DIR/{backbone.base_folder}",
    }
    for title, names in _GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            add_flag(group, GENERAL[name], defaults.get(name, GENERAL[name].default))
        if "method" in names:
            group.add_argument(
                "--list_methods", action="store_true", help="List the methods with their options and defaults."
            )
        else:
            group.add_argument(
                "--config",
                metavar="FILE",
                help="YAML or JSON file with options by name; flags win. A run's config.json is one.",
            )
    for reads, title in ((False, "options of methods"), (True, "options of methods that read samples")):
        group = parser.add_argument_group(title)
        for name, users in _option_users().items():
            if reads == all(method.reads_samples for method in users):
                widest = max(
                    (user.options[name].annotation for user in users), key=lambda kind: len(describe_type(kind))
                )
                option = replace(users[0].options[name], annotation=widest, help=_shown_help(name, users))
                add_flag(group, option, _shown_default(name, users, backbone))
    if backbone.options:
        group = parser.add_argument_group(f"options of {backbone.name}, for methods that read samples and --run_tests")
        for option in backbone.options.values():
            add_flag(group, option, option.default)
    return parser


def _all_options(backbone: Backbone) -> dict[str, Option]:
    """Every option that the family's command has, by name."""
    of_methods = {name: users[0].options[name] for name, users in _option_users().items()}
    return {**backbone.options, **of_methods, **GENERAL}


def _option_users() -> dict[str, list[Method]]:
    """Every method option with the methods that have it."""
    users: dict[str, list[Method]] = {}
    for method in all_methods().values():
        for name in method.options:
            users.setdefault(name, []).append(method)
    return users


def _shown_help(name: str, users: list[Method]) -> str:
    """What the option means and which methods have it, for each group of them where it does not mean the same."""
    by_text: dict[str, list[str]] = {}
    for method in users:
        by_text.setdefault(method.options[name].help.rstrip("."), []).append(method.name)
    if len(by_text) == 1:
        (text, methods), *_ = by_text.items()
        return f"{text}." if len(methods) >= _MANY else f"{text} (with {', '.join(methods)})."
    return "; ".join(f"with {', '.join(methods)}: {text}" for text, methods in by_text.items()) + "."


def _shown_default(name: str, users: list[Method], backbone: Backbone) -> str:
    by_default: dict[str, list[str]] = {}
    for method in users:
        by_default.setdefault(show_default(name, method.defaults(backbone.defaults)[name]), []).append(method.name)
    if len(by_default) == 1:
        return next(iter(by_default))
    return ", ".join(f"{value} ({', '.join(methods)})" for value, methods in by_default.items())


def show_default(name: str, value: Any) -> str:
    """An option's default in words; empty where it is nothing."""
    return _UNSET.get(name, "") if value is None else show(value)


def show(value: Any) -> str:
    """A value as it would be given on the command line."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def add_flag(group: Any, option: Option, default: Any, *, takes_several: bool = True) -> None:
    """Add an option's flag to a parser or to a group of one.

    Args:
        group: the parser or group.
        option: the option.
        default: what help calls its default.
        takes_several: several entries may follow one flag; not where the command has arguments without a flag.
    """
    text = option.help[0].upper() + option.help[1:]
    if option.annotation is bool:
        group.add_argument(f"--{option.name}", action="store_true", help=text)
        return
    takes = describe_type(option.annotation)
    notes = [] if option.annotation in (str, str | None) else [f"Takes {takes}."]
    notes += [] if default in (None, "") else [f"Default: {show(default)}."]
    text = " ".join([text, *notes])
    group.add_argument(
        f"--{option.name}",
        metavar=_metavar(option),
        action="extend",
        nargs="+" if takes_several and (option.name in _LISTS or _has_entries(option)) else 1,
        help=text.replace("%", "%%"),
    )


def _has_entries(option: Option) -> bool:
    """Whether its value is entries by name, which are given one by one or as a JSON object."""
    return "dict" in str(option.annotation)


def _metavar(option: Option) -> str:
    return {"expert": "NAME=PATH", "task_expert": "TASK=EXPERT", "coefficients": "RUN_OR_FILE"}.get(
        option.name, "VALUE"
    )


def parse(arguments: Sequence[str], backbone: Backbone) -> dict[str, Any]:
    """The flags that were given, as texts by name; dashes in a flag's name count as underscores.

    Raises:
        InputError: an unknown flag (with the nearest known one) or a flag without its value.
    """
    parser = build_parser(backbone)
    given, unknown = parser.parse_known_args([_with_underscores(argument) for argument in arguments])
    flags = [argument.split("=")[0] for argument in unknown if argument.startswith("--")]
    options = _all_options(backbone)
    known = [*options, "config", "list_methods"]
    problems = [f"no flag {flag}. {near_name(flag[2:], known, before='--')}" for flag in flags]
    if unknown and not flags:
        problems = [f"unexpected argument {unknown[0]!r}; --help shows all options"]
    if problems:
        raise InputError(*problems)
    return {name: single_value(options, name, value) for name, value in vars(given).items()}


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return "--" + current_name(name) + equals + value


def single_value(options: Mapping[str, Option], name: str, value: Any) -> Any:
    """The value of a flag: the last one given, or all of them where a flag is repeated to add entries."""
    if not isinstance(value, list) or name not in options:
        return value
    if name in _LISTS:
        return value[0] if len(value) == 1 and (value[0] == "none" or value[0].startswith("[")) else value
    kind = options[name].annotation
    is_text = get_origin(kind) is not dict and str in get_args(kind) and not value[-1].lstrip().startswith('{"')
    if _has_entries(options[name]) and not is_text:
        return merge_entries(name, value)
    return value[-1]


def merge_entries(name: str, values: list[str]) -> dict[str, Any]:
    """One dictionary from flags that each hold ``NAME=VALUE`` or a JSON object."""
    merged: dict[str, Any] = {}
    for text in values:
        if text.lstrip().startswith("{"):
            try:
                entries = json.loads(text)
            except ValueError as error:
                raise InputError(f"--{name} is not valid JSON ({error}): {text}") from None
        else:
            key, equals, value = text.partition("=")
            if not equals or not key or not value:
                raise InputError(f'--{name} takes NAME=VALUE or a JSON object such as {{"NAME": 1}}, got {text!r}')
            entries = {key: value}
        repeated = sorted(set(entries) & set(merged))
        if repeated:
            raise InputError(f"--{name} gives {repeated[0]!r} twice")
        merged |= entries
    return merged


def read_config(file: Path, backbone: Backbone) -> dict[str, Any]:
    """Options from a YAML or JSON file; of a run's ``config.json``, its options.

    Args:
        file: the file.
        backbone: the family, for the options of its own.

    Raises:
        InputError: it cannot be read, is of another family's run, or has a name that is no option.
    """
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        content = _parse_json(text) or yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"--config {file} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {file} is neither YAML nor JSON: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {file} must hold options by name, such as 'method: expert_merging'")
    if isinstance(content.get("options"), dict):
        family = content.get("family", backbone.name)
        if family != backbone.name:
            raise InputError(
                f"--config {file} is of a run of {family}, and this is the command of {backbone.name}; use "
                f"{family}/model_merging.py, or name the options that you want in a file of your own"
            )
        record = {name: content[name] for name in ("method", "seed") if name in content}
        content = {**content["options"], **record}
    content = {current_name(str(name)): value for name, value in content.items()}
    known = [*_all_options(backbone)]
    problems = [f"{file}: no option {name!r}. {near_name(name, known)}" for name in content if name not in known]
    if problems:
        raise InputError(*problems)
    return {name: value for name, value in content.items() if value is not None}


def _parse_json(text: str) -> Any:
    """The text's value, None where it is no JSON; not all JSON is YAML (tabs, numbers such as 1e-05)."""
    try:
        return json.loads(text)
    except ValueError:
        return None


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
    reads_samples = any(step.reads_samples for step in steps)
    if reads_samples and launched_with("DEEPSPEED", environment):
        problems.add(
            "accelerate launch was told to use DeepSpeed, with which coefficients cannot be learned; take one of the "
            "configurations in configs/accelerate (eight_gpus_fsdp2.yaml where no device has room for the model)"
        )
    of_steps = {name: option for step in steps for name, option in step.options.items()}
    general = {name: option.default for name, option in GENERAL.items()}
    options = {name: value for step in steps for name, value in step.defaults(backbone.defaults).items()}
    family = {name: option.default for name, option in backbone.options.items()}
    used_by_family = backbone.options if reads_samples or values.get("run_tests") else {}
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
    ignored = tuple(name for name in given if name not in known and name not in _COMMANDS)
    return Resolved(general, method, options, family, ignored, modifiers, tuple(given))


def _gather(given: Mapping[str, Any], environment: Mapping[str, str], backbone: Backbone) -> dict[str, Any]:
    """What flags, configuration file, launcher, environment and ``.env`` say, the former over the latter."""
    from dotenv import dotenv_values

    dotenv = dotenv_values(ROOT / ".env") if (ROOT / ".env").is_file() else {}
    values: dict[str, Any] = {}
    if environment.get("CACHE_DIR"):
        values["cache_dir"] = environment["CACHE_DIR"]
    elif dotenv.get("CACHE_DIR"):  # is meant from where .env lies, whatever folder the command runs in
        values["cache_dir"] = str(ROOT / Path(str(dotenv["CACHE_DIR"])).expanduser())
    if launched_with("FSDP", environment):
        values["shard"] = True
    if "config" in given:
        values |= read_config(Path(given["config"]), backbone)
    return {**values, **{name: value for name, value in given.items() if name not in _COMMANDS}}


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
        InputError: there is no such method; what is wrong with the modifiers is noted.
    """
    method = find_method(str(values.get("method", GENERAL["method"].default)))
    if method.is_modifier:
        raise InputError(f"{method.name} improves what another method has merged: --method METHOD --post {method.name}")
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
        problems.add(f"--post {names} improves one merged model, and {method.name} writes something else")
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
    if name in _REPOSITORIES and read_id(value) and not Path(value).exists():
        return value
    return str(Path(os.path.expanduser(value)).resolve())  # which leaves the name of an unknown user as it is


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

    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
