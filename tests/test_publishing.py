"""A complete model is put into a repository of the Hub, with what was measured in its card."""

from __future__ import annotations

import json

import pytest
import yaml
from huggingface_hub import HfApi, constants

from expert_merging.card import CARD
from expert_merging.comparing.scores_file import Scores, SetScore, TaskScore, add_scores
from expert_merging.publishing import published_card
from tests.command import contents, merge, merged, refusal, snapshot
from tests.hub import serving

NAME = "someone/merged"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that knows the user."""
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with serving(monkeypatch, tmp_path / "cache") as server:
        monkeypatch.setattr(HfApi, "whoami", whoami_once(server))
        server.user = {"name": "someone", "orgs": [{"name": "lab"}], "type": "user", "auth": {}}
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", server.url)
        yield server


def whoami_once(server):
    """The library's own, which goes by the address that it was imported with."""
    original = HfApi.whoami

    def whoami(self, **options):
        self.endpoint = server.url
        return original(self, **options)

    return whoami


def front_of(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_a_model_is_published_as_it_is_and_privately(hub, command, tmp_path, capsys):
    run = merged(tmp_path / "out", *command, "--push_to_hub", NAME)
    assert hub.made[NAME]["visibility"] == "private"
    sent = hub.received[NAME]
    assert {name: content for name, content in sent.items() if name != CARD} == {
        name: content for name, content in contents(run.model).items() if name != CARD
    }
    assert "# Mistral-A_B" in sent[CARD].decode()
    assert f"published:    {hub.url}/{NAME}" in capsys.readouterr().out


def test_a_complete_run_is_published_with_its_scores_and_stays_as_it_is(hub, command, tmp_path):
    run = merged(tmp_path / "out", *command)
    tasks = {"Math": TaskScore(61.5, 57.0, 66.0, 200), "Law": TaskScore(40.0)}
    add_scores(run.scores, Scores({"quiz one": SetScore(tasks)}))
    before = snapshot(run.model)
    assert merge(*command, "--push_to_hub", NAME) == 0
    assert snapshot(run.model) == before
    card = hub.received[NAME][CARD].decode()
    assert "| quiz one | Math | 61.5 | 57.0 to 66.0 | 200 |\n| quiz one | Law | 40.0 |  |  |\n" in card
    assert "| quiz one | mean | 50.8 | | |" in card
    (index,) = front_of(card)["model-index"]
    assert index["name"] == run.name
    found = {result["dataset"]["name"]: result["metrics"][0] for result in index["results"]}
    assert found["quiz one: Math"] == {"type": "exact_match", "value": 61.5}
    assert {result["dataset"]["type"] for result in index["results"]} == {"quiz-one"}


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(hub, command, tmp_path, capsys):
    before = snapshot(tmp_path)
    assert merge(*command, "--push_to_hub", NAME, "--dry_run") == 0
    assert f"in {hub.url}/{NAME}, which is made, as a private one" in capsys.readouterr().out
    hub.add(NAME, tmp_path / "a")
    assert merge(*command, "--push_to_hub", NAME, "--dry_run") == 0
    assert "which exists: files of the same names are replaced" in capsys.readouterr().out
    assert (hub.made, hub.received) == ({}, {})
    assert snapshot(tmp_path) == before


def test_where_a_model_is_published_decides_nothing(hub, command, tmp_path):
    run = merged(tmp_path / "out", *command, "--push_to_hub", "lab/merged")
    assert merged(tmp_path / "out", *command).folder == run.folder
    assert "push_to_hub" not in json.loads(run.config.read_text())["options"]


def test_a_repository_that_is_there_is_used(hub, command, tmp_path):
    hub.add(NAME, tmp_path / "a")
    assert merge(*command, "--push_to_hub", NAME) == 0
    assert NAME in hub.received
    assert not hub.made


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("merged", "--push_to_hub takes ORGANISATION/NAME, got 'merged'"),
        ("a/b@main", "--push_to_hub takes ORGANISATION/NAME, got 'a/b@main'"),
        ("other/x", "--push_to_hub other/x: you are someone there, and may write to someone, lab"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_before_anything_is_done(hub, command, tmp_path, capsys, name, message):
    assert refusal(capsys, *command, "--push_to_hub", name) == message
    assert not (tmp_path / "out").exists()


def test_several_models_are_not_published(hub, command, capsys):
    assert refusal(capsys, *command, "--method", "svd_intermediate", "--push_to_hub", NAME) == (
        "--push_to_hub publishes one model, and svd_intermediate leaves several; publish each with `hf upload`"
    )


def test_a_user_who_is_not_logged_in_is_told(hub, command, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert refusal(capsys, *command, "--push_to_hub", NAME) == (
        f"--push_to_hub {NAME} needs `hf auth login`, or a token in HF_TOKEN that may write"
    )


def test_a_token_that_is_not_known_is_told(hub, command, capsys):
    hub.user = None
    assert refusal(capsys, *command, "--push_to_hub", NAME).startswith(f"--push_to_hub {NAME}: the Hub refuses: ")


def test_a_hub_that_may_not_be_asked_is_told(hub, command, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(capsys, *command, "--push_to_hub", NAME) == (
        f"--push_to_hub {NAME}: HF_HUB_OFFLINE forbids to ask the Hub"
    )


def test_a_card_that_the_hub_does_not_take_is_told_and_the_model_is_complete(hub, command, tmp_path, capsys):
    hub.refused = "license is unknown"
    assert refusal(capsys, *command, "--push_to_hub", NAME).startswith(
        f"--push_to_hub {NAME}: the Hub does not take the card: "
    )
    assert [folder.name for folder in (tmp_path / "out").glob("*/*/model")] == ["model"]


def test_a_hub_that_does_not_answer_is_told(hub, command, capsys, monkeypatch):
    from expert_merging.checkpoints.hub import network_error

    def fail(*_arguments, **_options):
        raise network_error()("no route")

    monkeypatch.setattr(HfApi, "whoami", fail)
    assert refusal(capsys, *command, "--push_to_hub", NAME) == (
        f"--push_to_hub {NAME}: the Hub cannot be reached (no route); the same command publishes a complete run"
    )


CARD_TEXT = (
    "---\nlibrary_name: transformers\nbase_model:\n- org/base\n- my-folder\nbase_model_relation: merge\n---\n# T\n"
)


def test_a_number_of_which_the_lower_is_better_says_so():
    texts = SetScore({"A": TaskScore(1.234)}, "bits_per_byte", higher_is_better=False)
    card = published_card(CARD_TEXT + "\n## Options\n", "t", Scores({"general": texts}))
    assert "| set | task | bits_per_byte, lower is better | " in card
    assert card.count("| 1.234 |") == 2


def test_sources_that_are_no_repositories_are_left_out_of_what_the_hub_links():
    assert front_of(published_card(CARD_TEXT, "t", Scores()))["base_model"] == ["org/base"]
    front = front_of(published_card(CARD_TEXT.replace("org/base", "base"), "t", Scores()))
    assert not {"base_model", "base_model_relation"} & set(front)
