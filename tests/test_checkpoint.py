"""Checkpoints are read lazily, and folders that cannot be merged are refused in words."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from expert_merging.checkpoints.checkpoint import Checkpoint, read_exactly
from expert_merging.checkpoints.folders import weights_in_other_formats
from expert_merging.errors import InputError
from expert_merging.plan import adopt_names, check_experts
from tests.checkpoints import tensors_of, write_checkpoint, write_index
from tests.command import assert_same_bytes

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BASE = {"a.weight": torch.ones(4, 3), "b.weight": torch.ones(5), "lm_head.weight": torch.ones(6, 3)}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def problems(folder: Path) -> list[str]:
    with pytest.raises(InputError) as caught:
        Checkpoint(folder)
    return list(caught.value.problems)


def problem(folder: Path) -> str:
    (found,) = problems(folder)
    return found


@pytest.fixture
def sharded(tmp_path):
    return write_checkpoint(tmp_path / "sharded", {"a": torch.ones(3)}, {"b": torch.ones(2, 2)})


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@given(shape=st.lists(st.integers(0, 4), max_size=3), cuts=st.lists(st.integers(0, 64), max_size=3))
def test_entries_are_read_in_blocks(dtype, shape, cuts):
    tensor = torch.randn(shape).to(dtype)
    bounds = sorted({0, *(min(cut, tensor.numel()) for cut in cuts), tensor.numel()})
    with TemporaryDirectory() as folder:
        checkpoint = Checkpoint(write_checkpoint(Path(folder), {"before": torch.ones(5), "x": tensor}))
        pieces = [checkpoint.read("x", start, stop) for start, stop in zip([0, *bounds[:-1]], bounds, strict=True)]
        whole, mapped = checkpoint.read("x"), checkpoint.mapped("x")
        checkpoint.close()
    assert whole.dtype == dtype
    assert checkpoint.entries["x"].shape == tuple(shape)
    assert torch.cat(pieces).equal(tensor.flatten())
    assert whole.equal(tensor.flatten())
    assert mapped.equal(tensor.flatten())


def test_a_file_is_mapped_once_for_all_its_tensors(tmp_path):
    """Each mapping counts as much as its file where a machine limits what processes may ask for."""
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "folder", {"x": torch.ones(5), "y": torch.zeros(3)}))
    assert len({checkpoint.mapped(name).untyped_storage().data_ptr() for name in ("x", "y")}) == 1


@pytest.mark.parametrize("padding", [0, 1])
def test_what_is_written_to_mapped_pages_does_not_reach_the_file(padding, tmp_path):
    """Nor does it matter where in the file a tensor begins."""
    folder = write_checkpoint(tmp_path / "folder", {"x": torch.arange(5.0)})
    content = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    content = struct.pack("<Q", length + padding) + content[8 : 8 + length] + b" " * padding + content[8 + length :]
    (folder / "model.safetensors").write_bytes(content)
    mapped = Checkpoint(folder).mapped("x")
    assert mapped.tolist() == [0, 1, 2, 3, 4]
    mapped.fill_(7)
    assert (folder / "model.safetensors").read_bytes() == content


def test_a_single_file_and_shards_hold_the_same(tmp_path):
    single = Checkpoint(write_checkpoint(tmp_path / "single", BASE))
    shards = Checkpoint(
        write_checkpoint(
            tmp_path / "shards",
            {"b.weight": BASE["b.weight"]},
            {name: BASE[name] for name in ("a.weight", "lm_head.weight")},
        )
    )
    assert single.entries.keys() == shards.entries.keys()
    assert [file.name for file in shards.files] == [FIRST, SECOND]
    assert all(single.read(name).equal(shards.read(name)) for name in BASE)


def test_a_single_file_wins_over_a_left_over_index(sharded):
    save_file({"c": torch.ones(1)}, sharded / "model.safetensors")
    assert list(Checkpoint(sharded).entries) == ["c"]


def test_tensors_of_a_file_come_in_the_order_of_their_bytes(tmp_path):
    checkpoint = Checkpoint(write_checkpoint(tmp_path, {"z": torch.ones(2), "a": torch.ones(3).double()}))
    entries = checkpoint.in_file(checkpoint.files[0])
    assert [entry.offset for entry in entries] == sorted(entry.offset for entry in entries)
    assert {entry.name for entry in entries} == {"a", "z"}


def test_opening_reads_headers_only(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, BASE)
    monkeypatch.setattr(os, "preadv", None)
    monkeypatch.setattr(os, "pread", None)
    assert len(Checkpoint(tmp_path).entries) == 3


def test_a_fingerprint_follows_values_names_and_types(tmp_path):
    def fingerprint(name, tensors):
        return Checkpoint(write_checkpoint(tmp_path / name, tensors)).fingerprint(whole=True)

    same = fingerprint("1", BASE)
    assert Checkpoint(tmp_path / "1").fingerprint(whole=True) == same
    changed = BASE["a.weight"].clone()
    changed[2, 1] += 1e-6
    others = {
        fingerprint("3", {**BASE, "a.weight": changed}),
        fingerprint("4", {**BASE, "a.weight": BASE["a.weight"].T.contiguous()}),
        fingerprint("5", {name.replace("a", "A"): tensor for name, tensor in BASE.items()}),
        fingerprint("6", {name: tensor.half() for name, tensor in BASE.items()}),
    }
    assert len(others | {same}) == 5


def test_a_copy_has_the_fingerprint_of_its_original_and_its_own_times(tmp_path):
    original = Checkpoint(write_checkpoint(tmp_path / "original", BASE))
    copy = Checkpoint(shutil.copytree(tmp_path / "original", tmp_path / "copy"))
    os.utime(copy.files[0], ns=(1, 1))
    for whole in (True, False):
        assert copy.fingerprint(whole=whole) == original.fingerprint(whole=whole)
    assert copy.content() == original.content()
    assert copy.opened != original.opened


def test_writing_to_a_file_is_noticed_whatever_time_it_is_given(tmp_path):
    folder = write_checkpoint(tmp_path, BASE)
    opened = Checkpoint(folder)
    assert opened.is_as_opened()
    assert Checkpoint(folder).opened == opened.opened
    file = opened.files[0]
    times, content = file.stat(), file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_mtime_ns == times.st_mtime_ns
    assert not opened.is_as_opened()
    assert Checkpoint(folder).opened != opened.opened


@pytest.mark.parametrize("fault", ["gone", "cut", "replaced"])
def test_a_file_that_is_gone_cut_or_replaced_is_noticed(fault, tmp_path):
    opened = Checkpoint(write_checkpoint(tmp_path / "a", BASE))
    file = opened.files[0]
    if fault == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif fault == "gone":
        file.unlink()
    else:
        shutil.copy2(file, tmp_path / "same")
        os.replace(tmp_path / "same", file)
    assert not opened.is_as_opened()


def test_a_fingerprint_follows_every_tensor_of_a_large_file(tmp_path):
    """A change of a whole tensor, or of a stretch of a large one, lies under some block."""
    tensors = {"large": torch.zeros(5 << 22), **{f"small.{number}": torch.zeros(3000) for number in range(40)}}
    folder = write_checkpoint(tmp_path, tensors)
    found = {Checkpoint(folder).fingerprint(whole=False)}
    for name in ("large", "small.0", "small.39"):
        write_checkpoint(folder, {**tensors, name: tensors[name] + 1})
        found.add(Checkpoint(folder).fingerprint(whole=False))
    late = tensors["large"].clone()
    late[-(1 << 22) :] = 1
    write_checkpoint(folder, {**tensors, "large": late})
    assert len(found | {Checkpoint(folder).fingerprint(whole=False)}) == 5


def test_weights_keep_their_content_under_other_names_and_in_other_files(tmp_path):
    first = Checkpoint(write_checkpoint(tmp_path / "a", BASE))
    renamed = [{f"module.{name}": tensor} for name, tensor in BASE.items()]
    second = Checkpoint(write_checkpoint(tmp_path / "b", *renamed))
    assert second.content() == first.content()
    assert second.fingerprint(whole=False) != first.fingerprint(whole=False)


def test_a_fingerprint_reads_a_large_other_file_in_part(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, BASE)
    with (folder / "notes.zip").open("wb") as stream:
        stream.truncate(3 << 30)

    def fingerprint(place=None):
        if place is not None:
            with (folder / "notes.zip").open("r+b") as stream:
                stream.seek(place)
                stream.write(b"changed")
        return Checkpoint(folder).fingerprint(whole=True)

    found = [fingerprint(), fingerprint((3 << 29) + (1 << 23))]
    with (folder / "notes.zip").open("ab") as stream:
        stream.write(b"longer")
    assert len({*found, fingerprint()}) == 3


def test_a_fingerprint_follows_what_the_base_s_other_files_say(tmp_path):
    folder = write_checkpoint(tmp_path, BASE)
    (folder / "tokenizer.json").write_text("1")

    def fingerprints():
        return [Checkpoint(folder).fingerprint(whole=whole) for whole in (True, False)]

    whole, lean = fingerprints()
    (folder / "tokenizer.json").write_text("2")
    assert fingerprints()[0] != whole, "it is copied, and decides what is learned"
    assert fingerprints()[1] == lean
    (folder / "config.json").write_text('{"rms_norm_eps": 0.1}')
    assert fingerprints()[1] != lean


def test_a_fingerprint_of_large_weights_needs_little_reading(tmp_path, monkeypatch):
    checkpoint = Checkpoint(write_checkpoint(tmp_path, {"a": torch.zeros(1 << 21)}))
    read = []
    plain = os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: read.append(arguments[1]) or plain(*arguments))
    checkpoint.fingerprint(whole=True)
    assert sum(read) < 1 << 19


def test_a_missing_folder(tmp_path):
    assert problem(tmp_path / "none") == f"checkpoint folder {tmp_path / 'none'} does not exist"
    file = tmp_path / "model.safetensors"
    file.touch()
    assert problem(file) == f"{file} is a file; give the folder of the checkpoint that it belongs to"


def test_a_folder_without_config(tmp_path):
    assert problem(tmp_path) == (
        f"{tmp_path} has no config.json; a checkpoint folder holds config.json and safetensors weights"
    )


@pytest.mark.parametrize("text", [b"{", b"", b"\xff\xfe\xfa"])
def test_a_config_that_is_not_json(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    assert re.fullmatch(r".*config.json is not valid JSON \(.*\); download it again", problem(tmp_path))


def test_a_config_that_is_no_object(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    assert problem(tmp_path) == f"{tmp_path / 'config.json'} holds list, not a JSON object; download it again"


def test_quantized_weights_are_refused(tmp_path):
    write_checkpoint(tmp_path, BASE, config={"quantization_config": {"bits": 4}})
    assert problem(tmp_path) == (
        f"{tmp_path / 'config.json'} has a quantization_config: quantized weights cannot be merged exactly; "
        "use the unquantized ones"
    )


def test_an_empty_quantization_config_is_none(tmp_path):
    assert Checkpoint(write_checkpoint(tmp_path, BASE, config={"quantization_config": None})).entries


def test_an_adapter_is_no_full_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert problem(tmp_path) == (
        f"{tmp_path} holds an adapter (adapter_config.json), and a full model is needed here; adapters can be experts "
        "(--expert), and the base is the model that they were trained on"
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "x.pth"])
def test_pickles_are_refused_with_what_to_do(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"")
    assert problem(tmp_path).startswith(f"{tmp_path} has its weights in pickle files ({name}), which can run code")
    assert problem(tmp_path).endswith(f": python -m expert_merging convert {tmp_path} NEW_FOLDER")


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert problem(tmp_path) == (
        f"{tmp_path} has neither model.safetensors nor model.safetensors.index.json; download the safetensors weights"
    )


def test_every_missing_shard_is_named(sharded):
    (sharded / FIRST).unlink()
    (sharded / SECOND).unlink()
    assert problems(sharded) == [
        f"{sharded / name} is missing, and model.safetensors.index.json names it; download it"
        for name in (FIRST, SECOND)
    ]


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "nested/model.safetensors"])
def test_an_index_may_not_name_files_outside(sharded, name):
    write_index(sharded, {"a": FIRST, "b": name})
    assert problem(sharded) == (
        f"{sharded / 'model.safetensors.index.json'} names {name!r}; weight files must lie in the folder itself"
    )


@pytest.mark.parametrize("text", ["{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    assert problem(sharded) == (
        f"{sharded / 'model.safetensors.index.json'} is not a JSON object with a weight_map; download it again"
    )


def test_an_index_that_does_not_fit_the_files(sharded):
    write_index(sharded, {"a": SECOND, "b": SECOND, "c": FIRST})
    assert (
        problems(sharded)
        == [
            f"{sharded / FIRST} does not hold c, and model.safetensors.index.json says it does; download both again",
            f"{sharded / SECOND} does not hold a, and model.safetensors.index.json says it does; download both again",
        ][::-1]
    )


def test_a_tensor_in_two_files(sharded):
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, sharded / SECOND)
    assert problem(sharded) == f"{sharded / SECOND}: tensor a is in {FIRST} already; a tensor belongs in one file"


def test_every_broken_file_is_named(sharded):
    for name in (FIRST, SECOND):
        (sharded / name).write_bytes((sharded / name).read_bytes()[:5])
    assert problems(sharded) == [
        f"{sharded / name} is truncated or not a safetensors file (5 bytes: header too small); download it again"
        for name in (FIRST, SECOND)
    ]


def refuses_or_reads(folder: Path, content: bytes) -> None:
    """Opening the file must end in an InputError, or in entries that can all be read."""
    (folder / "model.safetensors").write_bytes(content)
    try:
        checkpoint = Checkpoint(folder)
    except InputError as error:
        assert str(folder / "model.safetensors") in str(error)  # noqa: PT017
        return
    for entry in checkpoint.entries.values():
        assert 0 <= entry.offset <= entry.offset + entry.size <= len(content)
        if entry.is_float:
            assert len(checkpoint.read(entry.name)) == entry.elements
    checkpoint.fingerprint(whole=True)
    checkpoint.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), BASE)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return (write_checkpoint(tmp_path_factory.mktemp("good"), BASE) / "model.safetensors").read_bytes()


def packed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


SIDES = st.integers(-3, 3) | st.floats() | st.booleans() | st.none() | st.text(max_size=2)
TENSORS = st.dictionaries(
    st.text(max_size=3),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "I64", "F4", "BOOL"]) | SIDES,
            "shape": st.lists(SIDES, max_size=3) | SIDES,
            "data_offsets": st.lists(SIDES, min_size=1, max_size=3) | SIDES,
        }
    )
    | st.none()
    | st.lists(st.integers()),
    max_size=3,
)


@given(content=st.binary(max_size=40))
@example(content=packed(b"[" * 100_000))
@example(content=packed(b"[" * 100_000 + b"]" * 100_000))
@example(content=struct.pack("<Q", 2**64 - 1))
@example(content=packed(b'{"x": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 0]}}'))
@example(content=packed({"x": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, b"1234"))
@example(content=packed({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}}, b"1234"))
@example(content=packed({"x": {"dtype": "F32", "shape": [True], "data_offsets": [False, 4]}}, b"1234"))
@example(content=packed({"x": {"dtype": "?", "shape": [], "data_offsets": [0, -1]}}))
@example(
    content=packed(
        {
            "x": {"dtype": "?", "shape": [], "data_offsets": [0, 8]},
            "y": {"dtype": "?", "shape": [], "data_offsets": [8, 4]},
        },
        b"1234",
    )
)
@example(content=packed({"x": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}, b"1234"))
def test_arbitrary_bytes_are_refused_in_words(folder, content):
    refuses_or_reads(folder, content)


@given(header=TENSORS, size=st.integers(0, 16))
def test_arbitrary_headers_are_refused_in_words(folder, header, size):
    refuses_or_reads(folder, packed(header, b"\0" * size))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (
            {"x": {"dtype": "K32", "shape": [1], "data_offsets": [0, 4]}},
            "invalid JSON in header: unknown variant `K32`",
        ),
        (
            '{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'.encode("utf-16-le"),
            "invalid JSON in header: ",
        ),
        (b'\xef\xbb\xbf{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "invalid JSON in header: "),
        (b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "invalid JSON in header: "),
        ({"__metadata__": {"a": 1}, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "invalid JSON in "),
        ({"__metadata__": [], "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "invalid JSON in header: "),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, ""),
        ({"x": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, "invalid JSON in header: "),
        ({"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, ""),
    ],
)
def test_headers_that_the_library_does_not_take_are_refused_with_its_reason(folder, header, reason):
    file = folder / "model.safetensors"
    file.write_bytes(packed(header, b"1234"))
    size = file.stat().st_size
    assert problem(folder).startswith(f"{file} is truncated or not a safetensors file ({size} bytes: {reason}")


@given(data=st.data())
def test_every_cut_off_file_is_refused(folder, good, data):
    length = data.draw(st.integers(0, len(good) - 1))
    (folder / "model.safetensors").write_bytes(good[:length])
    file = re.escape(str(folder / "model.safetensors"))
    assert re.fullmatch(f"{file} is truncated or not a safetensors file \\({length} bytes: .*", problem(folder))


@given(data=st.data())
def test_files_with_a_damaged_header_are_refused_or_readable(folder, good, data):
    position = data.draw(st.integers(0, 300))
    byte = data.draw(st.integers(0, 255))
    refuses_or_reads(folder, good[:position] + bytes([byte]) + good[position + 1 :])


def test_a_file_with_more_than_its_header_says_is_refused(folder, good):
    (folder / "model.safetensors").write_bytes(good + b"x")
    assert problem(folder) == (
        f"{folder / 'model.safetensors'} is truncated or not a safetensors file ({len(good) + 1} bytes: incomplete "
        "metadata, file not fully covered); download it again"
    )


def test_types_that_nothing_is_known_about_can_be_kept(tmp_path):
    write_checkpoint(tmp_path, {"x": torch.ones(1)})
    header = {"x": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}
    (tmp_path / "model.safetensors").write_bytes(packed(header, b"1234"))
    assert not Checkpoint(tmp_path).entries["x"].is_float


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    checkpoint = Checkpoint(write_checkpoint(tmp_path, BASE))
    os.truncate(tmp_path / "model.safetensors", 300)
    with pytest.raises(InputError) as caught:
        checkpoint.read("lm_head.weight")
    assert str(caught.value) == (
        f"{tmp_path / 'model.safetensors'} ended early while it was read; was it replaced or cut off? Download it again"
    )


def test_short_reads_are_continued(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(bytes(range(200)))
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, offset: whole(file, [views[0][:7]], offset))
    buffer = bytearray(100)
    with (tmp_path / "x").open("rb") as stream:
        read_exactly(stream.fileno(), memoryview(buffer), 50, tmp_path / "x")
    assert bytes(buffer) == bytes(range(50, 150))


def test_weights_in_other_formats_are_named(tmp_path):
    write_checkpoint(tmp_path, BASE)
    for name in ("model.gguf", "consolidated.safetensors", "pytorch_model.bin", "tokenizer.model"):
        (tmp_path / name).write_bytes(b"")
    assert weights_in_other_formats(tmp_path, Checkpoint(tmp_path).headers) == [
        "consolidated.safetensors",
        "model.gguf",
        "pytorch_model.bin",
    ]


@pytest.fixture
def compare(tmp_path):
    """What is merged of ``BASE`` with an expert that has the given tensors."""

    def check(tensors, excluded=(".*lm_head.*",), **names):
        base = Checkpoint(write_checkpoint(tmp_path / "base", BASE))
        expert = Checkpoint(write_checkpoint(tmp_path / "expert", tensors))
        return check_experts(base, {"Math": expert}, excluded)

    return check


def check_by_names(base, expert, excluded, file_name):
    adopt_names({name: file_name(name) for name in base.entries}, expert, file_name)
    return check_experts(base, {"Math": expert}, excluded, file_name)


def differences(tmp_path, compare, *arguments):
    with pytest.raises(InputError) as caught:
        compare(*arguments)
    prefix = f"expert Math ({tmp_path / 'expert'}): "
    assert all(found.startswith(prefix) for found in caught.value.problems)
    return [found.removeprefix(prefix) for found in caught.value.problems]


def test_floating_point_tensors_that_no_pattern_matches_are_merged(compare):
    assert compare(BASE) == ["a.weight", "b.weight"]
    assert compare(BASE, []) == list(BASE)
    assert compare(BASE, ["weight"]) == list(BASE), "patterns match from the start of the name"
    assert compare(BASE, ["a|b"]) == ["lm_head.weight"]


def test_an_expert_may_differ_in_what_is_not_merged(compare):
    assert compare({**BASE, "lm_head.weight": torch.ones(8, 3)}) == ["a.weight", "b.weight"]
    assert compare({**BASE, "lm_head.bias": torch.ones(8)}) == ["a.weight", "b.weight"]
    assert compare({name: BASE[name] for name in ("a.weight", "b.weight")}) == ["a.weight", "b.weight"]


def test_tables_of_old_checkpoints_are_no_parameters(compare):
    table = {"layers.0.rotary_emb.inv_freq": torch.ones(2)}
    assert compare({**BASE, **table}) == ["a.weight", "b.weight"]


def newer(name):
    return name.removeprefix("model.")


def test_an_expert_saved_with_other_names_goes_by_those_of_the_base(tmp_path):
    base = Checkpoint(write_checkpoint(tmp_path / "base", BASE))
    values = {name: tensor + number for number, (name, tensor) in enumerate(BASE.items())}
    saved = write_checkpoint(tmp_path / "expert", {f"model.{name}": tensor for name, tensor in values.items()})
    for first, second in ((base, Checkpoint(saved)), (Checkpoint(saved), base)):
        assert check_by_names(first, second, [r"lm_head\..*"], newer) == [
            name for name in first.entries if "lm_head" not in name
        ], "patterns match the published name too"
        assert list(second.entries) == list(first.entries)
    expert = Checkpoint(saved)
    check_by_names(Checkpoint(tmp_path / "base"), expert, [], newer)
    assert all(torch.equal(expert.read(name).view_as(value), value) for name, value in values.items())


def test_an_expert_that_has_a_tensor_under_both_names_is_refused(tmp_path):
    base = Checkpoint(write_checkpoint(tmp_path / "base", BASE))
    twice = {**BASE, "model.a.weight": torch.ones(4, 3)}
    with pytest.raises(InputError, match=r"has the tensor model\.a\.weight, which the base lacks"):
        check_by_names(base, Checkpoint(write_checkpoint(tmp_path / "expert", twice)), [], newer)


def test_everything_that_differs_is_reported_together(tmp_path, compare):
    tensors = {"a.weight": torch.ones(4, 4), "c.weight": torch.ones(1), "lm_head.weight": torch.ones(6, 3).long()}
    assert differences(tmp_path, compare, tensors, []) == [
        "lacks the tensor b.weight",
        "has the tensor c.weight, which the base lacks; is it an expert of this base? (or exclude it)",
        "a.weight has shape [4, 4], the base's has [4, 3]",
        "lm_head.weight is stored as I64, which cannot be merged; allowed: F64, F32, F16, BF16",
    ]


def test_more_vocabulary_rows_matter_only_where_they_are_merged(tmp_path, compare):
    tensors = {**BASE, "lm_head.weight": torch.ones(8, 3)}
    assert differences(tmp_path, compare, tensors, []) == [
        "lm_head.weight has shape [8, 3], the base's has [6, 3]; --embeddings mean, or base, matches rows by token"
    ]


def test_of_many_problems_the_first_are_shown(tmp_path, compare):
    extra = {f"extra.{number}": torch.ones(1) for number in range(9)}
    found = differences(tmp_path, compare, {**BASE, **extra})
    assert [line.split(",")[0] for line in found] == [
        *(f"has the tensor extra.{number}" for number in range(4)),
        "... and 5 more like the last",
    ]


def test_patterns_that_are_no_regular_expressions_are_all_reported(compare):
    with pytest.raises(InputError) as caught:
        compare(BASE, ["*.bias", ".*ok.*", "("])
    assert [line.split(":")[0] for line in caught.value.problems] == [
        "--exclude_params '*.bias' is not a regular expression",
        "--exclude_params '(' is not a regular expression",
    ]


def test_excluding_everything_is_refused(tmp_path, compare):
    with pytest.raises(InputError, match=r"^every parameter of .*base is excluded by --exclude_params; nothing would"):
        compare(BASE, [".*"])


def test_what_safetensors_reads_is_what_we_read(tmp_path):
    """All types that safetensors writes, with a scalar and empty tensors among them."""
    tensors = {
        f"{dtype}.{shape}": torch.ones(shape).to(dtype)
        for dtype in [*TYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
                      torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
        for shape in [(), (3,), (0,), (2, 0), (2, 3)]
    }  # fmt: skip
    checkpoint = Checkpoint(write_checkpoint(tmp_path, tensors))
    assert {name: entry.shape for name, entry in checkpoint.entries.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    floats = {name: tensor for name, tensor in tensors_of(tmp_path).items() if checkpoint.entries[name].is_float}
    assert_same_bytes({name: checkpoint.read(name).view(tensor.shape) for name, tensor in floats.items()}, floats)
    assert {tensor.dtype for tensor in floats.values()} == set(TYPES)


def test_a_file_that_is_cut_off_has_no_fingerprint(tmp_path):
    """Or its run could not be continued with the whole file."""
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "base", {"a": torch.ones(10)}))
    file = tmp_path / "base" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(InputError, match="a file of weights was cut off while it was read, as when it is downloaded"):
        checkpoint.fingerprint(whole=True)
