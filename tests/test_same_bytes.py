"""Every method gives the same bytes, whoever works, however files are cut, and after an interruption.

Closed forms do so with several processes of a launcher too. What is learned then differs by the order in which
gradients, or statistics of samples, are summed up.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from expert_merging import merge as driver
from expert_merging import streaming
from expert_merging.catalogue import all_methods
from expert_merging.learned.coefficients import Coefficients
from expert_merging.method import AT_MOST_TWO
from expert_merging.run import Run
from expert_merging.workers import Workers
from expert_merging.writing import ShardWriter
from tests.checkpoints import BASE, EXPERTS, make_zoo, tensors_of, write_checkpoint, write_tasks
from tests.command import assert_same_bytes, flags, forget_accelerate, merge
from tests.launching import run_together
from tests.low_rank.adapters import pairs_of, write_adapter
from tests.mixtures.merging import save_zoo

METHODS = all_methods()
LEARNED = [name for name, method in METHODS.items() if method.reads_samples]
CLOSED = [name for name in METHODS if name not in LEARNED]
ON_FACTORS = [name for name, method in METHODS.items() if method.prepare and "low_rank" in method.prepare.gives]
# What a run of a method needs beside the usual.
OPTIONS = {
    "evo": ["--evaluations", 5, "--population", 4],
    "m2n2": ["--evaluations", 6],
    "map": ["--evaluations", 12, "--trade_offs", 2],
    "consensus": ["--method", "task_arithmetic"],
    "svc": ["--method", "task_arithmetic"],
    "aim": ["--method", "task_arithmetic"],
    "featcal": ["--method", "task_arithmetic"],
    "distil": ["--method", "task_arithmetic", "--distil_epochs", 2],
    "harc": ["--method", "task_arithmetic"],
    "router_mean": ["--method", "task_arithmetic"],
}
# For experts that are mixtures themselves.
OF_MIXTURES = ("harc", "router_mean")
# How far weights may be apart that were learned in one process and in several, or with tensors in another order. Sums
# over samples and tensors are in float32 and in another order then.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """The same models as one file and as many, calibration files, and coefficients."""
    folder = tmp_path_factory.mktemp("same")
    make_zoo(folder / "one", num_hidden_layers=2)
    write_tasks(folder / "dataset", responses=dict.fromkeys(EXPERTS, "42"))
    save_zoo(folder / "mixtures" / "one", "mixtral")
    for root in (folder, folder / "mixtures"):
        for number, name in enumerate([BASE, *EXPERTS.values()]):
            cut_up(root / "one" / name, root / "many" / name, 5 - number)
    base = tensors_of(folder / "one" / BASE)
    names = [name for name in base if ".mlp." in name or ".self_attn." in name]
    modules = {name.removesuffix(".weight"): (base[name].shape[0], base[name].shape[1]) for name in names}
    for expert, pairs in pairs_of(dict.fromkeys(EXPERTS, 2), modules).items():
        write_adapter(folder / "adapters" / expert, pairs)
    values = {name: torch.linspace(0.1, 0.6, 6).view(3, 2) for name in names}
    Coefficients(tuple(EXPERTS), values, (1.0, 0.5, 1.0)).save(folder / "learned.safetensors")
    return folder


def cut_up(source: Path, target: Path, count: int) -> None:
    """A copy of a checkpoint in so many files."""
    tensors = sorted(tensors_of(source).items())
    write_checkpoint(target, *(dict(tensors[start::count]) for start in range(count)))
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())


def command(name: str, places: Path, layout: str, output: Path) -> list[object]:
    """The command of a method, or of a modifier, whose run is called as it is."""
    method, root = METHODS[name], places / "mixtures" if name in OF_MIXTURES else places
    folders = {expert: root / layout / folder for expert, folder in EXPERTS.items()}
    if name in ON_FACTORS:
        folders = {expert: places / "adapters" / expert for expert in EXPERTS}
    if AT_MOST_TWO in method.promises:
        del folders["Code"]
    given = ["--post" if method.is_modifier else "--method", name, *OPTIONS.get(name, [])]
    given += [*flags(root / layout / BASE, **folders), "--output_path", output, "--run_name", name]
    if method.reads_samples:
        given += ["--data_dir", places / "dataset", "--samples_per_task", 1, "--log_with", "none"]
    return [*given, "--coefficients", places / "learned.safetensors"] if name == "coefficients" else given


def result(output: Path, name: str) -> dict[str, torch.Tensor]:
    """All tensors of all folders of a run's result."""
    (config,) = output.glob(f"*/{name}/config.json")
    run = Run(config.parent)
    run.holds_several = not run.is_complete
    folders = [run.model, *(folder for folder in run.model.iterdir() if folder.is_dir())]
    return {f"{folder.name}/{key}": tensor for folder in folders for key, tensor in tensors_of(folder).items()}


def assert_close(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=CLOSE, atol=CLOSE)


class Workshop:
    """Who works, and on how much at a time."""

    def __init__(self, patch: pytest.MonkeyPatch, workers: Workers, block: int) -> None:
        patch.setattr(Workers, "for_entries", lambda *_: workers)
        patch.setattr("expert_merging.workers._BATCH", 3 * block)
        patch.setattr("expert_merging.wholes.SMALL_MODEL", 0)  # as many threads for matrices as torch has
        patch.setattr(streaming, "BLOCK", block)
        patch.setattr(streaming, "STEP", block // 3)
        patch.setattr(driver, "_COPY_BYTES", block)


def stop_at(patch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C at the end of the file of that number."""
    finish, finished = ShardWriter.finish, []

    def finish_or_stop(writer: ShardWriter) -> None:
        if writer.target.suffix == ".safetensors" and not {"statistics", "calibrated"} & {*writer.target.parts}:
            finished.append(writer.target)
            if len(finished) == number:
                raise KeyboardInterrupt
        finish(writer)

    patch.setattr(ShardWriter, "finish", finish_or_stop)


@pytest.fixture(scope="module")
def expected(places, tmp_path_factory):
    """Tensors that one worker makes in one go, of models in one file each, by method."""
    known: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    output = tmp_path_factory.mktemp("expected")

    def of(name: str, layout: str = "one") -> dict[str, torch.Tensor]:
        if (name, layout) not in known:
            assert merge(*command(name, places, layout, output / layout)) == 0
            forget_accelerate()
            known[name, layout] = result(output / layout, name)
        return known[name, layout]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_workers_blocks_files_and_interruptions_do_not_change_a_byte(name, places, expected, tmp_path):
    given = command(name, places, "many", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        Workshop(patch, Workers(2), 600)
        torch.set_num_threads(2)
        stop_at(patch, 1 if name == "moe" else 2)  # which makes a single file
        assert merge(*given) == 130
    (config,) = tmp_path.glob("*/*/config.json")
    run = Run(config.parent)
    assert not run.model.exists()
    forget_accelerate()
    with pytest.MonkeyPatch.context() as patch:
        Workshop(patch, Workers(2, forked=sys.platform == "linux"), 1200)
        torch.set_num_threads(1)
        assert merge(*given) == 0
    # Some write other files first, such as directions.
    others = ("moe", "align_merge")
    assert ("kept 1 finished shards" in run.log.read_text()) == (name not in others)
    found = result(tmp_path, name)
    # Coefficients of tensors in another order have sums in another order, and so has with other threads what a running
    # mixture computes, by which harc goes.
    compare = assert_close if name == "harc" else assert_same_bytes
    compare(found, expected(name, "many" if name in LEARNED else "one"))


def merge_all(names: Sequence[str], places: Path, output: Path) -> int:
    """Merge by methods, in each of several processes."""
    return sum(merge(*command(name, places, "many", output)) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("names", [CLOSED, *([name] for name in LEARNED)], ids=lambda names: names[-1])
def test_processes_of_a_launcher_do_not_change_a_byte_of_what_is_not_learned(names, places, expected, tmp_path):
    """And of what is learned little."""
    ended = run_together(2, merge_all, names, places, tmp_path, folder=tmp_path)
    assert ended.codes == (0, 0), ended.stderr
    for name in names:
        (assert_close if name in LEARNED else assert_same_bytes)(result(tmp_path, name), expected(name))
