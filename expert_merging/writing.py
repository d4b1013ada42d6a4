"""Write files so that nothing half-written ever has its final name."""

from __future__ import annotations

import fcntl
import filecmp
import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from expert_merging.digests import Piece, digest_of
from expert_merging.documents import resolved
from expert_merging.errors import InputError

_READ_AND_WRITE = 0o666
_PIECE = 1 << 20
NAME_BYTES = 200  # of what users call runs and experts, from which names of files are made
_PARTIAL = ".partial"
# Bytes of a name on all common disks, and of its beginning that is kept where it would be longer.
_LONGEST, _BEGINNING = 255, 200


def check_free_disk(folder: Path, needed: int, flag: str = "--output_path", what: str = "the result needs") -> None:
    """Check that the disk that will hold the folder has room.

    Args:
        folder: a folder that need not exist yet.
        needed: bytes to be written.
        flag: the flag that chooses another folder.
        what: what needs it.

    Raises:
        InputError: it has not.
    """
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"{what} {needed / 1e9:.1f} GB and the disk of {folder} has {free / 1e9:.1f} GB free; "
            f"make room or choose another {flag}"
        )


def check_new_folder(target: Path, sources: Iterable[Path], flag: str) -> None:
    """Check that a folder can be made.

    Args:
        target: the folder.
        sources: folders that are never written to.
        flag: what chooses another folder.

    Raises:
        InputError: something is there, or nothing can be written there.
    """
    for name in (Path, partial_name):  # one after the other: the root folder has no other name
        if os.path.lexists(place := name(target)):
            raise InputError(f"{place} exists already; choose another {flag}, or move it away")
    for folder in sources:
        if resolved(target).is_relative_to(resolved(folder)):
            raise InputError(f"{target} would lie inside {folder}, which is never written to; choose another {flag}")
    check_lengths(target.parent, [Path(target.name)])
    existing = next(parent for parent in target.parents if parent.exists())
    if not existing.is_dir():
        raise InputError(f"{existing} is a file where {target} needs a folder; choose another {flag}")
    if not os.access(existing, os.W_OK):
        raise InputError(f"{existing} cannot be written to; choose another {flag}")


def can_name_file(name: str) -> bool:
    """Whether a file or folder can have the name, also with the endings that files get here."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:  # bytes of the command line that are no text
        return False
    return (
        bool(name.strip()) and name not in (".", "..") and "/" not in name and name.isprintable() and size <= NAME_BYTES
    )


def partial_name(target: Path) -> Path:
    """Where a file or folder is written until it is complete; of a long name the beginning, and a digest of all."""
    name = target.name
    if len(os.fsencode(name)) > _LONGEST - len(_PARTIAL):
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
        name = os.fsencode(name)[:_BEGINNING].decode(errors="ignore") + digest
    return target.with_name(name + _PARTIAL)


def check_lengths(folder: Path, files: Iterable[Path]) -> None:
    """Check that the disk of a folder can have files of these names.

    Args:
        folder: a folder that need not exist yet.
        files: paths relative to it.

    Raises:
        InputError: some names, or paths, are too long.
    """
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    name_bytes, path_bytes = (os.pathconf(existing, limit) for limit in ("PC_NAME_MAX", "PC_PATH_MAX"))
    for file in files:
        path = partial_name(folder / file)
        if any(len(os.fsencode(part)) > name_bytes for part in (*file.parts, path.name)):
            raise InputError(f"{file} has a longer name than the disk of {existing} takes, {name_bytes} bytes")
        if len(os.fsencode(path.absolute())) >= path_bytes:
            raise InputError(
                f"{file} in {folder} would have a path of more than {path_bytes} bytes; shorten its folders"
            )


def check_file(file: Path, flag: str) -> None:
    """Check that a file of results can be written where a flag says, before what it is to hold is computed.

    Raises:
        InputError: there is no folder for it, or one of its name, or nothing can be written there.
    """
    if not file.parent.is_dir():
        raise InputError(f"{flag} {file}: there is no folder {file.parent}; make it first")
    if file.is_dir():
        raise InputError(f"{flag} {file} is a folder; name a file in it")
    if not os.access(file.parent, os.W_OK):
        raise InputError(f"{flag} {file}: {file.parent} cannot be written to; choose another folder")


def put_aside(file: Path) -> Path:
    """Keep a file that is about to be replaced as ``name.base.ending``; one of that name is put aside itself, before.

    What an interrupted run has put aside already is not put aside twice.
    """
    kept = file.with_name(f"{file.stem}.base{file.suffix}")
    if kept.exists() and not filecmp.cmp(kept, file, shallow=False):
        put_aside(kept)
    copy_file(file, kept)
    return kept


@contextmanager
def making_folder(target: Path) -> Iterator[Path]:
    """Where a folder is filled until it is complete and gets its name; nothing is left of one that is not."""
    partial = partial_name(target)
    try:
        yield partial
        os.rename(partial, target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # it takes a minute to write it again
        raise


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, so that nobody who cannot read it can read the copy; what the umask forbids stays forbidden."""
    with source.open("rb") as original, _opened_new(partial_name(target), source.stat().st_mode) as copy:
        shutil.copyfileobj(original, copy, _PIECE)
        copy.flush()
        os.fsync(copy.fileno())
    os.rename(partial_name(target), target)


def _opened_new(file: Path, mode: int) -> BinaryIO:
    """A new file, open for writing, that can be read and written by those alone whom the mode and the umask allow."""
    file.unlink(missing_ok=True)  # of an interrupted run, perhaps not to be written to
    allowed = stat.S_IRUSR | (mode & _READ_AND_WRITE)
    return os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, allowed), "wb")


class ShardWriter:
    """Writes one safetensors file under a temporary name and gives it its own name when it is complete.

    The merged file has the header of the base's file, byte for byte, so every tensor's place is known from the start
    and threads may write blocks in any order.

    Args:
        target: final path.
        header: length field and header, as read from the base's file; None to write to a file that another process has
            made and will finish.
        size: final size in bytes.
    """

    def __init__(self, target: Path, header: bytes | None = None, size: int = 0) -> None:
        self.target = target
        self.temporary = partial_name(target)
        flags = os.O_RDWR if header is None else os.O_RDWR | os.O_CREAT | os.O_TRUNC
        self.descriptor = os.open(self.temporary, flags, _READ_AND_WRITE)
        if header is not None:
            os.truncate(self.descriptor, size)
            self.write(memoryview(header), 0)

    def write(self, view: memoryview, offset: int) -> Piece:
        """Write all of the view at the offset; what was written, by digest."""
        written = 0
        while written < len(view):
            written += os.pwrite(self.descriptor, view[written:], offset + written)
        if hasattr(os, "posix_fadvise"):
            # Linux sends what was written to the disk now, while the next blocks are merged, and not only when the
            # file is finished; pages that are still to be sent stay in memory.
            os.posix_fadvise(self.descriptor, offset, len(view), os.POSIX_FADV_DONTNEED)
        return Piece(offset, len(view), digest_of(view))

    def finish(self) -> None:
        """Make the file durable and visible under its name."""
        os.fsync(self.descriptor)
        os.close(self.descriptor)
        os.rename(self.temporary, self.target)
        sync_folder(self.target.parent)

    def leave(self) -> None:
        """Close the file for the process that made it to finish."""
        os.close(self.descriptor)

    def abandon(self) -> None:
        """Close and remove the temporary file."""
        os.close(self.descriptor)
        self.temporary.unlink(missing_ok=True)


def sync_files(folder: Path) -> None:
    """Make the files of a folder durable, before the folder is given its final name."""
    for file in folder.iterdir():
        sync_file(file)
    sync_folder(folder)


def sync_file(file: Path) -> None:
    """Make a file durable, before it is given its final name."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    sync_file(folder)


def write_atomically(target: Path, content: bytes) -> None:
    """Replace a small file as a whole: a reader sees the old content or the new, never a part.

    Who could not read the old content cannot read the new either.
    """
    with _opened_new(partial_name(target), target.stat().st_mode if target.exists() else _READ_AND_WRITE) as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.rename(partial_name(target), target)
    sync_folder(target.parent)


def take_hold(lock: Path, flag: str) -> int:
    """Keep other processes from writing to a folder, until the descriptor is closed or this process ends.

    Args:
        lock: a file in the folder, made if it does not exist.
        flag: the flag that chooses another folder.

    Raises:
        InputError: another process is writing to the folder.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"another process is writing to {lock.parent}; wait for it or choose another {flag}") from None
    return descriptor
