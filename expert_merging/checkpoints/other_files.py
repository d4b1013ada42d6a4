"""What a checkpoint's folder has beside weights, as far as it is copied: nothing from elsewhere, and nothing private.

A folder may come from anywhere, and its copies are uploaded. So a link counts only if it stays inside the folder, or
leads to what the Hub's cache keeps of the same repository. Some names are never copied.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from expert_merging.checkpoints.folders import INDEX, is_of_trainer, is_pointer, is_weights, origin, pointer
from expert_merging.errors import InputError, first_of

# What tools leave in folders, which nobody misses.
_OF_TOOLS = frozenset(
    {".git", ".gitignore", ".cache", ".huggingface", ".msc", ".mdl", ".mv", ".ipynb_checkpoints", ".DS_Store"}
    | {"__pycache__", "runs", "wandb", "mlruns", "lightning_logs", "cache"}
)
# Hidden files (.env, .netrc, .ssh ...), keys, what lets somebody log in, and the states of optimizers.
_PRIVATE = re.compile(
    r"\.(?!gitattributes$).*|.*\.(env|pem|key|p8|p12|pfx|jks|keystore|ppk|kdbx|gpg|asc)|id_(rsa|dsa|ecdsa|ed25519).*"
    r"|(stored_)?tokens?|(credential|secret)s?(\..*)?|optimizer.*"
    r"|(.*[-_.])?(access|api|auth|deploy|private|secret|ssh)[-_]?(key|token)s?(\..*)?",
    re.IGNORECASE,
)
_OUT = "links to what lies outside of it, is private or weights"
_AGAIN = "links to folders that are copied already"
_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_SHOWN = 5
# Where transformers says that a model was loaded from.
_LOADED_FROM = re.compile(rb'"_?name_or_path"\s*:\s*"(/[^"]*)"')
_DEEPEST = 64
_SETTINGS_BYTES = 1_000_000  # more than any file of settings has

_Identity = tuple[int, int]


def is_kept_back(name: str) -> bool:
    """Whether a file or folder of that name is never copied: it is a tool's or a trainer's, or private."""
    return _is_of_tool(name) or bool(_PRIVATE.fullmatch(name))


def other_files(folder: Path) -> list[Path]:
    """Files of a checkpoint folder besides weights, relative to it: what loads and describes the model.

    Weights in other formats (or unused safetensors files) are left out: beside merged weights they would be the base's.

    Raises:
        InputError: its folders are deeper than those of any model.
    """
    return _Search(folder).files


def check_other_files(folder: Path) -> None:
    """Check that every other file can be copied.

    Raises:
        InputError: a link leads nowhere, as in a download cache that was cleaned up; a file stands for another; one
            that is needed lies elsewhere; something is no file at all.
    """
    search = _Search(folder)
    files = [folder / relative for relative in search.files]
    gone = [f"{file} is a link to a file that is gone; download it again" for file in files if not file.is_file()]
    pointers = [pointer(file) for file in files if file.is_file() and is_pointer(file)]
    problems = [*gone, *pointers, *_no_files(folder / relative for relative in search.special)]
    if Path("config.json") in search.links.get(_OUT, ()):
        problems.append(leads_out(folder / "config.json"))
    if problems:
        raise InputError(*problems)


def not_copied(folder: Path) -> list[str]:
    """Warnings of links that are not followed, and of names that are kept back."""
    search = _Search(folder)
    kinds = {**search.links, "private, by their names": search.private}
    return [
        f"not copied from {folder}, since they are {why}: {first_of(paths, _SHOWN)}; put copies into the merged folder "
        "if they belong there"
        for why, paths in kinds.items()
        if paths
    ]


def names_of_this_machine(folder: Path) -> list[str]:
    """A warning of settings that say where somebody works on this machine, such as where a model was loaded from."""
    home = os.path.join(os.path.expanduser("~"), "")
    settings = [relative for relative in other_files(folder) if relative.suffix == ".json"]
    small = [relative for relative in settings if (folder / relative).stat().st_size <= _SETTINGS_BYTES]
    contents = {relative: (folder / relative).read_bytes() for relative in small}
    told = [relative for relative, content in contents.items() if home != os.sep and home.encode() in content]
    loaded = {
        relative: found[1].decode(errors="replace")
        for relative, content in contents.items()
        if relative not in told and (found := _LOADED_FROM.search(content))
    }
    whose = f"of {folder} has places on this machine in it"
    advice = "copies have all that it has; take them out of the merged folder before you upload it"
    warnings = [f"{first_of(told, _SHOWN)} {whose} ({home}), and {advice}"] if told else []
    if loaded:
        warnings.append(f"{first_of([*loaded], _SHOWN)} {whose} ({next(iter(loaded.values()))}), and {advice}")
    return warnings


def check_inside(folder: Path, names: Iterable[str]) -> None:
    """Check that files of a folder that are to be copied do not lie elsewhere.

    Raises:
        InputError: some are links that lead out of the folder.
    """
    bounds = _bounds(folder)
    outside = [leads_out(folder / name) for name in names if not _stays(folder / name, bounds)]
    if outside:
        raise InputError(*outside)


def check_kinds(folder: Path) -> None:
    """Check that what lies in a folder are files and folders, which can be read without waiting for anybody.

    Raises:
        InputError: something is a pipe, a socket or a device.
    """
    problems = [*_no_files(folder / name for name in sorted(os.listdir(folder)) if not is_kept_back(name))]
    if problems:
        raise InputError(*problems)


def leads_out(file: Path) -> str:
    """What to do about a file that is needed and lies elsewhere."""
    return f"{file} is a link that leads out of its folder, and such links are not copied; put a copy in its place"


def _no_files(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        status = _status(path)
        kind = None if status is None else _KINDS.get(stat.S_IFMT(status.st_mode))
        if kind is not None:
            yield f"{path} is {kind}, not a file; remove it, or put a file in its place"


def _is_of_tool(name: str) -> bool:
    return name in _OF_TOOLS or is_of_trainer(name)


def _status(path: Path) -> os.stat_result | None:
    """What a path leads to; None for a link that leads nowhere."""
    try:
        return path.stat()
    except OSError:
        return None


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def _bounds(folder: Path) -> list[Path]:
    """The folder, and where the Hub's cache has the contents of a snapshot's files, without links."""
    real = Path(os.path.realpath(folder))
    snapshots = [place for place in (real, *real.parents) if origin(place)]
    return [real, *(place.parent.parent / "blobs" for place in snapshots)]


def _stays(path: Path, bounds: Iterable[Path]) -> bool:
    """Whether what a path leads to lies within the bounds, and is nothing that is left out there."""
    real = Path(os.path.realpath(path))
    inside = [real.relative_to(bound).parts for bound in bounds if real.is_relative_to(bound)]
    return any(not any(is_kept_back(name) or _is_left_out(name) for name in parts) for parts in inside)


def _is_left_out(name: str) -> bool:
    """Whether a file of that name is weights; the index of a model's own is none."""
    return is_weights(name) and name != INDEX


@dataclass
class _Search:
    """Looks through a folder, and through the links in it that stay there.

    Args:
        folder: the folder.

    Attributes:
        files: what is copied, relative to the folder; also links that lead nowhere.
        links: links that are not followed, by why.
        private: what is kept back for its name and may be missed.
        special: what is neither a file nor a folder.
    """

    folder: Path
    files: list[Path] = field(default_factory=list)
    links: dict[str, list[Path]] = field(default_factory=dict)
    private: list[Path] = field(default_factory=list)
    special: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._bounds = _bounds(self.folder)
        self._linked: set[_Identity] = set()  # folders that links have led to
        # Folders to look into, with the identities of those that each was reached through.
        waiting: list[tuple[Path, tuple[_Identity, ...]]] = [(Path(), ())]
        while waiting:
            here, above = waiting.pop()
            if len(above) > _DEEPEST:
                raise InputError(f"{self.folder} has folders in folders, more than {_DEEPEST} deep; move them away")
            chain = (*above, _identity((self.folder / here).stat()))
            names = sorted(os.listdir(self.folder / here))
            folders = [here / name for name in names if self._is_folder_to_enter(here / name, chain)]
            waiting += [(folder, chain) for folder in reversed(folders)]

    def _is_folder_to_enter(self, relative: Path, chain: tuple[_Identity, ...]) -> bool:
        """Whether it is a folder whose content counts; anything else is noted."""
        path, name = self.folder / relative, relative.name
        if _is_of_tool(name):
            return False
        if _PRIVATE.fullmatch(name):
            self.private.append(relative)
            return False
        is_link, status = path.is_symlink(), _status(path)
        kind = stat.S_IFREG if status is None else stat.S_IFMT(status.st_mode)
        if kind != stat.S_IFDIR and _is_left_out(name):
            return False
        if is_link and status is not None and not _stays(path, self._bounds):
            self.links.setdefault(_OUT, []).append(relative)
        elif kind == stat.S_IFREG:
            self.files.append(relative)
        elif status is None or kind != stat.S_IFDIR:
            self.special.append(relative)
        elif is_link:
            return self._is_first_link(relative, _identity(status), chain)
        else:
            return True
        return False

    def _is_first_link(self, relative: Path, target: _Identity, chain: tuple[_Identity, ...]) -> bool:
        """Whether no link has led to a folder yet; folders that link to each other would never end."""
        if target in self._linked or target in chain:
            self.links.setdefault(_AGAIN, []).append(relative)
            return False
        self._linked.add(target)
        return True
