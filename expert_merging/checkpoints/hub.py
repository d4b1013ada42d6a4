"""Repositories of the Hugging Face Hub, and its cache on this machine.

Of a repository, what a merge reads is downloaded: its safetensors files and small files. Nothing of it is executed. The
library `huggingface_hub` does the work, with its own settings (``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_TOKEN`` ...).
"""

from __future__ import annotations

import glob
import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expert_merging.checkpoints.folders import ADAPTER, chosen_weights, is_pickle, is_weights, pickled
from expert_merging.checkpoints.other_files import is_kept_back
from expert_merging.documents import read_object, read_text
from expert_merging.errors import InputError, first_line
from expert_merging.machine import show_size
from expert_merging.processes import is_main_process

logger = logging.getLogger(__name__)

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w][\w./-]*))?", re.ASCII)
_SMALL = 100_000_000  # bytes; the largest tokenizers have 40 MB
_OF_SERVER = 500  # HTTP's answers from here on say that the server failed


@dataclass(frozen=True)
class Repository:
    """A repository by its name.

    Args:
        name: ``organisation/name``.
        revision: branch, tag or commit; None for its main branch.
    """

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit, or what of it is in the cache.

    Args:
        repository: what was asked for.
        folder: where its files are, or will be.
        files: bytes of the files that are wanted, by name; empty if the Hub was not asked.
    """

    repository: Repository
    folder: Path
    files: Mapping[str, int] = field(default_factory=dict)

    @property
    def missing(self) -> dict[str, int]:
        """The wanted files that are not in the cache."""
        return {name: size for name, size in self.files.items() if not (self.folder / name).exists()}


def read_id(text: str) -> Repository | None:
    """The repository that a text may name, as ``organisation/name`` or ``organisation/name@revision``."""
    match = _ID.fullmatch(text)
    return match and Repository(*match.groups())


def cache_folder(name: str) -> str:
    """What the cache calls the folder of a repository."""
    return f"models--{name.replace('/', '--')}"


def cached_snapshot(folder: Path, revision: str = "main") -> Path | None:
    """The snapshot in a cache's folder ``models--organisation--name``; None if the revision is not there."""
    reference = folder / "refs" / revision
    commit = read_text(reference).strip() if reference.is_file() else revision
    found = folder / "snapshots" / commit
    return found if found.is_dir() else None


def look_up(repository: Repository, *, pickles: bool) -> Snapshot:
    """Ask the Hub for a repository; where it cannot be reached, look into the cache.

    Args:
        repository: what to look for.
        pickles: pickle files are wanted instead of safetensors files.

    Raises:
        InputError: there is no such repository or revision, it cannot be read, or it has no weights that are wanted.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        api = HfApi()
        info = api.model_info(repository.name, revision=repository.revision, files_metadata=True)
        if info.gated:  # everybody may read what it has, but not download it
            api.auth_check(repository.name)
    except HFValidationError as error:
        raise InputError(f"{repository} is no folder here and no name of a repository: {first_line(error)}") from None
    except OfflineModeIsEnabled:
        return _in_cache(repository, _absence(repository, "HF_HUB_OFFLINE forbids to ask the Hub"))
    except HfHubHTTPError as error:
        fails = error.response.status_code >= _OF_SERVER
        refusal = _absence(repository, _unreachable(error)) if fails else _refusal(repository, error)
        return _in_cache(repository, refusal)
    except network_error() as error:
        return _in_cache(repository, _absence(repository, _unreachable(error)))
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    folder = cache() / cache_folder(repository.name) / "snapshots" / str(info.sha)
    return Snapshot(repository, folder, _wanted(repository, sizes, pickles=pickles))


def configuration_of(repository: Repository) -> dict[str, Any]:
    """``config.json`` of a repository, from the cache where the Hub cannot be reached.

    Raises:
        InputError: there is none that can be read.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return read_object(Path(hf_hub_download(repository.name, "config.json", revision=repository.revision)))
    except HFValidationError as error:
        raise InputError(f"{repository} is no folder here and no name of a repository: {first_line(error)}") from None
    except LocalEntryNotFoundError as error:
        raise InputError(_absence(repository, _unreachable(error))) from None
    except HfHubHTTPError as error:
        raise InputError(_refusal(repository, error)) from None
    except network_error() as error:
        raise InputError(_absence(repository, _unreachable(error))) from None


def _in_cache(repository: Repository, problem: str) -> Snapshot:
    """What an earlier download has left.

    Raises:
        InputError: it has left nothing; ``problem`` says why the Hub has not given it.
    """
    found = cached_snapshot(cache() / cache_folder(repository.name), repository.revision or "main")
    if found is None:
        raise InputError(problem)
    logger.info("%s is taken from the Hub's cache, without asking whether it is the newest: %s", repository, found)
    return Snapshot(repository, found)


def _absence(repository: Repository, reason: str) -> str:
    return f"{repository} is no folder here and not in the Hub's cache ({cache()}), and {reason}"


def download(snapshot: Snapshot) -> Path:
    """Download what is missing of a snapshot; what is there already is not sent again.

    Returns:
        Its folder.

    Raises:
        InputError: the Hub cannot be reached any more, or refuses.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    repository, sizes = snapshot.repository, snapshot.missing
    if sizes:
        size = show_size(sum(sizes.values()))
        logger.info("downloading %s: %d files of %s in %s", repository, len(sizes), size, snapshot.folder)
    if not (sys.stderr.isatty() and is_main_process()):
        disable_progress_bars()
    patterns = [glob.escape(name) for name in snapshot.files]
    try:
        return Path(snapshot_download(repository.name, revision=repository.revision, allow_patterns=patterns))
    except HfHubHTTPError as error:
        raise InputError(_refusal(repository, error)) from None
    except (network_error(), LocalEntryNotFoundError, RuntimeError) as error:  # the last as hf_xet, in Rust, tells it
        raise InputError(
            f"{repository} is not complete: {_unreachable(error)}; the same command continues the download"
        ) from None


def cache() -> Path:
    """The Hub's cache on this machine."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def network_error() -> type[Exception]:
    """What the library raises when a server does not answer, whichever HTTP client it has."""
    from huggingface_hub import errors

    return errors.HTTPError  # type: ignore[attr-defined]


def _unreachable(error: Exception) -> str:
    return f"the Hub cannot be reached ({first_line(error)})"


def _refusal(repository: Repository, error: Exception) -> str:
    """What an answer of the Hub means, in a sentence."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page = f"{constants.ENDPOINT}/{repository.name}"
    if isinstance(error, GatedRepoError):
        return f"{repository.name} is gated: accept its terms at {page}, then `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"{repository.name} has no revision {repository.revision!r}; {page}/tree/main lists branches and tags"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{repository.name} is neither a folder here nor a repository that can be read on the Hub ({page}); is the "
            "name right? A private one needs `hf auth login`"
        )
    return f"the Hub refuses {repository}: {first_line(error)}"


def _wanted(repository: Repository, sizes: Mapping[str, int], *, pickles: bool) -> dict[str, int]:
    """The files to download: safetensors files, or pickle files instead, and small files that are no weights.

    Raises:
        InputError: there are no such weights.
    """
    names = [name for name in sizes if "/" not in name]
    of_pickles = [name for name in names if is_pickle(name)]
    safetensors = [*chosen_weights(names), *({ADAPTER} & set(names))]
    if pickles and safetensors:
        raise InputError(f"{repository} has safetensors files already, which are read; there is nothing to convert")
    weights = of_pickles if pickles else safetensors
    indexes = [name for name in names if name.endswith(".index.json") and (".bin" in name) == pickles]
    if not weights:
        if of_pickles and not pickles:
            raise InputError(pickled(str(repository), of_pickles[0]))
        others = [name for name in sizes if is_weights(name)]
        there = f"; it has {', '.join(others[:3])}" if others else ""
        raise InputError(f"{repository} has no {'pickle' if pickles else 'safetensors'} files of a model{there}")
    others = [
        name
        for name, size in sizes.items()
        if size <= _SMALL and not any(is_weights(part) or is_kept_back(part) for part in name.split("/"))
    ]
    return {name: sizes[name] for name in sorted({*weights, *indexes, *others})}
