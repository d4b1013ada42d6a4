"""The streaming driver against its plain twin, and what it leaves in the merged folder."""

from __future__ import annotations

import contextlib
import sys
import threading
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_merging import merge, streaming, wholes
from expert_merging.catalogue import all_methods, find_method
from expert_merging.context import Context
from expert_merging.errors import InputError
from expert_merging.kept import Kept
from expert_merging.merge import working_memory, write_output
from expert_merging.methods.linear import task_arithmetic, weight_average
from expert_merging.outputs import Copied, Merged, Output, Slot, mirror_of
from expert_merging.plan import Plan, make_plan
from expert_merging.progress import no_progress
from expert_merging.roles import is_word_table
from expert_merging.run import Run
from expert_merging.streaming import Passes, Reader
from expert_merging.workers import Workers
from Mistral.backbone import BACKBONE
from tests.checkpoints import tensors_of, write_checkpoint
from tests.command import assert_same_bytes, contents, merge_plainly, snapshot
from tests.test_workers import WORKERS

EXCLUDED = [".*norm.*"]
TYPES = [torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")


class Bar:
    """A progress bar that remembers."""

    def __init__(self):
        self.totals, self.counts = [], []

    @contextlib.contextmanager
    def __call__(self, title, total, unit):
        self.totals.append(total)
        self.counts.append(0.0)
        yield self.advance

    def advance(self, count, note=""):
        self.counts[-1] += count


def close(plan: Plan) -> None:
    for checkpoint in (plan.base, *plan.experts.values()):
        checkpoint.close()


def write_mirror(plan, rule, output, *, unit="entries", device=CPU, progress=no_progress):
    kept = Kept(output.with_name(f"{output.name}.json"), made_of=plan.opened)
    return write_output(mirror_of(plan), plan, rule, output, unit=unit, device=device, progress=progress, kept=kept)


def merge_folders(base, experts, output, rule=task_arithmetic, *, unit="entries", excluded=EXCLUDED):
    plan = make_plan(base, {f"E{number}": folder for number, folder in enumerate(experts)}, list(excluded))
    try:
        return write_mirror(plan, lambda task_vectors, _part, _base: rule(task_vectors), output, unit=unit)
    finally:
        close(plan)


def random_tensors(shapes, dtypes, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtypes[number % len(dtypes)])
        for number, (name, shape) in enumerate(shapes.items())
    }


SHAPES = {
    "layers.0.weight": (9, 5),
    "layers.0.norm.weight": (9,),
    "layers.1.weight": (33,),
    "scalar": (),
    "empty": (0, 4),
    "cube": (2, 3, 4),
    "one": (1,),
}


@pytest.fixture
def base(tmp_path):
    return write_checkpoint(tmp_path / "base", random_tensors(SHAPES, TYPES, 0))


@pytest.fixture
def experts(tmp_path):
    return [
        write_checkpoint(tmp_path / f"expert{number}", random_tensors(SHAPES, TYPES[number:] + TYPES[:number], number))
        for number in range(1, 4)
    ]


@pytest.fixture(params=["types of their own", "the base's types"])
def given_experts(request, experts, tmp_path):
    """Types decide whether all are copied to a GPU together."""
    if request.param == "types of their own":
        return experts
    return [write_checkpoint(tmp_path / f"like{number}", random_tensors(SHAPES, TYPES, number)) for number in (1, 2, 3)]


def whole_tensor_rule(task_vectors: torch.Tensor) -> torch.Tensor:
    """A rule that needs the tensor as a whole."""
    mean = task_vectors.mean(0)
    return (
        mean - mean.mean() if mean.dim() < 2 else mean * mean.flatten(1).norm(dim=1).view(-1, *[1] * (mean.dim() - 1))
    )


@settings(max_examples=40)
@given(data=st.data())
def test_streaming_gives_the_bytes_of_the_plain_twin(data):
    """Any shapes, types, shards, blocks and numbers of threads and processes."""
    draw = data.draw
    shapes = draw(
        st.dictionaries(st.sampled_from("abcdefg"), st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=5)
    )
    types = st.lists(st.sampled_from([*TYPES, torch.float64]), min_size=1, max_size=3)
    counts = [draw(st.integers(1, min(3, len(shapes)))) for _ in range(3)]
    elementwise = draw(st.booleans())
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "BLOCK", draw(st.integers(1, 50)))
        patch.setattr(streaming, "STEP", draw(st.integers(1, 50)))
        patch.setattr(merge, "_COPY_BYTES", draw(st.integers(1, 50)))
        workers = Workers(draw(st.integers(1, 3)), forked=draw(st.booleans()) and sys.platform == "linux")
        patch.setattr(Workers, "for_entries", lambda *_: workers)
        folders = []
        for seed, count in enumerate(counts):
            tensors = random_tensors(shapes, draw(types), seed)
            shards = [dict(list(tensors.items())[start::count]) for start in range(count)]
            folders.append(write_checkpoint(Path(folder) / str(seed), *shards))
        rule = task_arithmetic if elementwise else whole_tensor_rule
        excluded = draw(st.sampled_from([[], [sorted(shapes)[0]] if len(shapes) > 1 else []]))
        output = Path(folder) / "output"
        merge_folders(
            folders[0], folders[1:], output, rule, unit="entries" if elementwise else "tensor", excluded=excluded
        )
        assert_same_bytes(tensors_of(output), merge_plainly(folders[0], folders[1:], rule, excluded))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(tmp_path, dtype):
    """Arithmetic in the file's own type would round task vectors and their sum as well."""
    folders = [
        write_checkpoint(
            tmp_path / str(seed), {"a": torch.randn(5000, generator=torch.Generator().manual_seed(seed)).to(dtype)}
        )
        for seed in range(4)
    ]
    merge_folders(folders[0], folders[1:], tmp_path / "output", weight_average)
    merged = tensors_of(tmp_path / "output")["a"]
    exact = torch.stack([tensors_of(folder)["a"].double() for folder in folders[1:]]).mean(0)
    assert merged.dtype == dtype
    assert ((merged.double() - exact).abs() <= 0.501 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", [*TYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("unit", "rule"), [("entries", task_arithmetic), ("tensor", whole_tensor_rule)])
def test_where_experts_are_the_base_it_stays_to_the_bit(dtype, unit, rule, tmp_path):
    tensors = random_tensors(SHAPES, [torch.float64], 0)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    folders = [write_checkpoint(tmp_path / name, tensors) for name in ("base", "a", "b")]
    merge_folders(folders[0], folders[1:], tmp_path / "output", rule, unit=unit)
    assert_same_bytes(tensors_of(tmp_path / "output"), tensors)


def test_what_does_not_fit_float64_is_refused(tmp_path):
    folders = [write_checkpoint(tmp_path / name, {"a": torch.ones(3).double()}) for name in ("base", "a")]
    with pytest.raises(InputError, match="the merged a does not fit into F64"):
        merge_folders(*folders[:1], folders[1:], tmp_path / "output", lambda given: given[0] + float("inf"))


def test_one_expert_with_coefficient_one_is_that_expert_to_the_bit_in_half_precision(tmp_path):
    folders = [
        write_checkpoint(
            tmp_path / str(seed), {"a": torch.randn(5000, generator=torch.Generator().manual_seed(seed)).bfloat16()}
        )
        for seed in range(2)
    ]
    merge_folders(
        folders[0], folders[1:], tmp_path / "output", lambda given: task_arithmetic(given, scaling_coefficient=1.0)
    )
    assert tensors_of(tmp_path / "output")["a"].equal(tensors_of(folders[1])["a"])


def test_types_of_experts_may_differ_from_the_base_s(base, experts, tmp_path):
    merge_folders(base, experts, tmp_path / "output")
    merged = tensors_of(tmp_path / "output")
    assert {name: tensor.dtype for name, tensor in merged.items()} == {
        name: tensor.dtype for name, tensor in tensors_of(base).items()
    }
    assert_same_bytes(merged, merge_plainly(base, experts, task_arithmetic, EXCLUDED))


def test_what_is_not_merged_is_kept(tmp_path):
    kept = {"position_ids": torch.arange(9), "mask": torch.tensor([True, False]), "norm": torch.tensor([float("nan")])}
    base = write_checkpoint(tmp_path / "base", {**kept, "a": torch.ones(3)})
    expert = write_checkpoint(
        tmp_path / "expert", {"a": torch.ones(3) * 2, "position_ids": torch.arange(5), "norm": torch.zeros(7)}
    )
    merge_folders(base, [expert], tmp_path / "output")
    merged = tensors_of(tmp_path / "output")
    assert_same_bytes({name: merged[name] for name in kept}, kept)
    assert merged["a"].tolist() == pytest.approx([1.3] * 3)


def test_headers_and_metadata_are_the_base_s_byte_for_byte(tmp_path):
    shards = [{"b": torch.ones(3), "a": torch.ones(2, 2)}, {"c": torch.ones(4).half()}]
    base = write_checkpoint(tmp_path / "base", *shards, metadata={"format": "pt", "made by": "Zoë"})
    expert = write_checkpoint(
        tmp_path / "expert", {name: tensor * 3 for shard in shards for name, tensor in shard.items()}
    )
    merge_folders(base, [expert], tmp_path / "output")
    for file in base.glob("*.safetensors"):
        original, merged = file.read_bytes(), (tmp_path / "output" / file.name).read_bytes()
        length = 8 + int.from_bytes(original[:8], "little")
        assert "Zoë".encode() in original[:length]
        assert merged[:length] == original[:length]
        assert merged[length:] != original[length:]
        assert len(merged) == len(original)


OTHERS = {
    "README.md": b"# Base", "chat_template.jinja": b"{{ x }}", "generation_config.json": b"{}",
    "modeling_x.py": b"x = 1", "nested/deeper/notes.txt": b"\xff\x00", "tokenizer.model": b"spm", "empty.txt": b"",
    "model.safetensors.index.json": b"left over",
}  # fmt: skip
WEIGHTS = ["pytorch_model.bin", "model.gguf", "original/consolidated.00.pth", "consolidated.safetensors"]


def add_files(folder: Path) -> None:
    for name, content in {**OTHERS, **dict.fromkeys(WEIGHTS, b"weights")}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_every_other_file_is_copied_byte_for_byte(base, experts, tmp_path):
    add_files(base)
    (base / "modeling_x.py").chmod(0o755)
    merge_folders(base, experts, tmp_path / "output")
    expected = {name: content for name, content in OTHERS.items() if not name.endswith((".index.json", "README.md"))}
    expected |= {"README.base.md": b"# Base", "config.json": (base / "config.json").read_bytes()}
    written = contents(tmp_path / "output")
    del written["model.safetensors"]
    assert written == expected


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_all_cards_are_kept_where_the_base_is_a_merged_model_itself(times, count, base, experts, tmp_path):
    cards = {"README.md": b"third", "README.base.md": b"second", "README.base.base.md": b"first"}
    cards = dict(list(cards.items())[:count])
    for name, content in cards.items():
        (base / name).write_bytes(content)
    for _ in range(times):  # also where an interrupted run goes on
        merge_folders(base, experts, tmp_path / "output")
        (tmp_path / "output" / "README.md").write_text("new")
    kept = {name: content for name, content in contents(tmp_path / "output").items() if name.startswith("README")}
    assert kept == {"README.md": b"new", **{name.replace(".md", ".base.md"): cards[name] for name in cards}}


LONG = "n" * 246 + ".txt"


def test_names_that_are_as_long_as_a_disk_takes_them(experts, tmp_path):
    tensors = tensors_of(experts[0])
    base = write_checkpoint(tmp_path / "shards", {"one": tensors.pop("one")}, tensors)
    shards, index = sorted(base.glob("*.safetensors")), base / "model.safetensors.index.json"
    text = index.read_text()
    for number, shard in enumerate(shards):
        name = f"{number}{'s' * 237}.safetensors"
        text = text.replace(shard.name, name)
        shard.rename(base / name)
    index.write_text(text)
    (base / LONG).write_text("notes")
    (base / ("日" * 85)).write_text("notes")
    merge_folders(base, experts, tmp_path / "output")
    assert sorted(contents(tmp_path / "output")) == sorted(contents(base))


def test_one_tensor_has_one_place_in_a_file(base, experts, tmp_path):
    plan = make_plan(base, {"A": experts[0]}, EXCLUDED)
    (file,) = plan.base.files
    slot = Slot.of("first", "F32", (33,), Merged("layers.1.weight"))
    for others, problem in {
        (replace(slot, name="second", dtype="BF16"),): "second is what another slot of the file is in another type",
        (replace(slot, name="layers.1.weight", source=Copied("one")),): "merged for one slot and the name of another",
    }.items():
        output = Output({file.name: (slot, *others)})
        with pytest.raises(ValueError, match=problem):
            write_output(output, plan, task_arithmetic, tmp_path / "o", unit="entries", device=CPU, progress=Bar())
    close(plan)


def test_the_index_of_shards_is_copied(experts, tmp_path):
    tensors = tensors_of(experts[0])
    base = write_checkpoint(tmp_path / "shards", {"one": tensors.pop("one")}, tensors)
    merge_folders(base, experts, tmp_path / "output")
    index = "model.safetensors.index.json"
    assert (tmp_path / "output" / index).read_bytes() == (base / index).read_bytes()


def test_checkpoints_are_never_modified(base, experts, tmp_path):
    add_files(base)
    before = [snapshot(folder) for folder in (base, *experts)]
    merge_folders(base, experts, tmp_path / "output")
    assert [snapshot(folder) for folder in (base, *experts)] == before


def test_a_download_cache_of_links_is_merged_like_its_files(base, experts, tmp_path):
    """As huggingface_hub lays it out: a snapshot of links to blobs."""
    add_files(base)
    snapshot_folder = tmp_path / "models--x" / "snapshots" / "abc"
    (tmp_path / "models--x" / "blobs").mkdir(parents=True)
    for number, (name, content) in enumerate(contents(base).items()):
        (tmp_path / "models--x" / "blobs" / str(number)).write_bytes(content)
        (snapshot_folder / name).parent.mkdir(parents=True, exist_ok=True)
        depth = 2 + name.count("/")
        (snapshot_folder / name).symlink_to("../" * depth + f"blobs/{number}")
    before = snapshot(tmp_path / "models--x")
    merge_folders(base, experts, tmp_path / "plain")
    merge_folders(snapshot_folder, experts, tmp_path / "linked")
    assert contents(tmp_path / "linked") == contents(tmp_path / "plain")
    assert not any(path.is_symlink() for path in (tmp_path / "linked").rglob("*"))
    assert snapshot(tmp_path / "models--x") == before


def test_finished_shards_are_kept_and_partial_ones_written_again(experts, tmp_path):
    tensors = tensors_of(experts[0])
    base = write_checkpoint(tmp_path / "shards", {"one": tensors.pop("one")}, {"cube": tensors.pop("cube")}, tensors)
    merge_folders(base, experts, tmp_path / "whole")
    output = tmp_path / "output"
    merge_folders(base, experts, output)
    first, second, third = sorted(output.glob("*.safetensors"))
    second.rename(f"{second}.partial")
    third.unlink()
    before = (first.stat().st_ino, first.stat().st_mtime_ns)
    summary = merge_folders(base, experts, output)
    assert summary.kept_shards == 1
    assert summary.changes.keys() == tensors.keys() - {"layers.0.norm.weight"} | {"cube"}
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == before
    assert contents(output) == contents(tmp_path / "whole")


def test_relative_changes_are_reported(tmp_path):
    base = write_checkpoint(
        tmp_path / "base", {"a": torch.full((40,), 2.0), "zero": torch.zeros(3), "empty": torch.zeros(0)}
    )
    expert = write_checkpoint(
        tmp_path / "expert", {"a": torch.full((40,), 3.0), "zero": torch.ones(3), "empty": torch.zeros(0)}
    )
    summary = merge_folders(base, [expert], tmp_path / "output", weight_average)
    assert summary.changes == {"a": pytest.approx(0.5), "zero": 0.0, "empty": 0.0}
    assert summary.kept_shards == 0


def test_progress_ends_at_its_total(base, experts, tmp_path):
    plan = make_plan(base, dict(zip("ABC", experts, strict=True)), EXCLUDED)
    for _again in range(2):
        bar = Bar()
        write_mirror(plan, lambda given, _part, _base: given[0], tmp_path / "o", progress=bar)
        assert bar.counts == pytest.approx(bar.totals)
        assert bar.totals == [sum(entry.size for entry in plan.base.entries.values()) * 4]
    close(plan)


def test_rules_get_the_blocks_or_the_tensors_that_they_ask_for(base, experts, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 10)
    monkeypatch.setattr(streaming, "STEP", 8)
    plan = make_plan(base, {"A": experts[0], "B": experts[1]}, EXCLUDED)
    lock, seen = threading.Lock(), []

    def rule(task_vectors, part, base):
        assert task_vectors.dtype == torch.float32
        assert part.shape == SHAPES[part.name]
        with lock:
            seen.append((part.name, part.start, part.stop, tuple(task_vectors.shape)))
        return task_vectors[0]

    write_mirror(plan, rule, tmp_path / "blocks")
    assert sorted(entry for entry in seen if entry[0] == "layers.1.weight") == [
        *(("layers.1.weight", start, start + size, (2, size)) for start in (0, 10, 20) for start, size in
          ((start, 8), (start + 8, 2))),
        ("layers.1.weight", 30, 33, (2, 3)),
    ]  # fmt: skip
    seen.clear()
    write_mirror(plan, rule, tmp_path / "rows", unit="rows")
    assert sorted(entry[:3] for entry in seen if entry[0] in ("layers.0.weight", "layers.1.weight", "cube")) == [
        *(("cube", start, start + 8) for start in (0, 8, 16)),
        *(("layers.0.weight", start, start + 5) for start in range(0, 45, 5)),
        ("layers.1.weight", 0, 33),
    ]
    seen.clear()
    write_mirror(plan, rule, tmp_path / "whole", unit="tensor")
    assert {entry[0]: entry[3] for entry in seen} == {
        name: (2, *shape) for name, shape in SHAPES.items() if "norm" not in name and 0 not in shape
    }
    assert len(seen) == 5
    close(plan)


def test_embeddings_and_heads_are_no_matrices(tmp_path):
    """Matrix methods give them the mean, whatever comes before their names."""
    shapes = {
        "model.embed_tokens.weight": (9, 5), "lm_head.weight": (9, 5), "transformer.wte.weight": (9, 5),
        "model.lm_head_norm.weight": (9, 5), "embed_tokens.weight": (9, 5), "language_model.lm_head.weight": (9, 5),
        "language_model.model.tok_embeddings.weight": (9, 5), "language_model.output.weight": (9, 5),
        "output.weight": (9, 5), "layers.0.output.weight": (9, 5),
    }  # fmt: skip
    folders = [write_checkpoint(tmp_path / str(seed), random_tensors(shapes, [torch.float32], seed)) for seed in (0, 1)]
    seen = []

    def rule(task_vectors):
        seen.append(task_vectors.dim())
        return task_vectors[0]

    merge_folders(folders[0], folders[1:], tmp_path / "output", rule, unit="tensor", excluded=())
    assert sorted(seen) == [2] * 8 + [3] * 2
    assert_same_bytes(
        tensors_of(tmp_path / "output"), merge_plainly(folders[0], folders[1:], lambda given: given[0], ())
    )


def test_memory_is_estimated_by_blocks_or_by_the_largest_tensors(base, experts, monkeypatch):
    monkeypatch.setattr(Workers, "for_entries", lambda *_: Workers(2))
    plan = make_plan(base, dict(zip("ABC", experts, strict=True)), EXCLUDED)
    largest = 4 * 7 * 45 + 8 * (3 * 45 + 4 * 5 * 5)  # a matrix of nine rows and five columns
    assert working_memory(plan, unit="tensor", device=CPU) == largest
    monkeypatch.setattr(wholes, "SMALL_MODEL", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert working_memory(plan, unit="tensor", device=CPU) == largest + 4 * 7 * 33
    monkeypatch.setattr(merge, "half_of_memory", lambda device: largest + 1)
    assert working_memory(plan, unit="tensor", device=CPU) == largest + 1
    monkeypatch.setattr(streaming, "BLOCK", 10)
    assert working_memory(plan, unit="entries", device=CPU) == 4 * 7 * 10 * 2
    assert working_memory(plan, unit="entries", device=CPU, copies=1) == 4 * 10 * 10 * 2
    assert mirror_of(plan).size == (base / "model.safetensors").stat().st_size
    assert plan.merged_elements == 45 + 33 + 1 + 24 + 1


@pytest.mark.parametrize("room", [0, 200_000, 10**9])
def test_matrix_rules_run_side_by_side_as_far_as_memory_allows(room, tmp_path, monkeypatch):
    """They give the same bytes, the largest tensor alone may need more than there is, and nothing waits for ever."""
    monkeypatch.setattr(wholes, "SMALL_MODEL", 0)
    monkeypatch.setattr(merge, "half_of_memory", lambda device: room)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    shapes = {name: (60, 40 + number) for number, name in enumerate("abcdef")}
    folders = [
        write_checkpoint(tmp_path / str(seed), random_tensors(shapes, [torch.float32], seed)) for seed in range(3)
    ]
    running, most, lock = [0], [0], threading.Lock()
    both = threading.Barrier(2)

    def rule(task_vectors):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        if room == 10**9:
            both.wait(timeout=60)  # would never pass if one waited for the other
        merged = whole_tensor_rule(task_vectors)
        with lock:
            running[0] -= 1
        return merged

    merge_folders(folders[0], folders[1:], tmp_path / "output", rule, unit="tensor", excluded=())
    assert_same_bytes(tensors_of(tmp_path / "output"), merge_plainly(folders[0], folders[1:], whole_tensor_rule, ()))
    assert most[0] == 1 if room < 10**9 else most[0] >= 2


def test_the_number_of_torch_s_threads_is_restored(base, experts, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        merge_folders(base, experts, tmp_path / "output")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("culprit", [0, 2])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_nan_and_infinity_are_refused_by_expert_and_tensor(tmp_path, dtype, culprit, value):
    folders = []
    for seed in range(3):
        tensors = random_tensors({"a": (20,), "b": (30,)}, [dtype], seed)
        if seed == culprit:
            tensors["b"][7:9] = value
        folders.append(write_checkpoint(tmp_path / str(seed), {"a": tensors["a"]}, {"b": tensors["b"]}))
    with pytest.raises(InputError) as caught:
        merge_folders(folders[0], folders[1:], tmp_path / "output")
    who = {0: "the base", 2: "expert E1"}[culprit]
    file = folders[culprit] / "model-00002-of-00002.safetensors"
    assert str(caught.value) == f"{who} has 2 NaN or infinite values in b ({file})"
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["model-00001-of-00002.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_results_beyond_the_base_s_type_are_refused(tmp_path, dtype):
    largest = torch.finfo(dtype).max
    base = write_checkpoint(tmp_path / "base", {"a": torch.tensor([0.0, 0.9 * largest]).to(dtype)})
    expert = write_checkpoint(tmp_path / "expert", {"a": torch.tensor([0.0, largest]).to(dtype)})
    with pytest.raises(InputError) as caught:
        merge_folders(base, [expert], tmp_path / "output", lambda given: given[0] * 3)
    name = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    assert str(caught.value) == (f"the merged a does not fit into {name} (the base's type); use a smaller coefficient")
    assert not list((tmp_path / "output").iterdir())


def test_large_values_that_only_a_sum_cannot_hold_are_merged(tmp_path):
    base = write_checkpoint(tmp_path / "base", {"a": torch.zeros(4)})
    expert = write_checkpoint(tmp_path / "expert", {"a": torch.full((4,), 3e38)})
    merge_folders(base, [expert], tmp_path / "output")
    assert tensors_of(tmp_path / "output")["a"].tolist() == pytest.approx([9e37] * 4)


def test_differences_that_float32_cannot_hold_are_refused(tmp_path):
    base = write_checkpoint(tmp_path / "base", {"a": torch.full((4,), -3e38)})
    expert = write_checkpoint(tmp_path / "expert", {"a": torch.full((4,), 3e38)})
    with pytest.raises(InputError) as caught:
        merge_folders(base, [expert], tmp_path / "output")
    assert str(caught.value) == "experts differ from the base in a by more than float32 can hold"
    assert not list((tmp_path / "output").iterdir())


def test_an_error_in_a_rule_reaches_the_caller_and_leaves_no_file(base, experts, tmp_path):
    def fail(task_vectors):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        merge_folders(base, experts, tmp_path / "output", fail)
    assert not list((tmp_path / "output").iterdir())


def test_problems_of_all_checkpoints_are_reported_together(base, tmp_path):
    with pytest.raises(InputError) as caught:
        make_plan(tmp_path / "no base", {"A": tmp_path / "no a", "B": base}, ["("])
    assert caught.value.problems == (
        f"checkpoint folder {tmp_path / 'no base'} does not exist",
        f"checkpoint folder {tmp_path / 'no a'} does not exist",
    )
    with pytest.raises(InputError) as caught:
        make_plan(base, {"A": tmp_path / "no a", "B": write_checkpoint(tmp_path / "b", {"one": torch.ones(3)})}, [])
    assert caught.value.problems[0] == f"checkpoint folder {tmp_path / 'no a'} does not exist"
    assert f"expert B ({tmp_path / 'b'}): one has shape [3], the base's has [1]" in caught.value.problems


def test_without_experts_there_is_nothing_to_merge(base):
    with pytest.raises(InputError, match=r"^there is nothing to merge: give at least one --expert NAME=PATH$"):
        make_plan(base, {}, [])


def test_dead_links_of_the_base_are_found_before_anything_is_read(base, experts):
    (base / "tokenizer.json").symlink_to("gone")
    with pytest.raises(InputError, match=r"tokenizer.json is a link to a file that is gone; download it again$"):
        make_plan(base, {"A": experts[0]}, [])


@pytest.mark.parametrize("sample", [1, 4])
def test_passes_go_over_every_entry_once_or_over_the_first_of_every_block(sample, base, experts, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 10)
    monkeypatch.setattr(streaming, "STEP", 2)
    plan, bar = make_plan(base, {"A": experts[0]}, EXCLUDED), Bar()

    def count(task_vectors, part, counts):
        assert task_vectors.shape == (1, part.stop - part.start)
        if part.name == "layers.1.weight":
            counts[part.start : part.stop] += 1

    counted = Passes(plan, CPU, bar).total(count, (33,), "counting", None, sample)
    assert counted.tolist() == ([1] * 33 if sample == 1 else ([1] * 3 + [0] * 7) * 3 + [1, 0, 0])
    assert bar.counts == pytest.approx(bar.totals)
    close(plan)


@pytest.mark.parametrize("workers", WORKERS)
def test_sums_of_each_tensor_do_not_depend_on_who_adds(workers, base, experts, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 10)
    monkeypatch.setattr(streaming, "STEP", 4)
    monkeypatch.setattr(Workers, "for_entries", lambda *_: workers)
    plan, bar = make_plan(base, {"A": experts[0], "B": experts[1]}, EXCLUDED), Bar()

    def measure(base, task_vectors, part):
        return torch.cat([base.sum()[None], task_vectors.sum(1), torch.tensor([part.entries])])

    found = Passes(plan, CPU, bar).sums(measure, (4,), "adding up")
    assert list(found) == list(plan.merged)
    first = tensors_of(base)
    for name, sums in found.items():
        vectors = [tensors_of(folder)[name].double() - first[name].double() for folder in experts[:2]]
        expected = [first[name].double().sum(), *(vector.sum() for vector in vectors), first[name].numel()]
        torch.testing.assert_close(sums, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert bar.counts == pytest.approx(bar.totals)
    close(plan)


@pytest.mark.parametrize("threads", [1, 3])
def test_whole_tensors_are_measured_once_each(threads, base, experts, monkeypatch):
    monkeypatch.setattr(wholes, "SMALL_MODEL", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    plan, bar = make_plan(base, {"A": experts[0], "B": experts[1]}, EXCLUDED), Bar()

    def measure(task_vectors, part):
        shape = tuple(task_vectors.shape[1:])
        assert shape == part.shape or is_word_table(part.name)
        return torch.stack([task_vectors[0].sum(), task_vectors[1].abs().max()])

    found = Passes(plan, CPU, bar).measure_wholes(measure, (2,), "measuring")
    assert list(found) == [name for name in plan.merged if plan.base.entries[name].elements]
    first = tensors_of(base)
    for name, numbers in found.items():
        one, other = (tensors_of(folder)[name].double() - first[name].double() for folder in experts[:2])
        torch.testing.assert_close(numbers, torch.stack([one.sum(), other.abs().max()]), rtol=1e-5, atol=1e-5)
    assert bar.counts == pytest.approx(bar.totals)
    close(plan)


class StandIn:
    """What a GPU's stream does, on a CPU: nothing."""

    def synchronize(self):
        pass


class StandInReader(Reader):
    """Reads as for a GPU, but on the CPU."""

    def __init__(self, plan, device):
        super().__init__(plan, device)
        self.stream = StandIn()


METHODS = [name for name, method in all_methods().items() if method.is_closed_form]


def merge_by_method(name: str, base: Path, experts: list[Path], output: Path, device: torch.device):
    plan = make_plan(base, {f"E{number}": folder for number, folder in enumerate(experts)}, EXCLUDED)
    method = find_method(name)
    options = {option.name: option.default for option in method.options.values()}
    context = Context(plan, BACKBONE, Run(output.parent), 3, str(device), "none", Bar(), find_method)
    known = {"seed": 3, "experts": tuple(plan.experts), **method.prepared(context, options).run()}
    write_mirror(plan, method.rule(known, options), output, unit=method.unit, device=device)
    close(plan)
    return tensors_of(output)


@pytest.mark.parametrize("name", ["svd", "iwudi"])
def test_matrix_methods_give_the_same_bytes_with_any_number_of_threads(name, tmp_path, monkeypatch):
    """Matrices are so large that products of several threads would be summed up in another order."""
    monkeypatch.setattr(wholes, "SMALL_MODEL", 0)
    shapes = {"a.weight": (300, 200), "b.weight": (200, 300), "c.weight": (250, 250)}
    folders = [write_checkpoint(tmp_path / str(seed), random_tensors(shapes, TYPES, seed)) for seed in range(3)]
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(merge_by_method(name, folders[0], folders[1:], tmp_path / f"output{threads}", CPU))
    torch.set_num_threads(before)
    assert_same_bytes(*results)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("name", ["dare_ties", "della", "varm", "pcb"])
def test_passes_and_merges_give_the_same_bytes_whoever_does_them(name, workers, base, experts, tmp_path, monkeypatch):
    expected = merge_by_method(name, base, experts, tmp_path / "expected", CPU)
    monkeypatch.setattr(Workers, "for_entries", lambda *_: workers)
    monkeypatch.setattr(streaming, "BLOCK", 10)
    monkeypatch.setattr("expert_merging.workers._BATCH", 20)
    assert_same_bytes(merge_by_method(name, base, experts, tmp_path / "output", CPU), expected)


@pytest.mark.parametrize("name", ["dare_ties", "della", "iso", "pcb"])
def test_reading_as_for_a_gpu_gives_the_same(name, base, given_experts, tmp_path, monkeypatch):
    expected = merge_by_method(name, base, given_experts, tmp_path / "expected", CPU)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **keywords: empty(*args, **keywords))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(merge, "Reader", StandInReader)
    monkeypatch.setattr(streaming, "Reader", StandInReader)
    monkeypatch.setattr(streaming, "BLOCK", 10)
    assert_same_bytes(merge_by_method(name, base, given_experts, tmp_path / "output", CPU), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", METHODS)
def test_a_gpu_gives_nearly_the_same(name, base, given_experts, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "GPU_BLOCK", 10)
    expected = merge_by_method(name, base, given_experts, tmp_path / "expected", CPU)
    for tensor_name, tensor in merge_by_method(name, base, given_experts, tmp_path / "o", torch.device("cuda")).items():
        torch.testing.assert_close(tensor, expected[tensor_name], rtol=1e-2, atol=1e-2)
