"""``expert-merging merge`` is the families' commands as one."""

from __future__ import annotations

import json
import re

import pytest

from expert_merging import options
from expert_merging.commands.main import main
from expert_merging.run import Run
from tests.checkpoints import write_checkpoint
from tests.command import TENSORS, contents, flags, merge


def run(*arguments):
    return main(["merge", *map(str, arguments)])


def shown(capsys, *arguments):
    capsys.readouterr()
    assert run(*arguments) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    capsys.readouterr()
    assert run(*arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


@pytest.mark.parametrize("form", [("task_arithmetic",), ("--method", "task_arithmetic"), ("task-arithmetic",)])
def test_it_leaves_what_the_family_s_command_leaves(tiny, tmp_path, form):
    assert merge(*tiny, "--output_path", tmp_path / "one", "--run_name", "r") == 0
    more = (*tiny[2:], "--output_path", tmp_path / "other", "--run_name", "r", "--device", "cpu")
    assert run(*form, *more) == 0
    one, other = (Run(tmp_path / name / "task_arithmetic" / "r") for name in ("one", "other"))
    assert contents(one.model) == contents(other.model)


def test_the_family_is_that_of_the_base_or_the_given_one(tmp_path):
    base = write_checkpoint(tmp_path / "base", TENSORS, config={"model_type": "qwen2_vl"})
    expert = write_checkpoint(tmp_path / "a", {name: tensor + 1 for name, tensor in TENSORS.items()})
    given = (*flags(base, A=expert), "--output_path", tmp_path / "out", "--device", "cpu")
    assert run("weight_average", *given, "--run_name", "found") == 0
    assert run("weight_average", *given, "--run_name", "given", "--family", "Mistral") == 0
    assert run("weight_average", "--family=InternVL", *given, "--run_name", "equals") == 0
    records = {
        name: json.loads((tmp_path / "out" / "weight_average" / name / "config.json").read_text())["family"]
        for name in ("found", "given", "equals")
    }
    assert run("weight_average", *given) == 0
    assert len(list((tmp_path / "out" / "weight_average").glob("Qwen*-A-????????"))) == 1  # named by its own defaults
    assert records == {"found": "Qwen2VL", "given": "Mistral", "equals": "InternVL"}


def test_help_of_a_method_has_its_flags_alone(capsys):
    text = shown(capsys, "ties", "--help")
    assert text.startswith("usage: expert-merging merge ties ")
    own = re.findall(r"^  --(\w+)", text.split("options of ties:")[1].split("what is merged:")[0], re.MULTILINE)
    assert own == ["density", "ties_scope", "ties_weights", "ties_normalize", "scaling_coefficient"]
    assert "(with " not in text
    assert "--num_epochs" not in text
    assert "--data_dir" not in text
    assert text == shown(capsys, "--method", "ties", "-h")


def test_help_of_a_method_that_reads_samples_has_their_flags(capsys):
    text = shown(capsys, "expert_merging", "--help")
    assert "--num_epochs" in text
    assert "--prompt_template" in text
    assert "--density" not in text


def test_help_has_the_defaults_of_the_family(capsys, tmp_path):
    def default(*arguments):
        text = " ".join(shown(capsys, "task_arithmetic", "--help", *arguments).split())
        return re.search(r"Factor on .*?Default: ([\d.]+)\.", text)[1], re.search(r"Defaults are those of (\w+)", text)[
            1
        ]

    assert default() == ("0.3", "Mistral")
    assert default("--family", "InternVL") == ("0.1", "InternVL")


def test_help_without_a_method_has_all_flags(capsys):
    text = shown(capsys, "--help")
    assert text.startswith("usage: expert-merging merge ")
    assert "--density" in text
    assert "--num_epochs" in text
    assert "METHOD --help shows the options of one method" in text


def test_methods_are_listed_without_a_base(capsys):
    assert "task_arithmetic" in shown(capsys, "--list_methods")


def test_it_must_stand_first(capsys):
    assert main(["--dry_run", "merge", "ties"]) == 1
    assert capsys.readouterr().err == (
        "error: merge must stand first: expert-merging merge ..., got --dry_run merge ties\n"
    )


def test_other_commands_are_not_for_several_processes_of_a_launcher(monkeypatch, capsys):
    """Each of them would do all of it, and write to the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for arguments, more in ((["verify", "x"], ""), (["sweep", "--sweep", "seed=1"], " and give --jobs N")):
        assert main(arguments) == 1
        assert capsys.readouterr().err == (
            f"error: {arguments[0]} is not for several processes of torchrun or accelerate launch; start one{more}\n"
        )


def test_a_method_that_is_none_is_answered_with_each_name_once(capsys):
    names = refused(capsys, "x").split("Known: ")[1].rstrip(".").split(", ")
    assert "ties" in names
    assert len(names) == len({*names})


def test_the_list_of_commands_has_it(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "merge experts of one base into one model" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("/usr/bin/expert-merging", "expert-merging merge"),
        ("/x/expert_merging/__main__.py", "python -m expert_merging merge"),
    ],
)
def test_the_record_has_the_command_as_it_can_be_typed_again(monkeypatch, program, words):
    monkeypatch.setattr("sys.argv", [program, "merge", "ties", "--run_name", "a b"])
    assert options.command_line() == f"{words} ties --run_name 'a b'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ties", "--method", "svd"), "the method is given twice: ties, and with --method; leave one out"),
        (("tise",), "no method named 'tise'. Did you mean 'ties'?"),
        (("tise", "--help"), "no method named 'tise'. Did you mean 'ties'?"),
        (("ties", "--family", "Llama"), "--family must be one of InternVL, Mistral, Qwen2VL, got Llama"),
        (("ties", "--family", "Mistral", "--densty", "1"), "no flag --densty. Did you mean '--density'?"),
    ],
)
def test_mistakes_are_told_in_a_line(capsys, arguments, message):
    assert refused(capsys, *arguments) == message


def test_without_checkpoints_it_says_what_to_give(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "ROOT", tmp_path)
    assert refused(capsys, "ties").startswith("which models are merged? Give --base_model_path PATH")
