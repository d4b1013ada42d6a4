"""The three ways of running a model on calibration samples that `benchmarks.trainer` compares."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from benchmarks.shapes import Case, is_merged, make_model
from InternVL.layout import published_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from expert_merging.plan import Plan
    from expert_merging.running.targets import Target

# Tokens that every vocabulary has and that stand for text.
TOKENS = (1000, 30000)
ACCUMULATION, RATE, REGULARISATION = 8, 0.5, 0.8
# Tokens of the prompts and responses; with pictures, tokens of the text beside one to six tiles of 256 tokens each.
TEXT_TOKENS, TILE_TOKENS, TILE_PIXELS, MOST_TILES = (160, 480), 256, 448, 6


class Bench:
    """The models and samples of one case, and what is measured on them."""

    def __init__(self, case: Case) -> None:
        import torch

        from expert_merging.checkpoints.checkpoint import Checkpoint
        from expert_merging.plan import Plan

        self.case = case
        self.device = torch.device(case.device)
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        base, *experts = (Checkpoint(folder) for folder in case.folders)
        merged = [name for name, entry in base.entries.items() if is_merged(name, entry.shape)]
        self.plan: Plan = Plan(base, {folder.folder.name: folder for folder in experts}, tuple(merged))
        self.layers = (case.text_config["num_hidden_layers"] // 2,)
        self.model = make_model(case.config, case.device, self.dtype)
        self.fill(self.model, base)
        self.figures: dict[str, float] = {}
        self.device_peak = 0
        self.gradient: list[float] = []
        self.coefficients: list[float] = []

    def fill(self, model: Any, checkpoint: Any) -> None:
        """Give the model a checkpoint's weights."""
        import torch

        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(checkpoint.read(name).view_as(parameter))

    def inputs(self) -> list[dict[str, Tensor]]:
        """Model inputs of every sample, ordered by expert."""
        import torch

        generator = torch.Generator().manual_seed(1)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (1,), generator=generator))

        found = []
        for _ in range(self.case.samples // self.case.experts * self.case.experts):
            tokens = torch.randint(*TOKENS, (1, draw(*TEXT_TOKENS)), generator=generator)
            entries: dict[str, Tensor] = {}
            if "image_token_id" in self.case.config:
                tiles = draw(1, MOST_TILES)
                picture = torch.full((1, tiles * TILE_TOKENS), self.case.config["image_token_id"])
                tokens = torch.cat([tokens[:, :10], picture, tokens[:, 10:100]], dim=1)
                pixels = torch.randn(tiles, 3, TILE_PIXELS, TILE_PIXELS, generator=generator)
                entries["pixel_values"] = pixels.to(self.device, self.dtype)
            entries |= {"input_ids": tokens.to(self.device), "attention_mask": torch.ones_like(tokens).to(self.device)}
            found.append(entries)
        return found

    def owners(self) -> list[str]:
        """The expert of every sample."""
        each = self.case.samples // self.case.experts
        return [name for name in self.plan.experts for _ in range(each)]

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add seconds and processor seconds to the figures."""
        self.synchronize()
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self.synchronize()
        for kind, value in (("seconds", time.perf_counter() - wall), ("cpu_seconds", time.process_time() - processor)):
            self.figures[f"{name}_{kind}"] = self.figures.get(f"{name}_{kind}", 0.0) + value

    def synchronize(self) -> None:
        """Wait for the device."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def limit(self) -> None:
        """Forward and backward passes of a plain language model loss."""
        import torch

        from expert_merging.running.batches import pack, together

        merged = [value for name, value in self.model.named_parameters() if is_merged(name, value.shape)]
        for parameter in merged:
            parameter.requires_grad_(True)

        def run(entries: Sequence[dict[str, Tensor]]) -> None:
            for own in pack(entries, lambda entry: entry["input_ids"].numel(), self.case.batch_tokens):
                batch = together(own)
                labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
                logits = self.model(**batch, use_cache=False).logits[:, :-1].float()
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
                loss.backward()  # type: ignore[no-untyped-call]

        self.train_plainly(self.inputs(), run, lambda: self.model.zero_grad(set_to_none=True))

    def train_plainly(
        self,
        entries: Sequence[Any],
        run: Callable[[Sequence[Any]], None],
        step: Callable[[], object],
        *,
        warm_up: bool = True,
    ) -> None:
        """Go through all samples in the trainer's order, an update's at a time."""
        from expert_merging.learned.epochs import epoch_order

        if warm_up:
            run(entries[:1])
            step()
        with self.timed("learning"):
            order = epoch_order(self.owners(), 0, 0)
            for first in range(0, len(order), ACCUMULATION):
                run([entries[index] for index in order[first : first + ACCUMULATION]])
                step()

    def targets(self) -> list[Target]:
        """What the experts say about their samples."""
        import torch

        from expert_merging.questions.calibration import Sample
        from expert_merging.running.targets import Target, hidden_states

        found: list[Target] = []
        pairs = list(zip(self.owners(), self.inputs(), strict=True))
        for expert, checkpoint in self.plan.experts.items():
            self.fill(self.model, checkpoint)
            with self.timed("targets"), torch.no_grad():
                for entry in (entry for owner, entry in pairs if owner == expert):
                    hidden, last = hidden_states(self.model, entry)
                    tokens = torch.arange(last.shape[1], device=self.device)
                    sample = Sample(task=expert, expert=expert, identity=str(len(found)), question="", response="")
                    layers = tuple(hidden[layer][0] for layer in self.layers)
                    found.append(Target(sample, entry, tokens, last[0], layers, None))
        self.fill(self.model, self.plan.base)
        return found

    def ours(self) -> None:
        """The trainer."""
        import torch

        from expert_merging.catalogue import find_method
        from expert_merging.context import Context
        from expert_merging.learned.directions import PLAIN
        from expert_merging.learned.material import Material, warm_up
        from expert_merging.learned.options import LearningOptions
        from expert_merging.learned.parametrisations import Layout
        from expert_merging.learned.penalties import Distance
        from expert_merging.learned.settings import Settings
        from expert_merging.learned.task_vectors import TaskVectors
        from expert_merging.learned.trainer import Trainer
        from expert_merging.progress import no_progress
        from expert_merging.run import Run
        from expert_merging.running.objectives import alignment
        from expert_merging.running.samples import Samples

        bench, count = self, self.case.experts

        class Timed(Trainer):
            def _run_epochs(self, targets: list[Target]) -> None:
                warm_up(self.live, self.settings, targets[:1])
                with bench.timed("learning"):
                    super()._run_epochs(targets)

            def _collect(self, *arguments: Any) -> Tensor:
                sums = super()._collect(*arguments)
                bench.gradient = bench.gradient or (self.live.gradient * 0.3 * 0.7).tolist()
                return sums

            def _save(self, coefficients: Any) -> None:
                bench.coefficients = [float(value) for row in coefficients.values.values() for value in row.flatten()]

        targets = self.targets()
        options = LearningOptions(
            task_vectors=self.case.task_vectors,  # type: ignore[arg-type]
            weight_gradients=self.case.weight_gradients,  # type: ignore[arg-type]
            gradient_checkpointing=self.case.checkpointing,
        )
        objective = alignment(self.layers, temperature=1.0, logits_weight=1.0, hidden_states_weight=1.0)
        precision = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}[self.case.dtype]
        ones = dict.fromkeys(self.plan.merged, 1)
        start = (0.3,) * count
        samples = tuple(target.sample for target in targets)
        asked = Samples(samples, 0, precision, self.case.batch_tokens, options)
        settings = Settings(
            options=options,
            asked=asked,
            objective=objective,
            directions=PLAIN,
            scale=(1.0,) * count,
            layout=Layout(ones, start),
            penalty=Distance(REGULARISATION),
        )
        with tempfile.TemporaryDirectory() as folder:
            # Transformers' own names in memory, which those of files are not, lead to the same published names.
            backbone: Any = SimpleNamespace(file_name=published_name if "image_token_id" in self.case.config else str)
            context = Context(
                self.plan, backbone, Run(Path(folder)), 0, self.case.device, "none", no_progress, find_method
            )
            task_vectors = TaskVectors(self.plan, settings.scale, self.device)
            trainer = Timed(context, settings, Material(targets, task_vectors, self.model))
            if self.device.type == "cuda":
                self.device_peak = torch.cuda.max_memory_allocated()  # training measures anew
            trainer.train()
        self.figures["accumulates"] = float(trainer.live.accumulates)

    def twin(self) -> None:
        """The plain way, with weights and task vectors in the model's type."""
        import copy

        import torch
        from torch.nn import functional

        teachers = {}
        for name, checkpoint in self.plan.experts.items():
            teachers[name] = copy.deepcopy(self.model)
            self.fill(teachers[name], checkpoint)
        weights = {name: value.clone() for name, value in self.model.named_parameters()}
        task_vectors = {
            name: [teacher.get_parameter(name) - weights[name] for teacher in teachers.values()]
            for name in self.plan.merged
        }
        wide = torch.promote_types(self.dtype, torch.float32)
        raw = {
            name: torch.nn.Parameter(torch.logit(torch.full((len(teachers),), 0.3, device=self.device, dtype=wide)))
            for name in self.plan.merged
        }
        start = {name: torch.sigmoid(value).detach() for name, value in raw.items()}
        optimizer = torch.optim.AdamW(raw.values(), lr=RATE, weight_decay=1e-5, betas=(0.9, 0.999))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 50, 2, eta_min=0.1 * RATE)

        def run(entries: Sequence[tuple[str, dict[str, Tensor]]]) -> None:
            for expert, inputs in entries:
                run_one(expert, inputs)

        def run_one(expert: str, inputs: dict[str, Tensor]) -> None:
            options = {**inputs, "output_hidden_states": True, "use_cache": False}
            with torch.no_grad():
                wanted = teachers[expert](**options)
            merged = dict(weights)
            for name in self.plan.merged:
                values = torch.sigmoid(raw[name]).to(self.dtype)
                for value, task_vector in zip(values, task_vectors[name], strict=True):
                    merged[name] = merged[name] + value * task_vector
            found = torch.func.functional_call(self.model, merged, (), options)
            logs = [functional.log_softmax(output.logits[0].to(wide), dim=-1) for output in (found, wanted)]
            loss = functional.kl_div(logs[0], logs[1], reduction="sum", log_target=True) / len(logs[0])
            layer = self.layers[0]
            states = [output.hidden_states[layer][0].to(wide) for output in (found, wanted)]
            distance = sum((torch.sigmoid(value) - start[name]).abs().sum() for name, value in raw.items())
            loss = loss + functional.mse_loss(states[0], states[1]) + REGULARISATION * distance / len(raw)
            (loss / ACCUMULATION).backward()  # type: ignore[no-untyped-call]

        def step() -> None:
            self.gradient = (
                self.gradient
                or torch.cat([value.grad.clone() for value in raw.values() if value.grad is not None]).tolist()
            )
            torch.nn.utils.clip_grad_norm_(list(raw.values()), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

        entries = list(zip(self.owners(), self.inputs(), strict=True))
        run(entries[:1])
        optimizer.zero_grad()
        self.train_plainly(entries, run, step, warm_up=False)
        self.coefficients = [float(value) for row in raw.values() for value in torch.sigmoid(row.detach())]
