"""A mask that all experts share: concrete subspace learning against its plain twin, and its noise."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from expert_merging.learned.coefficients import load_coefficients
from expert_merging.learned.masks import SharedMask
from expert_merging.learned.options import MaskOptions
from expert_merging.learned.parametrisations import Layout, Parametrisation
from expert_merging.parts import Part
from tests.checkpoints import BASE, EXPERTS, tensors_of
from tests.command import merge, merged, refusal
from tests.learned.training import make_trainer, make_twin
from tests.learned.twin import Example, Twin

CASES = {
    "rows": {},
    "columns": {"parametrisation": "column"},
    "entries": {"parametrisation": "chunk", "coeffs_size_dict": {"*.layers.1.*q_proj*": 10**9, "*k_proj*": 0}},
}


@dataclass
class MaskedTwin(Twin):
    """The mask's logits are parameters; the noise of each update is given."""

    noises: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.noise: dict[str, torch.Tensor] = {}
        self.raw = {name: torch.nn.Parameter(torch.zeros(1, raw.shape[1])) for name, raw in self.raw.items()}
        self.optimizer = torch.optim.AdamW(
            list(self.raw.values()), lr=self.learning_rate, weight_decay=1e-5, betas=(0.9, 0.999)
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
            self.optimizer, T_0=50, T_mult=2, eta_min=0.1 * self.learning_rate
        )

    def coefficients(self, name: str) -> torch.Tensor:
        first = torch.tensor(self.initial)[:, None]
        if name not in self.raw:
            return first
        mask = 1 / (1 + torch.exp(-(self.raw[name] + self.noise.get(name, 0.0)) / 0.5))
        return first * mask / mask.mean()

    def penalty(self) -> torch.Tensor:
        return torch.zeros(())

    def update(self, group: list[Example]) -> dict[str, torch.Tensor]:
        self.noise = self.noises.pop(0)
        gradients = super().update(group)
        self.noise = {}
        return gradients


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_gives_the_coefficients_of_the_plain_twin(case, answered_zoo, tmp_path, monkeypatch):
    noises: list[dict[str, torch.Tensor]] = []
    draw = SharedMask.draw

    def drawn(vector, seed):
        draw(vector, seed)
        if seed is not None:
            noises.append({name: vector.view(vector.noise, name).clone() for name in vector.places})

    monkeypatch.setattr(SharedMask, "draw", drawn)
    given = {"num_epochs": 2, "learning_rate": 0.1, "scaling_coefficient": [0.2, 0.3, 0.4], **CASES[case]}
    trainer = make_trainer(answered_zoo, tmp_path, kind=MaskOptions, **given)
    coefficients = trainer.train()
    assert len(noises) == 4
    assert all(not noises[0][name].equal(noises[1][name]) for name in noises[0])
    assert 1 < torch.cat([own.flatten() for own in noises[0].values()]).std() < 2.6, "a logistic's is 1.8"
    chunks = dict(trainer.settings.layout.chunks)
    options = {"chunks": chunks, "columns": case == "columns", "entropy": True, "learning_rate": 0.1}
    plain, examples = make_twin(trainer, **options)
    twin = MaskedTwin(plain.base, plain.experts, plain.merged, plain.initial, [], **options, noises=noises)
    twin.train(examples, 2, seed=3)
    for name, values in coefficients.values.items():
        torch.testing.assert_close(values, twin.coefficients(name).detach(), rtol=1e-3, atol=1e-3)
        if chunks[name] > 1:
            assert values.std(1).min() > 0
            torch.testing.assert_close(values[1] / values[0], torch.full_like(values[0], 1.5))
            torch.testing.assert_close(values.mean(1), torch.tensor([0.2, 0.3, 0.4]), rtol=1e-4, atol=1e-5)


def test_a_mask_has_the_gradient_of_autograd():
    torch.manual_seed(0)
    vector = SharedMask(Layout({"w": 4, "v": 1}, [0.3, 0.5]))
    assert vector.by_name()["w"].tolist() == [pytest.approx([0.3] * 4), pytest.approx([0.5] * 4)]
    assert vector.by_expert().shape == (2, 5)
    with torch.no_grad():
        vector.raw += torch.randn(5)
    values, part = vector().detach(), Part.whole("w", (4, 3))
    directions, gradient, own = torch.randn(2, 12), torch.randn(12), vector.view(values, "w")
    found = []
    for kind in (Parametrisation, SharedMask):
        total, weights = torch.zeros_like(own), torch.ones(12)
        for block in part.cut(5):  # of which a gradient is the sum
            some = slice(block.start, block.stop)
            kind.add_gradient(vector, total, own, directions[:, some], block, gradient[some])
            kind.add_merged(vector, weights[some], own, directions[:, some], block)
        found.append((total, weights))
    for slow, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow)


def test_noise_follows_from_its_seed_and_goes():
    first, second = (SharedMask(Layout({"w": 50}, [0.3])) for _ in range(2))
    for vector in (first, second):
        vector.draw("3/0")
    assert first.noise.equal(second.noise)
    assert first().std() > 0.1
    second.draw("3/1")
    assert not first.noise.equal(second.noise)
    other = SharedMask(Layout({"v": 2, "w": 50}, [0.3]))
    other.draw("3/0")
    assert other.view(other.noise, "w").equal(first.view(first.noise, "w")), "the order of tensors does not matter"
    first.draw(None)
    assert first().tolist() == [0.5] * 50


@pytest.mark.slow
def test_the_checkpoint_has_the_rows_behind_the_mask_and_can_be_written_again(answered_zoo, tmp_path):
    given = ["--cache_dir", answered_zoo, "--data_dir", answered_zoo / "dataset", "--samples_per_task", 1]
    run = merged(tmp_path / "out", "--method", "concrete_ta", *given, "--max_new_tokens", 4, "--num_epochs", 3)
    base, result = tensors_of(answered_zoo / BASE), tensors_of(run.model)
    experts = [tensors_of(answered_zoo / folder) for folder in EXPERTS.values()]
    for name, values in load_coefficients(run.folder).values.items():
        sums = sum(expert[name] - base[name] for expert in experts)
        torch.testing.assert_close(result[name], base[name] + values[0][:, None] * sums, rtol=1e-4, atol=1e-5)
    again = ["--cache_dir", answered_zoo, "--output_path", tmp_path, "--method", "coefficients", "--run_name", "again"]
    assert merge(*again, "--coefficients", run.folder) == 0
    written = tmp_path / "coefficients" / "again" / "model" / "model.safetensors"
    assert written.read_bytes() == (run.model / "model.safetensors").read_bytes()


def test_a_mask_of_one_number_for_each_tensor_is_refused_and_any_coefficient_is_taken(answered_zoo, tmp_path, capsys):
    given = ["--cache_dir", answered_zoo, "--data_dir", answered_zoo / "dataset", "--output_path", tmp_path]
    given += ["--method", "concrete_ta", "--scaling_coefficient", 1.5]
    for more in (["--parametrisation", "layer"], ["--coeffs_size_dict", '{"*": 1}']):
        assert refusal(capsys, *given, *more) == (
            "a mask with one number for each tensor leaves task arithmetic as it is, so there is nothing to learn; "
            "give --parametrisation row or column, or more chunks in --coeffs_size_dict"
        )
    assert merge(*given, "--dry_run") == 0
    assert "coefficients start at 1.5 and multiply task vectors" in capsys.readouterr().out


@pytest.mark.parametrize("first", [0.0, 1.0, 1.5])
def test_a_mask_begins_at_any_coefficient(first):
    options, layout = MaskOptions(), Layout({"w": 4, "v": 0}, [first], bounded=False)
    values = options.vector(layout, torch.device("cpu")).by_name()
    assert values["w"].tolist() == [pytest.approx([first] * 4)]
    assert values["v"].tolist() == [[first]]
