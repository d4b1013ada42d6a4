"""The command line's flags: what they mean, the parser with its help, and the values that were given as texts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, get_args, get_origin

from expert_merging.backbone import Backbone
from expert_merging.catalogue import all_methods
from expert_merging.documents import parse_json
from expert_merging.errors import InputError, near_name
from expert_merging.flags import Option, current_name, describe_type, read_options
from expert_merging.method import Method


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
        align_experts: put each expert's units (feed-forward units, heads, residual stream) in the base's order before
            anything is merged, for models of different origin. weight_matching finds it by weights, as Git Re-Basin
            does; activation_matching by what units say about calibration samples, as ZipIt does, for which the flags of
            methods that read samples count. A fine-tune of the base has its order already.
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
        keep_targets: keep what experts say about samples in targets/ of the output folder, for other runs with the same
            experts and samples, and the order of units that --align_experts weight_matching finds. At most 50 GB are
            kept; the oldest files go first.
        chat_template_from: whose chat template the merged folder gets: an expert's name, base or family. By default the
            base's where it renders a question, else the one that all experts share, else the family's.
        push_to_hub: repository on the Hugging Face Hub, ORGANISATION/NAME, that the complete model is put into, also of
            a run that was complete before. A new one is private. With --dry_run, it is only said what would be sent.
        run_tests: ask the merged model a few questions afterwards.
        dry_run: check everything, print the plan and write nothing.
    """

    method: str = "expert_merging"
    post: list[str] | None = None
    cache_dir: str | None = None
    base_model_path: str | None = None
    expert: dict[str, str] | None = None
    exclude_params: Literal["none"] | list[str] | None = None
    align_experts: Literal["weight_matching", "activation_matching"] | None = None
    tokenizer: str | None = None
    embeddings: str | None = None
    output_path: str | None = None
    run_name: str | None = None
    seed: int = 0
    device: str = "auto"
    log_with: str = "tensorboard"
    keep_targets: bool = True
    chat_template_from: str | None = None
    push_to_hub: str | None = None
    run_tests: bool = False
    dry_run: bool = False


GENERAL = read_options(GeneralOptions)
# What an option is where no value is given, if that is not simply nothing.
_UNSET = {
    "data_dir": "dataset/ at the repository root",
    "population": "by coefficients",
    "rank_ratio": "1/experts",
    "router_temperature": "0.1 for ridge and task_vectors, else 1",
    "scaling_coefficient": "by directions",
    "solver": "by variant",
    "step_size": "by solver",
}
# What help says of an option whichever method has it.
_MORE = {
    "scaling_coefficient": "; auto, for methods of closed form, chooses it by divergence from the experts on "
    "calibration samples",
}
# Where so many methods have an option in one meaning, help does not name them.
_MANY = 5
# Flags that are no options.
COMMANDS = ("config", "list_methods")
# Flags that take several values, and may be repeated.
LISTS = ("exclude_params", "post")
_GROUPS = {
    "what is merged": (
        *("method", "post", "cache_dir", "base_model_path", "expert", "exclude_params"),
        *("align_experts", "tokenizer", "embeddings", "chat_template_from"),
    ),
    "the run": (
        "output_path",
        "run_name",
        "seed",
        "device",
        "log_with",
        "keep_targets",
        "push_to_hub",
        "run_tests",
        "dry_run",
    ),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help shows all options")


def build_parser(
    backbone: Backbone, method: Method | None = None, prog: str = "model_merging.py"
) -> argparse.ArgumentParser:
    """The command line of one family, with help from docstrings and the family's defaults.

    Args:
        backbone: the family.
        method: the only method whose options there are, and those of modifiers; None for all.
        prog: how the command is called.
    """
    from rich_argparse import RichHelpFormatter

    RichHelpFormatter.group_name_formatter = str  # by default it writes every word with a capital, flags too
    parser = _Parser(
        prog=prog,
        description=f"Merge experts of {backbone.base_folder}, or of another base, into one model."
        if method is None
        else f"{method.name}: {method.summary} Defaults are those of {backbone.name}.",
        formatter_class=RichHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    adders = (_add_general, _add_of_methods) if method is None else (_add_of_methods, _add_general)
    for add in adders:  # what is particular comes first where there is only one method
        add(parser, backbone, method)
    return parser


def _add_general(parser: argparse.ArgumentParser, backbone: Backbone, _method: Method | None) -> None:
    """Add the flags that every method has."""
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


def _add_of_methods(parser: argparse.ArgumentParser, backbone: Backbone, method: Method | None) -> None:
    """Add the flags of methods, or of one alone, and the family's own."""
    for reads, title in ((False, "options of methods"), (True, "options of methods that read samples")):
        users = {
            name: own for name, own in _option_users(method).items() if reads == all(user.reads_samples for user in own)
        }
        group = parser.add_argument_group(title if method is None else f"options of {method.name}") if users else parser
        for name, own in users.items():
            widest = max((user.options[name].annotation for user in own), key=lambda kind: len(describe_type(kind)))
            shown_help = _shown_help(name, own, alone=method is not None)
            option = replace(own[0].options[name], annotation=widest, help=shown_help)
            add_flag(group, option, _shown_default(name, own, backbone))
    if backbone.options and (method is None or method.reads_samples):
        group = parser.add_argument_group(f"options of {backbone.name}, for methods that read samples and --run_tests")
        for option in backbone.options.values():
            add_flag(group, option, option.default)


def all_options(backbone: Backbone) -> dict[str, Option]:
    """Every option that the family's command has, by name."""
    of_methods = {name: users[0].options[name] for name, users in _option_users().items()}
    return {**backbone.options, **of_methods, **GENERAL}


def _option_users(only: Method | None = None) -> dict[str, list[Method]]:
    """Every method option with the methods that have it.

    Args:
        only: the only method that counts.
    """
    users: dict[str, list[Method]] = {}
    for method in all_methods().values() if only is None else [only]:
        for name in method.options:
            users.setdefault(name, []).append(method)
    return users


def _shown_help(name: str, users: list[Method], *, alone: bool) -> str:
    """What the option means and which methods have it, for each group of them where it does not mean the same.

    Args:
        name: of the option.
        users: the methods that have it.
        alone: there is no other method, so none is named.
    """
    by_text: dict[str, list[str]] = {}
    for method in users:
        by_text.setdefault(method.options[name].help.rstrip("."), []).append(method.name)
    if len(by_text) == 1:
        (text, methods), *_ = by_text.items()
        text += _MORE.get(name, "")
        return f"{text}." if len(methods) >= _MANY or alone else f"{text} (with {', '.join(methods)})."
    return (
        "; ".join(f"with {', '.join(methods)}: {text}" for text, methods in by_text.items()) + f"{_MORE.get(name, '')}."
    )


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
        takes_several: several entries, or true or false, may follow one flag; not where the command has arguments
            without a flag.

    Raises:
        ValueError: the option is true by default, and nothing may follow the flag.
    """
    text = option.help[0].upper() + option.help[1:]
    if option.annotation is bool and not takes_several:
        if option.default:
            raise ValueError(f"--{option.name} is true by default, and nothing that follows it could say otherwise")
        group.add_argument(f"--{option.name}", action="store_true", help=text)
        return
    takes = describe_type(option.annotation)
    notes = [] if option.annotation in (str, str | None) else [f"Takes {takes}."]
    notes += [] if default in (None, "") else [f"Default: {show(default)}."]
    text = " ".join([text, *notes]).replace("%", "%%")
    if option.annotation is bool:
        # Other texts are refused with those of all other options.
        group.add_argument(
            f"--{option.name}",
            metavar=_metavar(option),
            nargs="?",
            const=True,
            type=lambda given: {"true": True, "false": False}.get(given, given),
            help=text,
        )
        return
    group.add_argument(
        f"--{option.name}",
        metavar=_metavar(option),
        action="extend",
        nargs="+" if takes_several and (option.name in LISTS or _is_named_one_by_one(option)) else 1,
        help=text,
    )


def _has_entries(option: Option) -> bool:
    """Whether its value is entries by name, which are given one by one or as a JSON object."""
    return "dict" in str(option.annotation)


def _may_be_text(option: Option) -> bool:
    """Whether its value may be a text as a whole."""
    return get_origin(option.annotation) is not dict and str in get_args(option.annotation)


def _is_named_one_by_one(option: Option) -> bool:
    """Whether entries may follow one flag; not where words of a text without quotation marks would pass for some."""
    return _has_entries(option) and not _may_be_text(option)


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
    options = all_options(backbone)
    known = [*options, *COMMANDS]
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
    if name in LISTS:
        return value[0] if len(value) == 1 and (value[0] == "none" or value[0].startswith("[")) else value
    is_text = _may_be_text(options[name]) and not value[-1].lstrip().startswith('{"')
    if _has_entries(options[name]) and not is_text:
        return merge_entries(name, value)
    return value[-1]


def merge_entries(name: str, values: list[str]) -> dict[str, Any]:
    """One dictionary from flags that each hold ``NAME=VALUE`` or a JSON object."""
    merged: dict[str, Any] = {}
    for text in values:
        if text.lstrip().startswith("{"):
            try:
                entries = parse_json(text)
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
