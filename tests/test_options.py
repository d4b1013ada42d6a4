"""Flags, configuration file, environment and defaults become one set of options."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_merging import options
from expert_merging.errors import InputError
from expert_merging.options import checkpoint_folders, read_config, resolve
from expert_merging.parser import GENERAL, add_flag, build_parser, merge_entries, parse, show
from Mistral.backbone import BACKBONE

PUBLISHED = [
    "--method",
    "--cache_dir",
    "--output_path",
    "--run_name",
    "--scaling_coefficient",
    "--exclude_params",
    "--run_tests",
    "--data_dir",
    "--samples_per_task",
    "--samples_per_task_dict",
    "--num_epochs",
    "--temperature",
    "--learning_rate",
    "--mixed_precision",
    "--gradient_accumulation_steps",
    "--seed",
    "--base_model_path",
    "--sparsity_reg_weight",
    "--hidden_states_layers",
    "--hidden_states_weight",
    "--loss_alphas",
    "--task_vector_coeffs_dict",
    "--coeffs_size_dict",
]
OURS = ["--expert", "--config", "--dry_run", "--device", "--log_with", "--list_methods"]


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """A repository root without the developer's .env."""
    monkeypatch.setattr(options, "ROOT", tmp_path)
    return tmp_path


def resolved(*arguments, environment=None):
    return resolve(parse([str(argument) for argument in arguments], BACKBONE), environment or {}, BACKBONE)


def general(*arguments, **environment):
    return resolved(*arguments, environment=environment).general


def method_options(method, *arguments):
    return resolved("--method", method, *arguments).options


def problems(*arguments):
    with pytest.raises(InputError) as caught:
        resolved(*arguments)
    return list(caught.value.problems)


@pytest.mark.parametrize("flag", [*PUBLISHED, *OURS])
def test_every_flag_exists_and_is_explained(flag):
    (action,) = (action for action in build_parser(BACKBONE)._actions if flag in action.option_strings)
    assert action.help
    assert action.help[0].isupper()
    assert action.help.endswith(".")


def test_dashes_count_as_underscores_in_flags_but_not_in_values():
    given = parse(["--cache-dir=/a-b", "--run-name", "my-run", "--dry-run"], BACKBONE)
    assert given == {"cache_dir": "/a-b", "run_name": "my-run", "dry_run": True}


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1.0), ("1.0", 1.0), ("0.3", 0.3), ("-0.5", -0.5), ("[0.2,0.3,0.4]", [0.2, 0.3, 0.4])]
)
def test_a_coefficient_is_a_number_or_one_per_expert(text, value):
    given = method_options("task_arithmetic", "--scaling_coefficient", text)["scaling_coefficient"]
    assert given == value
    assert type(given) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("", True), ("--ties-normalize", True), ("--ties_normalize false", False), ("--ties_normalize=true", True)],
)
def test_a_flag_of_true_or_false_may_be_followed_by_either(text, value):
    flag = text.split()
    assert method_options("ties", *flag, "--density", "0.5")["ties_normalize"] is value
    assert method_options("ties", "--density", "0.5", *flag)["ties_normalize"] is value


def test_of_repeated_flags_of_true_or_false_the_last_counts_and_nothing_else_is_taken():
    assert general("--dry_run", "--dry_run", "false")["dry_run"] is False
    assert general("--dry_run", "false", "--dry_run")["dry_run"] is True
    assert parse(["--run_tests", "false"], BACKBONE) == {"run_tests": False}  # not a text, which would be true
    assert problems("--dry_run", "no") == ["--dry_run must be true or false, got no"]


def test_where_arguments_without_a_flag_follow_no_flag_takes_them():
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    option = GENERAL["dry_run"]
    add_flag(parser, option, option.default, takes_several=False)
    assert vars(parser.parse_args(["--dry_run", "a", "b"])) == {"models": ["a", "b"], "dry_run": True}
    with pytest.raises(ValueError, match="--dry_run is true by default"):
        add_flag(parser, replace(option, default=True), default=True, takes_several=False)


def test_the_last_of_repeated_flags_counts():
    assert general("--seed", 1, "--seed", 2)["seed"] == 2
    assert general("--seed", -1)["seed"] == -1


def test_experts_are_given_one_by_one_or_as_an_object(tmp_path):
    expected = {"A": str(tmp_path / "a=1"), "B": str(tmp_path / "b")}
    assert general("--expert", f"A={tmp_path}/a=1", "--expert", f"B={tmp_path}/b")["expert"] == expected
    assert general("--expert", json.dumps(expected))["expert"] == expected


def test_several_entries_may_follow_one_flag(tmp_path):
    both = resolved("--expert", f"A={tmp_path}/a", f"B={tmp_path}/b", "--samples_per_task_dict", "A=3", "B=4")
    assert both.general["expert"] == {"A": str(tmp_path / "a"), "B": str(tmp_path / "b")}
    assert both.options["samples_per_task_dict"] == {"A": 3, "B": 4}


@pytest.mark.parametrize(
    ("method", "arguments", "values"),
    [
        ("task_arithmetic", ['{"Math": 0.5}'], [0.3, 0.5, 0.3]),
        ("task_arithmetic", ['{"B": 0.5}', "--expert", "A=/a", "B=/b"], [0.3, 0.5]),
        ("dare_ta", ['{"Code": 0.1, "Chat": 1}'], [1.0, 0.3, 0.1]),
        ("evo", ['{"Math": 0.5}'], [0.3, 0.5, 0.3]),
        ("adamerging", ['{"Math": 0.5}'], [0.3, 0.5, 0.3]),
        ("expert_merging", ['{"Math": 0.5}'], [None, 0.5, None]),
    ],
)
def test_a_number_for_single_experts(method, arguments, values):
    """The others have the method's default, which of some methods is not known before the directions are."""
    assert method_options(method, "--scaling_coefficient", *arguments)["scaling_coefficient"] == values
    assert method_options("tall", "--tall_lambda", '{"Math": 0.5}')["tall_lambda"] == [0.4, 0.5, 0.4]


def test_a_number_for_experts_that_are_not_there(root):
    (root / "file").write_text("method: task_arithmetic\nscaling_coefficient: {Chat: 0.5, Maths: 1, Law: 2}\n")
    unknown = ["Maths'. Did you mean 'Math'?", "Law'. Known: Chat, Code, Math."]
    assert problems("--config", root / "file") == [
        f"--scaling_coefficient: there is no expert '{name}" for name in unknown
    ]
    assert problems("--method", "task_arithmetic", "--scaling_coefficient", "{}") == [
        "--scaling_coefficient must be a number in [-1000, 1000], a list of them or a JSON object of them by expert, "
        "got {}"
    ]
    assert problems("--method", "ties", "--scaling_coefficient", '{"Math": 1}') == [
        '--scaling_coefficient must be a number in [-1000, 1000], got {"Math": 1}'
    ]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["A"], "--expert takes NAME=VALUE or a JSON object such as {\"NAME\": 1}, got 'A'"),
        (["=a"], "--expert takes NAME=VALUE or a JSON object such as {\"NAME\": 1}, got '=a'"),
        (["A="], "--expert takes NAME=VALUE or a JSON object such as {\"NAME\": 1}, got 'A='"),
        (["A=1", '{"A": 2}'], "--expert gives 'A' twice"),
    ],
)
def test_entries_that_cannot_be_used(given, problem):
    with pytest.raises(InputError, match=re.escape(problem)):
        merge_entries("expert", given)


def test_an_object_that_is_not_json():
    with pytest.raises(InputError, match=r"^--coeffs_size_dict is not valid JSON \(.*\): {'\*': 2}$"):
        parse(["--coeffs_size_dict", "{'*': 2}"], BACKBONE)


@given(st.dictionaries(st.from_regex(r"[A-Za-z_]\w{0,5}", fullmatch=True), st.text(min_size=1), min_size=1))
def test_entries_come_back_as_they_were_given(entries):
    assert merge_entries("expert", [f"{name}={value}" for name, value in entries.items()]) == entries


@pytest.mark.parametrize("words", [["Q:", "{question}"], ["Chat={question}", "{question}"]])
def test_a_text_without_quotation_marks_is_not_cut_down_to_its_last_word(words):
    with pytest.raises(InputError, match=r"unexpected argument '{question}'; --help shows all options"):
        parse(["--prompt_template", *words], BACKBONE)
    repeated = [f"--prompt_template={word}" for word in words]
    assert parse(repeated, BACKBONE)["prompt_template"] == "{question}"


@pytest.mark.parametrize(
    ("arguments", "patterns"),
    [
        ([], list(BACKBONE.exclude_params)),
        (["--exclude_params", "none"], []),
        (["--exclude_params", ".*norm.*"], [".*norm.*"]),
        (["--exclude_params", "a.*", "b"], ["a.*", "b"]),
        (["--exclude_params", "a", "--exclude_params", "b"], ["a", "b"]),
        (["--exclude_params", '["a", "b"]'], ["a", "b"]),
        (["--exclude_params", "[ab]"], ["[ab]"]),
    ],
    ids=str,
)
def test_excluded_parameters(arguments, patterns):
    assert general(*arguments)["exclude_params"] == patterns


def test_paths_are_absolute_whatever_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    given = general("--cache_dir", "c", "--output_path", "~/o", "--expert", "A=../a", "--base_model_path", "~nobody_/b")
    assert given["cache_dir"] == str(tmp_path / "c")
    assert given["output_path"] == str(tmp_path / "home" / "o")
    assert given["expert"] == {"A": str(tmp_path.parent / "a")}
    assert given["base_model_path"] == str(tmp_path / "~nobody_" / "b")


def test_results_and_calibration_files_lie_at_the_root_by_default(root):
    assert general()["output_path"] == str(root / "results" / "logs")
    assert method_options("expert_merging")["data_dir"] == str(root / "dataset")


def test_defaults_are_the_family_s():
    assert method_options("expert_merging")["sparsity_reg_weight"] == 0.8
    assert method_options("task_arithmetic") == {"scaling_coefficient": 0.3}
    assert method_options("weight_average") == {"scaling_coefficient": 1.0}


@pytest.mark.parametrize(("text", "line"), [("A=1\n'B\n", 2), ("=x", 1), ("A='", 1)])
def test_a_line_of_dotenv_that_says_nothing_is_named(root, text, line):
    (root / ".env").write_text(text)
    with pytest.raises(InputError) as caught:
        general("--method", "ties")
    advice = "this is not NAME=VALUE; put it right, or remove it"
    assert caught.value.problems == (f"{root / '.env'}, line {line}: {advice}",)


def test_flags_win_over_config_over_environment_over_dotenv(root):
    def cache(*arguments, **environment):
        return general(*arguments, **environment)["cache_dir"]

    assert cache() is None
    (root / ".env").write_text('CACHE_DIR="/dotenv"\n')
    (root / "options.yaml").write_text("cache_dir: /config\n")
    assert cache() == "/dotenv"
    assert cache(CACHE_DIR="/environment") == "/environment"
    assert cache("--config", root / "options.yaml", CACHE_DIR="/environment") == "/config"
    assert cache("--config", root / "options.yaml", "--cache_dir", "/flag") == "/flag"


YAML = """
method: task-arithmetic
scaling-coefficient: [0.1, 0.2]
exclude_params:
  - .*norm.*
expert: {A: /a, B: /b}
seed: 3
run_tests: true
run_name: null
"""
JSON = """{
\t"method": "task-arithmetic", "scaling-coefficient": [0.1, 0.2], "exclude_params": [".*norm.*"],
\t"expert": {"A": "/a", "B": "/b"}, "seed": 3, "run_tests": true, "run_name": null}"""


@pytest.mark.parametrize("text", [YAML, JSON], ids=["yaml", "json"])
def test_a_configuration_file_holds_options_by_name(root, text):
    (root / "file").write_text(text)
    both = resolved("--config", root / "file")
    assert both.method.name == "task_arithmetic"
    assert both.options == {"scaling_coefficient": [0.1, 0.2]}
    assert both.general["exclude_params"] == [".*norm.*"]
    assert both.general["expert"] == {"A": "/a", "B": "/b"}
    assert (both.general["seed"], both.general["run_tests"], both.general["run_name"]) == (3, True, None)


def test_numbers_and_words_that_yaml_reads_in_its_own_way(root):
    (root / "file").write_text("learning_rate: 1e-5\nmixed_precision: no\nlog_with: none\n")
    both = resolved("--config", root / "file")
    assert both.options["learning_rate"] == 1e-5
    assert both.options["mixed_precision"] == "no"
    assert both.general["log_with"] == "none"


def test_flags_win_over_a_configuration_file(root):
    (root / "file").write_text(YAML)
    both = resolved("--config", root / "file", "--seed", 5, "--scaling_coefficient", 1, "--exclude_params", "none")
    assert (both.general["seed"], both.options["scaling_coefficient"]) == (5, 1.0)
    assert both.general["exclude_params"] == []


def test_a_run_s_own_record_is_a_configuration_file(root):
    record = {
        "family": "Mistral",
        "method": "task_arithmetic",
        "options": {"scaling_coefficient": 0.2, "seed": -1, "base_model_path": "/base", "expert": {"A": "/a"}},
        "seed": 77,
        "versions": {"torch": "2"},
    }
    (root / "config.json").write_text(json.dumps(record))
    assert read_config(root / "config.json", BACKBONE) == {**record["options"], "method": "task_arithmetic", "seed": 77}


def test_a_flag_s_cache_folder_replaces_the_paths_of_a_configuration_file(root):
    experts = {"Chat": "/old/Mistral-7B-Instruct-v0.1", "Math": "/old/my-math", "Law": "/old/law-7b"}
    record = {"family": "Mistral", "method": "ties", "options": {"base_model_path": "/old/b", "expert": experts}}
    (root / "config.json").write_text(json.dumps(record))
    given = ["--config", root / "config.json", "--cache_dir", root / "new"]
    for folder in (BACKBONE.base_folder, "Mistral-7B-Instruct-v0.1", "MAmmoTH2-7B", "law-7b"):
        (root / "new" / folder).mkdir(parents=True)
    base, folders = checkpoint_folders(general(*given), BACKBONE)
    assert base == root / "new" / BACKBONE.base_folder, "it is not there under its old name, but as published"
    assert {name: folder.name for name, folder in folders.items()} == {
        "Chat": "Mistral-7B-Instruct-v0.1",
        "Math": "MAmmoTH2-7B",
        "Law": "law-7b",
    }
    for name in ("b", "my-math"):
        (root / "new" / name).mkdir()
    base, folders = checkpoint_folders(general(*given), BACKBONE)
    assert (base.name, folders["Math"].name) == ("b", "my-math")
    base, folders = checkpoint_folders(general(*given, "--base_model_path", "/x", "--expert", "A=/a"), BACKBONE)
    assert (str(base), {name: str(folder) for name, folder in folders.items()}) == ("/x", {"A": "/a"})
    base, folders = checkpoint_folders(general("--config", root / "config.json", CACHE_DIR=str(root / "new")), BACKBONE)
    assert str(base) == "/old/b", "the configuration wins over the environment"
    assert list(map(str, folders.values())) == list(experts.values())


@pytest.mark.parametrize("path", ["/old/models--me--base/snapshots/1234", "me/base", "me/base@v1"])
def test_a_repository_of_the_hub_is_found_by_its_name(root, path):
    (root / "file").write_text(f"base_model_path: {path}\nexpert: {{A: /old/a}}\n")
    (root / BACKBONE.base_folder).mkdir()

    def folders():
        return checkpoint_folders(general("--config", root / "file", "--cache_dir", root), BACKBONE)

    assert folders() == (root / BACKBONE.base_folder, {"A": root / "a"}), "what is not there is named by its old name"
    for name in ("models--me--base", "base"):
        (root / name).mkdir()
        assert folders()[0] == root / name


def test_a_run_of_another_family_is_no_configuration(root):
    (root / "config.json").write_text('{"family": "InternVL", "options": {"max_tiles": 3}}')
    assert problems("--config", root / "config.json") == [
        f"--config {root / 'config.json'} is of a run of InternVL, and this is the command of Mistral; use "
        "InternVL/model_merging.py, or name the options that you want in a file of your own"
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- 1", r"--config {file} must hold options by name, such as 'method: expert_merging'"),
        ("", r"--config {file} must hold options by name, such as 'method: expert_merging'"),
        ("a: [1", r"--config {file} is neither YAML nor JSON: while parsing .*"),
        (b"\xff\xfe\xfa", r"--config: {file} is no text in UTF-8; write options in YAML or JSON"),
        ("[" * 100_000, r"--config {file} is neither YAML nor JSON: nested too deeply"),
        ("a: &a [1]\nb: *a", r"--config {file} is neither YAML nor JSON: it has references .*; write out what .*"),
        ("seed: !!set {1}", r"--config {file} is neither YAML nor JSON: could not determine a constructor .*"),
        ("seed: 2020-01-01", r"--seed must be .*, got '?2020-01-01'?"),
        ('a: "\\ud800"', r"--config {file} is neither YAML nor JSON: half a character, '\\ud800'"),
        ("x" * 300_000, r"--config {file} is neither YAML nor JSON: more than 256 KiB of YAML"),
        ("sede: 1", r"{file}: no option 'sede'\. Did you mean 'seed'\?"),
        ("options: {a: 1}", r"{file}: no option 'a'\. .*"),
    ],
)
def test_configuration_files_that_cannot_be_used(root, text, problem):
    file = root / "options.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    (found,) = problems("--config", file)
    assert re.fullmatch(problem.format(file=re.escape(str(file))), found)


def test_a_configuration_file_that_is_not_there(root):
    assert problems("--config", root / "no.yaml") == [
        f"--config: {root / 'no.yaml'} cannot be read (No such file or directory)"
    ]
    assert problems("--config", root) == [f"--config: {root} cannot be read (Is a directory)"]


def test_all_unknown_names_of_a_configuration_file_are_reported(root):
    (root / "file").write_text("metod: a\nsede: 2\nseed: 1\n")
    assert [line.split(": ")[1] for line in problems("--config", root / "file")] == [
        "no option 'metod'. Did you mean 'method'?",
        "no option 'sede'. Did you mean 'seed'?",
    ]


def test_unknown_flags_are_answered_with_the_near_name():
    assert problems("--scaling-coeficient", "1", "--sede=3") == [
        "no flag --scaling_coeficient. Did you mean '--scaling_coefficient'?",
        "no flag --sede. Did you mean '--seed'?",
    ]
    (unknown,) = problems("--zzzqqq", "1")
    assert unknown.startswith("no flag --zzzqqq. Known: --ace_ridge, --adapter_weights, --aim_omega, ")
    assert problems("--listmethods") == ["no flag --listmethods. Did you mean '--list_methods'?"]


def test_flags_are_not_abbreviated():
    assert problems("--scaling", "1") == ["no flag --scaling. Did you mean '--scaling_coefficient'?"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["stray"], "unexpected argument 'stray'; --help shows all options"),
        (["-m", "ties"], "unexpected argument '-m'; --help shows all options"),
        (["--seed"], "argument --seed: expected 1 argument; --help shows all options"),
        (
            ["--exclude_params"],
            "argument --exclude_params: expected at least one argument; --help shows all options",
        ),
        (
            ["--method", "task_arithmetic", "--scaling_coefficient", "1e300"],
            "--scaling_coefficient must be a number in [-1000, 1000], a list of them or a JSON object of them by "
            "expert, got 1e300",
        ),
        (
            ["--method", "dare_ta", "--scaling_coefficient", "0.3, -1001"],
            "--scaling_coefficient must be a number in [-1000, 1000], a list of them or a JSON object of them by "
            "expert, got 0.3, -1001",
        ),
        (
            ["--task_vector_coeffs_dict", '{"Chat": 1000, "Math": 1e4}'],
            "--task_vector_coeffs_dict must be a JSON object of numbers in [-1000, 1000] by name, "
            "got 10000.0 for 'Math'",
        ),
        (["--method", "task-arithmetik"], "no method named 'task-arithmetik'. Did you mean 'task_arithmetic'?"),
        (["--seed", "x"], "--seed must be a whole number, got x"),
    ],
)
def test_a_command_line_that_cannot_be_used(arguments, problem):
    assert problems(*arguments) == [problem]


def test_all_values_that_do_not_fit_are_reported_together():
    assert problems("--method", "expert_merging", "--seed", "x", "--num_epochs", "0", "--temperature", "cold") == [
        "--seed must be a whole number, got x",
        "--num_epochs must be a whole number in [1, inf), got 0",
        "--temperature must be a number in (0, inf), got cold",
    ]


def test_flags_of_other_methods_are_noted_and_not_even_read():
    both = resolved("--method", "weight_average", "--num_epochs", "0", "--loss_alphas", "{}")
    assert both.ignored == ("num_epochs", "loss_alphas")


def test_checkpoints_lie_under_the_published_names():
    base, experts = checkpoint_folders(general("--cache_dir", "/cache"), BACKBONE)
    assert str(base) == "/cache/Mistral-7B-v0.1"
    assert {name: str(folder) for name, folder in experts.items()} == {
        "Chat": "/cache/Mistral-7B-Instruct-v0.1",
        "Math": "/cache/MAmmoTH2-7B",
        "Code": "/cache/Mistral-7B-codealpaca-lora",
    }


def test_given_experts_replace_the_family_s():
    base, experts = checkpoint_folders(general("--cache_dir", "/cache", "--expert", "Z=/z"), BACKBONE)
    assert str(base) == "/cache/Mistral-7B-v0.1"
    assert {name: str(folder) for name, folder in experts.items()} == {"Z": "/z"}
    base, _ = checkpoint_folders(general("--base_model_path", "/b", "--expert", "Z=/z"), BACKBONE)
    assert str(base) == "/b"


@pytest.mark.parametrize("arguments", [[], ["--base_model_path", "/b"], ["--expert", "A=/a"]])
def test_without_checkpoints_the_command_says_how_to_give_them(arguments):
    with pytest.raises(InputError) as caught:
        checkpoint_folders(general(*arguments), BACKBONE)
    assert str(caught.value) == (
        "where are the checkpoints? Give --cache_dir DIR (or CACHE_DIR in the environment or in .env), or "
        "--base_model_path PATH and --expert NAME=PATH for each expert"
    )


@pytest.mark.parametrize(
    "name",
    ["", " ", "base", ".", "..", "a/b", "../../evil", "/tmp/x", "x/", "a\0b", "a\nb", "\udcff", "n" * 201, "ü" * 101],
    ids=ascii,
)
def test_an_expert_needs_a_name_of_its_own_that_a_file_can_have(name):
    problem = (
        f"an expert cannot be called {name!r}; choose another NAME in --expert NAME=PATH, one that can be a file's and "
        "is not base"
    )
    with pytest.raises(InputError, match=f"^{re.escape(problem)}$"):
        checkpoint_folders(general("--cache_dir", "/c", "--expert", json.dumps({name: "/a", "A": "/b"})), BACKBONE)


@pytest.mark.parametrize("value", [None, "text", 0.3, [1, 2], {"a": 1}, True])
def test_values_are_shown_as_they_would_be_given(value):
    shown = show(value)
    assert shown == "none" if value is None else shown == value or json.loads(shown) == value


def test_help_says_what_an_option_takes_for_all_its_methods():
    text = " ".join(build_parser(BACKBONE).format_help().split())
    for meaning in (
        "factor on the average task vector",
        "factor on each task vector",
        "initial value of the coefficients",
    ):
        assert text.count(meaning) == 1
    assert re.search(
        r"or a JSON object of them by expert\. Default: 1\.0 \(weight_average.*\), 0\.3 \(task_arithmetic",
        text,
    )
    assert "Takes a whole number in [1, inf). Default: 5 (aim, " in text
    assert "Chat=Mistral-7B-Instruct-v0.1" in text
    assert "Default: .*lm_head.* .*norm.* .*embed_tokens.* .*bias.*." in text


def test_help_says_which_methods_have_an_option_and_what_it_is_without_a_value():
    text = " ".join(build_parser(FAMILY).format_help().split())
    assert "Takes a number in (0, 1]. Default: 0.2 (ties, dare_ties," in text
    assert "Default: 1/experts." in text
    assert "Default: adam (wudi, doge_ta), by variant (wudi2)." in text
    assert "Default: 1e-05 (wudi), by solver (wudi2)" in text
    assert "TASK.json. Default: dataset/ at the repository root." in text
    assert "Samples per update. Takes" in text, "what all methods that learn have names none of them"
    assert "options of Mistral, for methods that read samples and --run_tests:" in text
    # Of a mixture's options, which take the word none.
    assert text.count("Default: none") == text.count("or 'base'. Default: none")


def encode(processor, sample, template, *, max_tiles: int = 6, words: dict[str, int] | None = None):
    """Encode.

    Args:
        processor: a processor.
        sample: a sample.
        template: a template.
        max_tiles: tiles of a picture.
        words: words by task.
    """
    return processor, sample, template, max_tiles, words


FAMILY = replace(BACKBONE, encode_prompt=encode)


def family_resolved(*arguments):
    return resolve(parse(arguments, FAMILY), {}, FAMILY)


def test_a_family_has_flags_of_its_own():
    found = family_resolved("--max-tiles", "12", "--words", "Chart=3")
    assert found.family == {"max_tiles": 12, "words": {"Chart": 3}}
    assert not found.ignored
    assert family_resolved().family == {"max_tiles": 6, "words": None}
    assert FAMILY.configured(found.family).encode_prompt(1, 2, 3) == (1, 2, 3, 12, {"Chart": 3})
    help_text = " ".join(build_parser(FAMILY).format_help().split())
    assert "Tiles of a picture. Takes a whole number. Default: 6." in help_text


def test_flags_of_a_family_are_for_methods_that_read_samples(root):
    assert family_resolved("--method", "ties", "--max_tiles", "2").ignored == ("max_tiles",)
    assert family_resolved("--method", "ties", "--max_tiles", "2", "--run_tests").family["max_tiles"] == 2
    (root / "c.yaml").write_text("max_tiles: 3")
    assert family_resolved("--config", str(root / "c.yaml")).family["max_tiles"] == 3
    with pytest.raises(InputError, match=r"--max_tiles must be a whole number, got many"):
        family_resolved("--max_tiles", "many")
    with pytest.raises(InputError, match=r"no flag --max_tile\. Did you mean '--max_tiles'\?"):
        family_resolved("--max_tile", "1")
    with pytest.raises(InputError, match="no flag --max_tiles"):
        parse(["--max_tiles", "1"], BACKBONE)


def test_tasks_that_an_option_of_the_family_names_must_be_there(root):
    (root / "dataset").mkdir()
    for task in ("Chart", "OCR"):
        (root / "dataset" / f"{task}.json").write_text("[]")
    with pytest.raises(InputError) as caught:
        family_resolved("--words", "Chart=3", "--words", "chart=3", "--words", "Nope=3")
    assert list(caught.value.problems) == [
        f"--words names the task 'chart', which {root / 'dataset'} has no file for. Did you mean 'Chart'?",
        f"--words names the task 'Nope', which {root / 'dataset'} has no file for. Known: Chart, OCR.",
    ]
    assert family_resolved("--words", "Chart=3").family["words"] == {"Chart": 3}


def test_a_configuration_file_may_serve_several_methods(root):
    (root / "c.yaml").write_text("density: 0.5\nbudget: 8")
    assert resolved("--method", "ties", "--config", root / "c.yaml").ignored == ()
    assert resolved("--method", "ties", "--config", root / "c.yaml", "--kappa", "1").ignored == ("kappa",)
    assert resolved("--method", "ties", "--config", root / "c.yaml").options["density"] == 0.5
