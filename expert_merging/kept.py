"""What a run has written, by digest: a file that an earlier part of it has left is used only if it still is that.

``digests.json`` in the run's folder says of each file its size, its sections (header and tensors) and what it was made
of. An entry is written before its file gets its name, so no finished file lacks one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from expert_merging.digests import Section, digest_of, read_digest, section_of
from expert_merging.documents import read_object
from expert_merging.errors import InputError
from expert_merging.writing import write_atomically

# Name of the section of what stands before the tensors; of a file without tensors it is all there is.
HEAD = ""
_DIGEST = "xxh3_128"


@dataclass(frozen=True)
class Written:
    """One file.

    Args:
        size: bytes.
        sections: all of them by name, in order.
        made_of: state of the checkpoints that it was made of; empty where none counts.
    """

    size: int
    sections: Mapping[str, Section]
    made_of: str = ""

    @classmethod
    def of(cls, content: bytes) -> Written:
        """A small file."""
        return cls(len(content), {HEAD: section_of(content)})

    @classmethod
    def of_file(cls, file: Path) -> Written:
        """A file that is there, read in blocks."""
        with file.open("rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            whole = Section(0, size, max(1, size), "")
            return cls(size, {HEAD: whole._replace(digest=read_digest(stream.fileno(), whole))})

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Written:
        """What `entry` has made.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is something else.
        """
        sections, end = {}, 0
        for name, (start, size, piece, digest, *source) in entry["sections"].items():
            if not all(type(number) is int and number >= 0 for number in (start, size, piece - 1)):
                raise ValueError(name)
            if start != end:
                raise ValueError(f"{name} does not begin where what stands before it ends")
            owner, tensor = source or ("", "")
            sections[name] = Section(start, size, piece, str(digest), (str(owner), str(tensor)) if source else ())
            end += size
        if HEAD not in sections or end != entry["size"]:
            raise ValueError("some bytes of the file are in no section")
        return cls(end, sections, str(entry["made_of"]))

    def entry(self) -> dict[str, Any]:
        """What ``digests.json`` has of it."""
        sections = {name: [*section[:4], *section.source] for name, section in self.sections.items()}
        return {"size": self.size, "made_of": self.made_of, "sections": sections}

    def differing(self, file: Path) -> list[str]:
        """Names of the sections that are not what was written; all of a file that is missing or of another size."""
        if not file.is_file() or file.stat().st_size != self.size:
            return list(self.sections)
        with file.open("rb", buffering=0) as stream:
            return [
                name
                for name, section in self.sections.items()
                if read_digest(stream.fileno(), section) != section.digest
            ]


class Kept:
    """The files of a run, or those below one of its folders.

    Args:
        file: ``digests.json``.
        place: folder in the run's, as the names of its files begin; empty for all.
        made_of: state of the checkpoints that files are made of; those that were made of another one are none of its.
    """

    def __init__(self, file: Path, place: str = "", made_of: str = "") -> None:
        self.file = file
        self.place = place
        self.made_of = made_of

    def within(self, place: str, made_of: str = "") -> Kept:
        """The files below a folder of this one; an empty name is this one itself."""
        return Kept(self.file, self._name(place) if place else self.place, made_of)

    def files(self) -> dict[str, Written]:
        """Everything that was written, by its path from here; nothing where the record is missing or damaged."""
        before = f"{self.place}/" if self.place else ""
        return {name[len(before) :]: written for name, written in self._read().items() if name.startswith(before)}

    def note(self, written: Mapping[str, Written]) -> None:
        """Note files by their paths from here, before they get their names."""
        own = {self._name(name): replace(one, made_of=self.made_of) for name, one in written.items()}
        known = self._read() | own
        lines = [f"{json.dumps(name)}: {json.dumps(one.entry())}" for name, one in known.items()]
        text = f'{{"digest": "{_DIGEST}", "files": {{\n' + ",\n".join(lines) + "\n}}\n"
        write_atomically(self.file, text.encode())

    def note_others(self, folder: Path) -> None:
        """Note the files of a folder that have no tensors: nobody has noted those while they were written."""
        known = self.files()
        paths = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        self.note(
            {
                name: Written.of_file(file)
                for name, file in paths.items()
                if name not in known or list(known[name].sections) == [HEAD]
            }
        )

    def write(self, target: Path, content: bytes) -> None:
        """Write a small file as a whole, and note it."""
        self.note({target.name: Written.of(content)})
        write_atomically(target, content)

    def has(self, file: Path) -> bool:
        """Whether a file is what was written under its name, and made of what there is now; a link is not."""
        known = self.files().get(file.name)
        return (
            known is not None and known.made_of == self.made_of and not file.is_symlink() and not known.differing(file)
        )

    def _name(self, name: str) -> str:
        return f"{self.place}/{name}" if self.place else name

    def _read(self) -> dict[str, Written]:
        try:
            record = read_object(self.file)
            if record["digest"] != _DIGEST:
                return {}
            return {_checked(name): Written.read(entry) for name, entry in record["files"].items()}
        except (InputError, ValueError, TypeError, KeyError, AttributeError):
            return {}


def _checked(name: str) -> str:
    """A path that stays in the run's folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(name)
    return name


def digest_files(folder: Path) -> dict[str, str]:
    """Digests of the small files of a folder, by name."""
    return {file.name: digest_of(file.read_bytes()).hex() for file in sorted(folder.iterdir()) if file.is_file()}
