"""From what the user names to the folder of a checkpoint.

A folder that exists is meant before anything else. It may be a run, of which its model is meant, or a repository's
folder in the Hub's cache, of which its newest snapshot is. What does not exist may be a repository on the Hub.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path

from expert_merging.checkpoints.folders import origin
from expert_merging.checkpoints.hub import (
    Snapshot,
    cache,
    cache_folder,
    cached_snapshot,
    download,
    look_up,
    read_id,
)
from expert_merging.errors import InputError, Problems
from expert_merging.machine import show_size
from expert_merging.run import Run
from expert_merging.writing import check_free_disk

_BASE = "base"  # no expert is called so


def locate_all(base: Path, experts: Mapping[str, Path], *, dry_run: bool = False) -> tuple[Path, dict[str, Path]]:
    """The folders of a base and its experts; repositories are downloaded.

    Args:
        base: a path, or a repository's id.
        experts: the same by name.
        dry_run: download nothing.

    Raises:
        InputError: every name that is neither a folder nor a repository that can be read; a dry run that needs a
            download.
    """
    found = _locate({_BASE: base, **experts}, dry_run=dry_run)
    return found.pop(_BASE), found


def locate(place: Path, *, pickles: bool = False) -> Path:
    """The folder of one checkpoint; a repository is downloaded.

    Args:
        place: a path, or a repository's id.
        pickles: of a repository, pickle files are wanted instead of safetensors files.

    Raises:
        InputError: it is neither a folder nor a repository that can be read.
    """
    return _locate({"": place}, pickles=pickles)[""]


def below(folder: Path, path: str, published: str | None) -> Path:
    """Where a checkpoint lies below another folder: under its own name, or under the one that its family published.

    Args:
        folder: the other folder.
        path: the checkpoint's old place, or a repository's id.
        published: the family's name of its folder.
    """
    snapshot, repository = origin(path), read_id(path)
    hub = snapshot[0] if snapshot else repository.name if repository else None
    names = [Path(hub).name, cache_folder(hub)] if hub else [Path(path).name]
    there = [folder / name for name in (*names, published) if name]
    return next((place for place in there if place.is_dir()), there[0])


def _locate(places: Mapping[str, Path], *, dry_run: bool = False, pickles: bool = False) -> dict[str, Path]:
    problems, on_disk, snapshots = Problems(), dict[str, Path](), dict[str, Snapshot]()
    for name, place in places.items():
        repository = read_id(str(place))
        with problems.collecting():
            if repository is None or place.exists():
                on_disk[name] = _on_disk(place)
            else:
                snapshots[name] = look_up(repository, pickles=pickles)
    if len(on_disk) < len(places):  # nothing is downloaded in vain
        for folder in on_disk.values():
            if not folder.exists():
                problems.add(f"checkpoint folder {folder} does not exist")
        with problems.collecting():
            _check_downloads(list(snapshots.values()), dry_run=dry_run)
    problems.check()
    downloaded = {
        name: download(snapshot) if snapshot.files and not dry_run else snapshot.folder
        for name, snapshot in snapshots.items()
    }
    return {name: {**on_disk, **downloaded}[name] for name in places}


def _check_downloads(snapshots: list[Snapshot], *, dry_run: bool) -> None:
    """Check that what is missing may be downloaded, and that there is room for it."""
    missing = {snapshot.repository: snapshot.missing for snapshot in snapshots if snapshot.missing}
    if missing:
        needed = sum(sum(sizes.values()) for sizes in missing.values())
        check_free_disk(cache(), needed, flag="HF_HOME", what="the download from the Hub needs")
    if dry_run and missing:
        raise InputError(
            *(
                f"--dry_run downloads nothing, and {repository} is not in the Hub's cache: {len(sizes)} files of "
                f"{show_size(sum(sizes.values()))} are missing"
                for repository, sizes in missing.items()
            )
        )


def _on_disk(place: Path) -> Path:
    """What a path means."""
    if place.exists():
        if (place / "snapshots").is_dir():
            return _newest(place)
        return _model_of(Run(place)) if Run(place).record is not None else place
    cached, snapshot = cached_beside(place), origin(place)
    if cached is not None:
        return _newest(cached)
    if snapshot is not None:
        name, commit = snapshot
        raise InputError(
            f"{place} is gone from the Hub's cache; `hf download {name} --revision {commit}` brings it back"
        )
    return place


def cached_beside(place: Path) -> Path | None:
    """The folder of a repository that the Hub's cache has under a longer name, ``models--organisation--name``.

    Raises:
        InputError: several organisations have one of that name.
    """
    found = sorted(place.parent.glob(f"models--*--{glob.escape(place.name)}"))
    if len(found) > 1:
        names = " and ".join(folder.name for folder in found)
        raise InputError(f"{place} may be {names}; give the one that is meant")
    return found[0] if found else None


def _newest(cached: Path) -> Path:
    """The snapshot that a repository's folder in the cache stands for."""
    snapshots = sorted((cached / "snapshots").iterdir())
    found = cached_snapshot(cached) or (snapshots[0] if len(snapshots) == 1 else None)
    if found is None:
        names = f"; give one of {', '.join(map(str, snapshots))}" if snapshots else "; download it again"
        raise InputError(f"{cached} has no snapshot of the branch main{names}")
    return found


def _model_of(run: Run) -> Path:
    """The model that a run has left."""
    if run.is_complete:
        return run.model
    run.holds_several = True
    if run.is_complete:
        names = ", ".join(str(folder) for folder in sorted(run.model.iterdir()))
        raise InputError(f"{run.folder} is a run that has left several models; give one of them: {names}")
    raise InputError(f"{run.folder} is a run that is not complete; its own command continues it")
