"""``--push_to_hub``: the complete model in a repository of the Hugging Face Hub, with its scores in the card.

The run's own files stay as they are. What is sent is what is there, but for the card, which then also says what has
been measured of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from expert_merging.card import CARD, inline
from expert_merging.checkpoints.hub import network_error, read_id
from expert_merging.checks import Job
from expert_merging.comparing.scores_file import Scores, SetScore, read_scores
from expert_merging.errors import InputError, first_line
from expert_merging.machine import show_size
from expert_merging.run import Run

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

_SCORES = "## Scores\n\n| set | task | {metric} | 95 % interval | questions |\n|---|---|---:|---|---:|\n"
_BEFORE = "\n## Options\n"


def check_publication(job: Job) -> tuple[str, ...]:
    """Check that the model may be published, before anything is merged.

    Returns:
        What will be done, for the plan; nothing where it is not to be published.

    Raises:
        InputError: the name is none, the Hub cannot be reached or does not know the user, or the run leaves several
            models.
    """
    name = job.resolved.general["push_to_hub"]
    if not name:
        return ()
    if len(job.models) != 1 or job.context.run.holds_several:
        raise InputError(
            f"--push_to_hub publishes one model, and {job.resolved.method.name} leaves "
            f"{'several; publish each' if job.models else 'none here; publish its adapter'} with `hf upload`"
        )
    repository = read_id(name)
    if repository is None or repository.revision:
        raise InputError(f"--push_to_hub takes ORGANISATION/NAME, got {name!r}")
    with _telling(name):
        from huggingface_hub import HfApi

        api = HfApi()
        _check_owner(name, api.whoami())
        exists = api.repo_exists(name)
    size = show_size(sum(output.size for output in job.outputs))
    there = "which exists: files of the same names are replaced" if exists else "which is made, as a private one"
    return (f"publishes about {size} in {_page(api, name)}, {there}",)


def publish(run: Run, name: str) -> None:
    """Send a complete model.

    Raises:
        InputError: the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    card = published_card((run.model / CARD).read_text(encoding="utf-8"), run.name, read_scores(run.scores))
    files = sorted(file for file in run.model.rglob("*") if file.is_file() and file != run.model / CARD)
    additions = [CommitOperationAdd(file.relative_to(run.model).as_posix(), str(file)) for file in files]
    additions.append(CommitOperationAdd(CARD, card.encode()))
    api = HfApi()
    with _telling(name):
        api.create_repo(name, private=True, exist_ok=True)
        api.create_commit(name, additions, commit_message=f"{run.method}: {run.name}")
    logger.info("published:    %s", _page(api, name))


def published_card(text: str, title: str, scores: Scores) -> str:
    """A model's card as it is published: with what was measured, and of its sources those that are on the Hub.

    Args:
        text: the card in the model's folder.
        title: what the model is called.
        scores: what was measured.
    """
    from huggingface_hub import EvalResult, ModelCard

    card = ModelCard(text)
    data: Any = card.data
    named = data.get("base_model") or []
    known = [name for name in ([named] if isinstance(named, str) else named) if _is_on_hub(name)]
    data.base_model = known or None
    if not known:
        data.pop("base_model_relation", None)
    if not scores.sets:
        return str(card)
    kind = data.get("pipeline_tag", "text-generation")
    data.model_name = title
    data.eval_results = [
        EvalResult(kind, _identifier(name), f"{name}: {task}", one.metric, score.mean)
        for name, one in scores.sets.items()
        for task, score in one.tasks.items()
    ]
    tables = "\n".join(_table(name, one) for name, one in scores.sets.items())
    return str(card).replace(_BEFORE, f"\n{tables}{_BEFORE}", 1)


def _table(name: str, scores: SetScore) -> str:
    """The scores of a set, in Markdown."""
    lines = []
    for task, score in scores.tasks.items():
        ends = (
            "" if score.low is None or score.high is None else f"{scores.show(score.low)} to {scores.show(score.high)}"
        )
        lines.append(
            f"| {inline(name)} | {inline(task)} | {scores.show(score.mean)} | {ends} | {score.count or ''} |\n"
        )
    lines.append(f"| {inline(name)} | mean | {scores.show(scores.mean)} | | |\n")
    metric = scores.metric if scores.higher_is_better else f"{scores.metric}, lower is better"
    return _SCORES.format(metric=inline(metric)) + "".join(lines)


def _identifier(name: str) -> str:
    """What the Hub may take for a data set's name."""
    return "-".join("".join(sign if sign.isalnum() else " " for sign in name).split()).lower() or "questions"


def _is_on_hub(name: Any) -> bool:
    """Whether a source's name is a repository's; a folder's name is not."""
    return isinstance(name, str) and name.count("/") == 1 and not name.startswith(("/", "."))


def _page(api: HfApi, name: str) -> str:
    return f"{api.endpoint}/{name}"


def _check_owner(name: str, user: dict[str, Any]) -> None:
    """Check that the user may write where the repository is.

    Raises:
        InputError: the owner is somebody else.
    """
    owner = name.split("/")[0]
    allowed = [user["name"], *(organisation["name"] for organisation in user.get("orgs", ()))]
    if owner not in allowed:
        raise InputError(f"--push_to_hub {name}: you are {user['name']} there, and may write to {', '.join(allowed)}")


@contextmanager
def _telling(name: str) -> Iterator[None]:
    """Say what an error of the Hub's means.

    Raises:
        InputError: instead of the library's own errors.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError:
        raise InputError(f"--push_to_hub {name} needs `hf auth login`, or a token in HF_TOKEN that may write") from None
    except OfflineModeIsEnabled:
        raise InputError(f"--push_to_hub {name}: HF_HUB_OFFLINE forbids to ask the Hub") from None
    except HfHubHTTPError as error:
        raise InputError(f"--push_to_hub {name}: the Hub refuses: {first_line(error)}") from None
    except network_error() as error:
        raise InputError(
            f"--push_to_hub {name}: the Hub cannot be reached ({first_line(error)}); the same command publishes a "
            "complete run"
        ) from None
    except ValueError as error:  # the Hub's check of the card
        raise InputError(f"--push_to_hub {name}: the Hub does not take the card: {first_line(error)}") from None
