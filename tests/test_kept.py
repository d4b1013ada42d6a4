"""What an earlier part of a run has left is used only if it is as it was written, of checkpoints that are the same."""

from __future__ import annotations

import json
import os
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_merging import digests
from expert_merging import merge as driver
from expert_merging.digests import Piece, Section, digest_of, read_digest, section_of, sections_of
from expert_merging.kept import HEAD, Kept, Written, digest_files
from expert_merging.merge import _Merger
from tests.checkpoints import write_checkpoint
from tests.command import COMMAND, contents, flags, merge, merged, refusal

CONTENT = bytes(number % 251 for number in range(1000))


def pieces_of(size: int, start: int = 0, stop: int = 1000) -> list[Piece]:
    places = [*range(start, stop, size), stop]
    return [Piece(first, last - first, digest_of(CONTENT[first:last])) for first, last in pairwise(places)]


@pytest.mark.slow
@settings(max_examples=30)
@given(size=st.integers(1, 1200), order=st.randoms(), head=st.integers(0, 999))
def test_pieces_in_any_order_make_the_digest_that_the_file_has(tmp_path_factory, size, order, head):
    """Which is read in blocks that are smaller."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "_BLOCK", 128)
        check_pieces(tmp_path_factory, size, order, head)


def check_pieces(tmp_path_factory, size, order, head):
    file = tmp_path_factory.mktemp("digests") / "file"
    file.write_bytes(CONTENT)
    pieces = [*pieces_of(size, stop=head), *pieces_of(size, start=head)] if head else pieces_of(size)
    order.shuffle(pieces)
    found = sections_of(pieces, {"head": (0, head), "rest": (head, 1000 - head)})
    assert Written(1000, found).differing(file) == []
    seen = bytearray()
    with file.open("rb") as stream:
        for section in found.values():
            assert read_digest(stream.fileno(), section, seen.extend) == section.digest
    assert seen == CONTENT
    for place in (0, 500, 999):
        changed = bytearray(CONTENT)
        changed[place] ^= 1
        file.write_bytes(changed)
        assert Written(1000, found).differing(file) == ["head" if place < head else "rest"]
    file.write_bytes(CONTENT[:-1])
    assert Written(1000, found).differing(file) == ["head", "rest"]


def test_bytes_that_change_places_are_noticed():
    """In whole pieces, too, which a sum of digests would not tell."""
    first, second = pieces_of(500)
    runs = {"all": (0, 1000)}
    swapped = [first._replace(digest=second.digest), second._replace(digest=first.digest)]
    assert sections_of([first, second], runs) != sections_of(swapped, runs)


def test_a_section_at_once_is_one_of_one_piece():
    assert section_of(CONTENT) == sections_of(pieces_of(1000), {"x": (0, 1000)})["x"]
    assert section_of(b"") == sections_of([], {"x": (0, 0)})["x"] == Section(0, 0, 1, section_of(b"").digest)


@pytest.mark.parametrize(
    "pieces",
    [
        pieces_of(100)[1:],
        pieces_of(100)[:-1],
        [*pieces_of(100)[:3], *pieces_of(100)[4:]],
        [*pieces_of(100), pieces_of(100)[3]],
        [*pieces_of(100), Piece(1000, 1, b"")],
        [*pieces_of(100, stop=500), *pieces_of(50, start=500)],
        [*pieces_of(300, stop=500), *pieces_of(200, start=500)],
    ],
)
def test_a_driver_that_leaves_out_bytes_or_writes_them_twice_is_told(pieces):
    with pytest.raises(ValueError, match=r"was not written piece by piece|belongs to nothing"):
        sections_of(pieces, {"x": (0, 1000)})


def test_files_are_noted_by_their_paths(tmp_path):
    kept = Kept(tmp_path / "digests.json")
    model = kept.within("model", made_of="then")
    file = tmp_path / "x.bin"
    model.within("", "then").write(file, CONTENT)
    kept.within("model/sub").write(file, b"other")
    assert list(kept.files()) == ["model/x.bin", "model/sub/x.bin"]
    assert list(model.files()) == ["x.bin", "sub/x.bin"]
    assert model.files()["x.bin"] == Written(1000, {HEAD: section_of(CONTENT)}, "then")
    assert kept.within("model/sub").has(file)
    assert not model.has(file)
    file.write_bytes(CONTENT)
    assert model.has(file)
    assert not kept.within("model", made_of="now").has(file)
    assert not model.has(tmp_path / "y.bin")
    assert not kept.within("mod", made_of="then").files()


def test_files_that_are_there_are_noted_unless_they_have_tensors(tmp_path):
    kept, folder = Kept(tmp_path / "digests.json"), tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    shard = Written(3, {HEAD: section_of(b"a"), "x": Section(1, 2, 2, "of tensors", ("base", "y"))})
    kept.note({"shard": shard, "old": Written.of(b"old")})
    for name in ("shard", "old", "sub/new"):
        (folder / name).write_bytes(b"new")
    kept.note_others(folder)
    assert kept.files() == {"shard": shard, "old": Written.of(b"new"), "sub/new": Written.of(b"new")}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "[" * 100_000, '{"digest": "md5", "files": {}}', '{"digest": "xxh3_128"}',
        '{"digest": "xxh3_128", "files": {"x": 1}}',
        '{"digest": "xxh3_128", "files": {"x": {"size": 0, "made_of": "", "sections": {"": [0, 0, 0, ""]}}}}',
        '{"digest": "xxh3_128", "files": {"x": {"size": 0, "made_of": "", "sections": {"": [0, true, 1, ""]}}}}',
        '{"digest": "xxh3_128", "files": {"x": {"size": 0, "made_of": "", "sections": {"": [0, 0, 1, "", 1]}}}}',
        '{"digest": "xxh3_128", "files": {"../x": {"size": 0, "made_of": "", "sections": {}}}}',
        '{"digest": "xxh3_128", "files": {"/x": {"size": 0, "made_of": "", "sections": {}}}}',
    ],
)  # fmt: skip
def test_a_damaged_record_knows_nothing(text, tmp_path):
    kept = Kept(tmp_path / "digests.json")
    kept.file.write_text(text)
    assert kept.files() == {}
    kept.write(tmp_path / "x", b"x")
    assert list(kept.files()) == ["x"]


def test_digests_of_small_files(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "folder").mkdir()
    before = digest_files(tmp_path)
    assert list(before) == ["a"]
    (tmp_path / "a").write_bytes(b"b")
    assert digest_files(tmp_path) != before


# Merges that were interrupted, and what happens to files meanwhile.

SHARDS = 4


@pytest.fixture
def folders(tmp_path):
    """Tensors are larger than the samples of them that fingerprints are made of."""
    generator = torch.Generator().manual_seed(0)
    return [
        write_checkpoint(
            tmp_path / name, *({f"layer.{shard}": torch.randn(60, 50, generator=generator)} for shard in range(SHARDS))
        )
        for name in ("base", "a", "b")
    ]


@pytest.fixture
def command(folders, tmp_path):
    base, a, b = folders
    return [*COMMAND, *flags(base, A=a, B=b), "--output_path", tmp_path / "out", "--run_name", "r"]


@pytest.fixture
def stopped(command, tmp_path):
    """A run that was stopped when three of four files were there, and the files that it would have."""
    run = merged(tmp_path / "out", *command)
    whole = contents(run.model)
    run.model.rename(run.partial_model)
    max(run.partial_model.glob("*.safetensors")).unlink()
    return run, whole


def change_last(file):
    """Another last entry, and the old time: no sample shows it."""
    times = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\0\0\0\x40")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_finished_files_that_are_as_they_were_are_kept(stopped, command):
    run, whole = stopped
    shards = sorted(run.partial_model.glob("*.safetensors"))
    before = [file.stat().st_ino for file in shards]
    assert merge(*command) == 0
    assert contents(run.model) == whole
    assert [(run.model / file.name).stat().st_ino for file in shards] == before
    assert "kept 3 finished shards" in run.log.read_text()


@pytest.mark.parametrize("fault", ["cut", "changed", "emptied", "another's", "unknown", "record gone"])
def test_a_finished_file_that_is_not_what_was_written_is_made_again(fault, stopped, command):
    run, whole = stopped
    first, second, _ = sorted(run.partial_model.glob("*.safetensors"))
    if fault == "cut":
        os.truncate(first, first.stat().st_size - 100)
    elif fault == "changed":
        change_last(first)
    elif fault == "emptied":
        first.write_bytes(b"")
    elif fault == "another's":
        first.write_bytes(second.read_bytes())
    elif fault == "unknown":
        record = json.loads(run.kept.file.read_text())
        del record["files"][f"model/{first.name}"]
        run.kept.file.write_text(json.dumps(record))
    else:
        run.kept.file.unlink()
    assert merge(*command) == 0
    assert contents(run.model) == whole
    log = run.log.read_text()
    assert (
        f"warning: {first.name} is made again: it is not as this run has written it, or checkpoints were written since"
    ) in log
    assert ("kept 2 finished shards" in log) == (fault != "record gone")


def test_nothing_is_published_that_the_run_has_not_made(stopped, command, tmp_path):
    """Files beside the finished shards, and a shard that is a link to one."""
    run, whole = stopped
    first = min(run.partial_model.glob("*.safetensors"))
    first.rename(tmp_path / "elsewhere")
    first.symlink_to(tmp_path / "elsewhere")
    (run.partial_model / "notes.txt").write_text("mine")
    (run.partial_model / "folder").mkdir()
    (run.partial_model / "folder" / "id").symlink_to(tmp_path / "elsewhere")
    assert not run.kept.within("model").has(first)
    assert merge(*command) == 0
    assert contents(run.model) == whole
    assert not any(file.is_symlink() for file in run.model.rglob("*"))
    assert "kept 2 finished shards" in run.log.read_text()


@pytest.mark.parametrize("who", [0, 2])
def test_checkpoints_that_were_changed_between_two_parts_are_merged_as_they_are_now(who, stopped, command, folders):
    """Size and time are as they were, and so are the samples that fingerprints are made of."""
    run, whole = stopped
    change_last(folders[who] / f"model-00001-of-0000{SHARDS}.safetensors")
    assert merge(*command) == 0
    assert contents(run.model) != whole
    again = [*command[:-1], "fresh"]
    assert merge(*again) == 0
    fresh = run.folder.with_name("fresh") / "model"
    assert {name: content for name, content in contents(run.model).items() if name != "README.md"} == {
        name: content for name, content in contents(fresh).items() if name != "README.md"
    }


class Meddling:
    """Does something to a file once the first shard is written."""

    def __init__(self, monkeypatch, meddle):
        self.meddle, write = meddle, _Merger.write

        def written(merger, *arguments):
            found = write(merger, *arguments)
            if self.meddle is not None:
                self.meddle()
                self.meddle = None
            return found

        monkeypatch.setattr(driver._Merger, "write", written)


def rewritten(file):
    """Write the same again, to the same file."""
    file.write_bytes(file.read_bytes())


def replaced(file):
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.rename(file)


@pytest.mark.parametrize("meddle", [change_last, rewritten, replaced], ids=lambda entry: entry.__name__)
@pytest.mark.parametrize(("who", "shard"), [(0, SHARDS), (1, 1)])
@pytest.mark.slow
def test_no_model_is_left_of_checkpoints_that_were_written_meanwhile(
    who, shard, meddle, command, folders, tmp_path, capsys, monkeypatch
):
    file = folders[who] / f"model-0000{shard}-of-0000{SHARDS}.safetensors"
    Meddling(monkeypatch, lambda: meddle(file))
    name = ["the base", "expert A"][who]
    assert refusal(capsys, *command) == (
        f"files of {name} ({folders[who]}) were written while this run read them, and what it has made may be of both "
        "contents; no model was left. Start the same command again when nobody writes there"
    )
    run = tmp_path / "out" / COMMAND[1] / "r"
    assert not (run / "model").exists()
    assert merge(*command) == 0
    assert merge(*command[:-1], "fresh") == 0
    for made in sorted((run / "model").glob("*.safetensors")):
        assert made.read_bytes() == (run.with_name("fresh") / "model" / made.name).read_bytes()


@pytest.mark.parametrize("meddle", ["config.json", "notes.txt", "gone"])
def test_no_model_is_left_of_other_files_that_were_written_meanwhile(meddle, command, folders, capsys, monkeypatch):
    (folders[0] / "notes.txt").write_text("before")
    weights = folders[0] / f"model-00002-of-0000{SHARDS}.safetensors"
    act = {
        "config.json": lambda: (folders[0] / "config.json").write_text('{"model_type": "mistral", "x": 1}'),
        "notes.txt": lambda: (folders[0] / "notes.txt").write_text("after!"),
        "gone": weights.unlink,
    }
    Meddling(monkeypatch, act[meddle])
    assert f"files of the base ({folders[0]}) were written while this run read them" in refusal(capsys, *command)


def test_a_record_that_goes_beyond_its_file_is_no_record(tmp_path):
    """Which would be read for ever, or from where nothing is."""
    kept = Kept(tmp_path / "digests.json")
    for start, size in ((0, 10**18), (2**63, 1), (90, 11), (90, 10), (0, 99)):
        entry = {"size": 100, "made_of": "", "sections": {HEAD: [start, size, 50, "00"]}}
        with pytest.raises(ValueError, match=r"does not begin where|are in no section"):
            Written.read(entry)
    with pytest.raises(ValueError, match="does not begin where"):
        Written.read({"size": 100, "made_of": "", "sections": {HEAD: [0, 50, 50, "00"], "a": [60, 50, 50, "00"]}})
    for sections in ({}, {"a": [0, 100, 50, "00"]}):
        with pytest.raises(ValueError, match="are in no section"):
            Written.read({"size": 100, "made_of": "", "sections": sections})
    whole = Written.read({"size": 100, "made_of": "", "sections": {HEAD: [0, 100, 50, "00"]}})
    assert whole.sections[HEAD].size == 100
    assert kept.files() == {}
