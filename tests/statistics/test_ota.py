"""OTA with FFG against the authors' results, loops over entries, and whole models; second moments that users give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expert_merging.parts import Part
from expert_merging.statistics.ota import ota_ffg, saliency
from tests.checkpoints import BASE, EXPERTS, tensors_of
from tests.command import contents, merge, merged, refusal, refused
from tests.methods.elsewhere import assert_agrees, inputs, squares
from tests.statistics.made_up import DEVICES, task_vectors
from tests.statistics.made_up_entries import WHOLE, GivenEntries, entries


def thresholds_of(given: torch.Tensor, moments: torch.Tensor, density: float) -> torch.Tensor:
    """The k-th smallest saliency of each expert, k = floor((1 - density) * entries)."""
    ranked = saliency(given, moments).flatten(1).sort(1).values
    rank = int((1 - density) * ranked.shape[1] + 1e-9)
    return ranked[:, rank - 1] if rank else torch.zeros(len(given))


def run(given: torch.Tensor, moments: torch.Tensor, density: float, part: Part = WHOLE, **options: Any) -> torch.Tensor:
    thresholds = thresholds_of(given, moments, density)
    return ota_ffg(given.clone(), part, GivenEntries(moments), thresholds, **options)


@pytest.mark.parametrize(("density", "power"), [(0.3, 0.5), (0.7, 1.0), (1.0, 0.25)])
def test_it_gives_what_the_authors_code_gives(density, power):
    _, given = inputs()
    found = run(given, squares(), density, Part.whole("a", (6, 9)), ota_power=power)
    assert_agrees(found, "authors", f"ota {density} {power}")


def plainly(given: torch.Tensor, moments: torch.Tensor, density: float, power: float) -> torch.Tensor:
    """An entry at a time in float64, after all are ranked."""
    given, moments = given.double().flatten(1), moments.double().flatten(1)
    scores = (moments * given**2).tolist()
    least = [sorted(own)[int((1 - density) * len(own) + 1e-9) - 1] if density < 1 else 0.0 for own in scores]
    found = []
    for entry in range(given.shape[1]):
        kept = [k for k in range(len(given)) if scores[k][entry] >= least[k]]
        weights = {k: float(moments[k, entry]) ** power for k in kept}
        total = sum(weights.values())
        found.append(sum(weights[k] * float(given[k, entry]) for k in kept) / total if kept else 0.0)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("power", [0.5, 2.0])
@pytest.mark.parametrize("device", DEVICES)
def test_it_is_the_weighted_mean_of_what_is_kept(density, power, device):
    given, moments = task_vectors(), entries()
    thresholds = thresholds_of(given, moments, density)
    result = ota_ffg(given.clone().to(device), WHOLE, GivenEntries(moments), thresholds, ota_power=power)
    expected = plainly(given, moments, density, power)
    torch.testing.assert_close(result.cpu().flatten().double(), expected, rtol=1e-5, atol=1e-6)
    assert bool((expected == 0).any()) == (density < 1)


def test_what_it_must_be_in_simple_cases():
    given, moments = task_vectors(), entries()
    assert run(given[:1], moments[:1], 1.0).equal(given[0]), "one expert"
    torch.testing.assert_close(run(given, moments[:1].expand(3, -1, -1), 1.0), given.mean(0))
    torch.testing.assert_close(run(given, torch.zeros_like(moments), 1.0), given.mean(0))
    tiny = run(given, moments * 1e-30, 0.5)
    torch.testing.assert_close(tiny, run(given, moments, 0.5), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(run(given, moments, 0.5, scaling_coefficient=2.0), 2 * run(given, moments, 0.5))
    order = [2, 0, 1]
    torch.testing.assert_close(run(given[order], moments[order], 0.5), run(given, moments, 0.5))


@pytest.fixture
def arguments(tiny_zoo, dataset) -> list[object]:
    given = ["--method", "ota_ffg", "--cache_dir", tiny_zoo, "--data_dir", dataset]
    return [*given, "--samples_per_task", 2, "--mixed_precision", "no"]


def changes_of(zoo: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The base, and the task vectors of what is merged."""
    base, *experts = (tensors_of(zoo / folder) for folder in (BASE, *EXPERTS.values()))
    names = [name for name in base if "proj" in name]
    return base, {name: torch.stack([own[name] - base[name] for own in experts]) for name in names}


def check_merged(
    result: Mapping[str, torch.Tensor], zoo: Path, moments: Mapping[str, torch.Tensor], density: float
) -> None:
    """Compare with all entries of the model as one vector."""
    base, changes = changes_of(zoo)
    flat = [torch.cat([values[name].flatten(1) for name in changes], 1) for values in (changes, moments)]
    expected, found = (
        plainly(*flat, density, 0.5),
        torch.cat([(result[name] - base[name]).flatten() for name in changes]),
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)
    assert 0.2 < float((expected == 0).double().mean()) < 0.8


@pytest.mark.slow
def test_moments_are_estimated_by_squared_gradients(arguments, tiny_zoo, tmp_path):
    """Those of `fisher`, whose test compares them with whole models."""
    run = merged(tmp_path / "ota", *arguments)
    fisher = merged(tmp_path / "fisher", *arguments, "--method", "fisher")
    assert contents(run.statistics) == contents(fisher.statistics)
    kept = [load_file(run.statistics / f"{expert}.safetensors") for expert in EXPERTS]
    _, changes = changes_of(tiny_zoo)
    scales = [torch.cat([own[name].double() for name in changes]).square().mean().sqrt().float() for own in kept]
    moments = {
        name: torch.stack([own[name].view(shape.shape[1:]) / scale for own, scale in zip(kept, scales, strict=True)])
        for name, shape in changes.items()
    }
    check_merged(tensors_of(run.model), tiny_zoo, moments, 0.3)


def write_moments(folder: Path, zoo: Path, ending: str = "") -> tuple[dict[str, torch.Tensor], list[object]]:
    """Files of second moments, and the flags that name them."""
    _, changes = changes_of(zoo)
    generator = torch.Generator().manual_seed(7)
    moments = {name: torch.rand(own.shape, generator=generator) * 1e-12 for name, own in changes.items()}
    folder.mkdir()
    flags: list[object] = ["--second_moments"]
    for number, expert in enumerate(EXPERTS):
        file = folder / f"{expert}.safetensors"
        save_file({name + ending: own[number].contiguous() for name, own in moments.items()}, file)
        flags.append(f"{expert}={file}")
    return moments, flags


@pytest.mark.parametrize("ending", ["", ".exp_avg_sq"])
def test_moments_that_are_given_are_used_as_they_are(ending, arguments, tiny_zoo, tmp_path, capsys):
    moments, flags = write_moments(tmp_path / "moments", tiny_zoo, ending)
    run = merged(tmp_path / "out", *arguments[:4], *flags)
    check_merged(tensors_of(run.model), tiny_zoo, moments, 0.3)
    assert not run.statistics.exists()
    assert "asking the experts" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_is_not_continued_with_other_moments(arguments, tiny_zoo, tmp_path, capsys):
    _, flags = write_moments(tmp_path / "moments", tiny_zoo)
    given = [*arguments[:4], *flags, "--run_name", "r", "--output_path", tmp_path / "out"]
    assert merge(*given) == 0
    file = tmp_path / "moments" / "Math.safetensors"
    save_file({name: own * 2 for name, own in load_file(file).items()}, file)
    assert "second moments" in refusal(capsys, *given)


def test_files_that_do_not_fit_are_refused(arguments, tiny_zoo, tmp_path, capsys):
    _, flags = write_moments(tmp_path / "moments", tiny_zoo)
    start, output = arguments[:4], ["--output_path", tmp_path / "out"]
    problems = refused(capsys, *start, *output, flags[0], f"Chat={tmp_path}/none", f"Math={tmp_path}", flags[3])
    assert problems == [
        f"--second_moments {tmp_path}{name} is no file; give a safetensors file" for name in ("/none", "")
    ]
    problems = refused(capsys, *start, *output, *flags[:3], "Mat=x")
    assert problems == [
        "--second_moments: there is no expert 'Mat'. Did you mean 'Math'?",
        "--second_moments has no file of Code; give one for each expert, or none, and they are estimated from samples",
    ]
    chat, math, code = (tmp_path / "moments" / f"{name}.safetensors" for name in EXPERTS)
    whole, name = load_file(math), "model.layers.0.mlp.down_proj.weight"
    save_file({own: values for own, values in whole.items() if own != name}, math)
    save_file({own: values.T.contiguous() for own, values in load_file(code).items()}, code)
    chat.write_bytes(b"pickled")
    problems = refused(capsys, *start, *output, *flags)
    assert problems[0].startswith(f"{chat} is truncated or not a safetensors file")
    assert problems[1:] == [
        f"{math} has no second moments of {name}; exclude it, or give another file",
        f"{code} has second moments of {name} in the shape [48, 32], which has [32, 48]",
    ]
    assert not (tmp_path / "out").exists()


def test_endings_must_be_the_same(arguments, tiny_zoo, tmp_path, capsys):
    _, flags = write_moments(tmp_path / "moments", tiny_zoo)
    file = tmp_path / "moments" / "Code.safetensors"
    save_file({f"{name}.exp_avg_sq": values for name, values in load_file(file).items()}, file)
    problem = refusal(capsys, *arguments[:4], *flags, "--output_path", tmp_path / "out")
    assert problem == "--second_moments: some files have names that end with .exp_avg_sq, and others have not"


@pytest.mark.parametrize("faulty", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("density", [0.5, 1])
def test_moments_that_are_none_are_refused(faulty, density, arguments, tiny_zoo, tmp_path, capsys):
    _, flags = write_moments(tmp_path / "moments", tiny_zoo)
    file, name = tmp_path / "moments" / "Code.safetensors", "model.layers.1.mlp.up_proj.weight"
    values = load_file(file)
    values[name][3, 2] = faulty
    save_file(values, file)
    problem = refusal(capsys, *arguments[:4], *flags, "--density", density, "--output_path", tmp_path / "out")
    assert problem == f"{file} has second moments of {name} that are negative, NaN or infinite"
