"""One run from its checked options to its result."""

from __future__ import annotations

import logging
import os
import secrets
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_merging import __version__
from expert_merging.backbone import Backbone
from expert_merging.errors import InputError, Problems
from expert_merging.machine import limit_threads
from expert_merging.options import Resolved, checkpoint_folders, command_line, show
from expert_merging.run import Run, default_name, provenance

if TYPE_CHECKING:
    from expert_merging.console import Terminal
    from expert_merging.learned import Work
    from expert_merging.merge import Summary
    from expert_merging.plan import Plan, Rule
    from expert_merging.streaming import Team

logger = logging.getLogger(__name__)

EVALUATION = "eval.json"

_COMPLETE = "this run is complete already; remove its folder to repeat it"

# Options that decide where and how a run is done but not its result.
_INDIFFERENT = ("cache_dir", "output_path", "run_name", "device", "log_with", "run_tests", "dry_run", "method")
# The same among the options of methods: they trade memory for time.
_SAVING = ("task_vectors", "rank_batches", "shard", "gradient_checkpointing", "logits_chunk_tokens")

# Seconds until what one machine writes to a shared folder is seen by the others.
_SHARING = 60


def is_main_process() -> bool:
    """Whether this process reports and writes what is written once; a launcher numbers the processes."""
    return os.environ.get("RANK", "0") == "0"


class Job:
    """One run from its checked options to its result."""

    def __init__(self, resolved: Resolved, backbone: Backbone, terminal: Terminal) -> None:
        from expert_merging.plan import make_plan

        self.resolved, self.backbone, self.terminal = resolved, backbone.configured(resolved.family), terminal
        problems = Problems()
        with problems.collecting():
            self.base, self.experts = checkpoint_folders(resolved.general, backbone)
            self.plan = make_plan(self.base, self.experts, resolved.general["exclude_params"], backbone.file_name)
        if resolved.general["device"] != "auto" or not problems.found:  # a wrong path needs no torch to be answered
            with problems.collecting():
                self.device = choose_device(resolved.general["device"], one_each=resolved.method.learns)
        problems.check()
        limit_threads()
        self.evaluation = backbone.evaluation_of(self.plan.base.model_type)
        self.team = _join_processes(resolved.method.learns, self.device)
        _check_one_per_expert(resolved, tuple(self.plan.experts))
        self.description = self._describe()
        self.run, self.work, earlier = self._open_run()
        if earlier is not None:
            self.description = earlier

    def _describe(self) -> dict[str, Any]:
        """The run's ``config.json``."""
        general = self.resolved.general
        decisive = {name: value for name, value in general.items() if name not in _INDIFFERENT}
        decisive |= {
            "base_model_path": str(self.base.resolve()),
            "expert": {name: str(folder.resolve()) for name, folder in self.experts.items()},
        }
        seed = general["seed"] if general["seed"] >= 0 else secrets.randbelow(2**31)
        return {
            "family": self.backbone.name,
            "method": self.resolved.method.name,
            "options": {
                **decisive,
                **{name: value for name, value in self._method_options().items() if name not in _SAVING},
            },
            "checkpoints": {
                name: checkpoint.fingerprint(whole=name == "base")
                for name, checkpoint in {"base": self.plan.base, **self.plan.experts}.items()
            },
            "inputs": {"device": self.device.split(":")[0], "version": __version__},
            "seed": seed,
            "run": {name: general[name] for name in ("output_path", "run_name", "log_with")}
            | {name: value for name, value in self.resolved.options.items() if name in _SAVING}
            | {"device": self.device},
            **provenance(),
            "command": command_line(),
        }

    def _method_options(self) -> dict[str, Any]:
        """Options that decide what the method does: its own, and the family's where it reads samples."""
        return {**self.resolved.options, **(self.resolved.family if self.resolved.reads_samples else {})}

    def _open_run(self) -> tuple[Run, Work | None, dict[str, Any] | None]:
        """The run's folder, and for a method that learns the work to do; all remaining checks."""
        from expert_merging.learned import Context
        from expert_merging.writing import check_free_disk

        general, method = self.resolved.general, self.resolved.method
        problems = Problems()
        parent, run_name = Path(general["output_path"]) / method.name, general["run_name"]
        if run_name is not None and (Path(run_name).name != run_name or run_name in (".", "..")):
            problems.add(f"--run_name is the name of a folder inside {parent}, got {run_name!r}")
            run_name = None
        name = run_name or default_name(self.evaluation.run_name or self.backbone.name, self.description)
        run = Run(parent / name, several=method.per_expert)
        with problems.collecting():
            _check_output(run.folder, [self.plan.base.folder, *self.experts.values()])
        problems.check()
        if general["seed"] < 0:
            self.description["seed"] = run.recorded_seed(self.description["seed"])
            self.description["seed"] = _from_main_process(self.description["seed"])
        work = None
        if method.learns:
            context = Context(
                self.backbone, run, self.description["seed"], self.device, general["log_with"], self.terminal.progress
            )
            with problems.collecting():
                work = method.function(self.plan, context, **self.resolved.options)
                self.description["inputs"] |= work.inputs
        if general["run_tests"]:
            with problems.collecting():
                self._check_questions()
        earlier = None
        # The main process writes to the folder while the others start, so it alone looks at it.
        if is_main_process() and not problems.found:
            with problems.collecting():
                earlier = run.check(self.description)
        if is_main_process() and not run.is_complete:
            with problems.collecting():
                check_free_disk(run.folder, self._missing_bytes(run))
        problems.check()
        return run, work, earlier

    def _check_questions(self) -> None:
        """Check that the merged model can be loaded and asked, for which it needs what its base needs."""
        base = self.plan.base.folder
        self.backbone.parameter_names(base)
        processor = self.backbone.load_processor(base)
        for sample in self.backbone.test_questions:
            self.backbone.encode_prompt(processor, sample, self.resolved.options.get("prompt_template"))

    def _missing_bytes(self, run: Run) -> int:
        results = self._results(run)
        written = [folder / file.name for folder in results for file in self.plan.base.files]
        return len(results) * self.plan.output_bytes - sum(file.stat().st_size for file in written if file.exists())

    def _results(self, run: Run) -> dict[Path, Plan]:
        """The folders to write, and what is merged into each."""
        if not self.resolved.method.per_expert:
            return {run.partial_model: self.plan}
        return {run.partial_model / expert: plan for expert, plan in self.plan.split().items()}

    def run_all(self) -> int:
        """Learn if the method learns, merge, report."""
        from expert_merging.advice import ignored_flags

        start = time.monotonic()
        summary = None
        if _from_main_process(self.run.is_complete):
            for line in ignored_flags(self.resolved):
                logger.warning("%s", line)
            logger.info(_COMPLETE)
        else:
            if is_main_process():
                self.run.begin(self.description)
                self.run.check(self.description)  # once more: nobody else can change it now
                self.terminal.log_to(self.run.log)
            self._log_start()
            self._meet()
            rule = self._rule()
            if not is_main_process() and self.team.size == 1:
                return 0  # has learned with the others; the main process merges
            summary = self._write(rule)
        self.team.part()
        if not is_main_process():
            return 0
        self._report(summary, time.monotonic() - start)
        if self.resolved.general["run_tests"]:
            for model in self._models():
                self._ask_questions(model)
        return 0

    def _meet(self) -> None:
        """Wait until every process of a parallel run sees the folder that the main process has begun.

        Raises:
            InputError: this one does not, as on a machine that does not share it.
        """
        begun = _from_main_process(self.run.config.read_text(encoding="utf-8") if is_main_process() else "")
        last = time.monotonic() + _SHARING
        while not (self.run.config.is_file() and self.run.config.read_text(encoding="utf-8") == begun):
            if time.monotonic() > last:
                raise InputError(
                    f"{self.run.folder} is another folder here than for the main process; the machines of a run need "
                    "an --output_path that all of them see"
                )
            time.sleep(0.2)

    def _log_start(self) -> None:
        logger.info("method %s, run folder %s", self.resolved.method.name, self.run.folder)
        for line in self.plan_lines():
            logger.info("%s", line)
        for line in self._warnings():
            logger.warning("%s", line)

    def _warnings(self) -> list[str]:
        from expert_merging.advice import warnings_before

        return warnings_before(
            self.resolved,
            self.backbone,
            self.plan,
            models=self._models(),
            memory=self._working_memory,
            device=self.device,
        )

    @property
    def _working_memory(self) -> int:
        import torch

        from expert_merging.merge import working_memory

        return working_memory(self.plan, elementwise=self.resolved.method.elementwise, device=torch.device(self.device))

    def _rule(self) -> Rule:
        """The method's rule; learning happens here."""
        if self.work is not None:
            return self.work.run().rule
        import torch

        from expert_merging.streaming import Passes

        passes = Passes(self.plan, torch.device(self.device), self.terminal.progress, self.team)
        return self.resolved.method.rule(passes, self.description["seed"], self.resolved.options)

    def _write(self, rule: Rule) -> Summary:
        """Write every resulting model; what was done, of the last one."""
        import torch

        from expert_merging.card import model_card
        from expert_merging.merge import Summary, write_merged
        from expert_merging.writing import write_atomically

        summary = Summary()
        for folder, plan in self._results(self.run).items():
            summary = write_merged(
                plan,
                rule,
                folder,
                elementwise=self.resolved.method.elementwise,
                device=torch.device(self.device),
                progress=self.terminal.progress,
                team=self.team,
            )
            if is_main_process():
                title = self.run.folder.name + (f"-{folder.name}" if self.resolved.method.per_expert else "")
                merged, tensors = len(plan.merged), len(plan.base.entries)
                loading = self.backbone.loading
                card = model_card(self.description, title=title, loading=loading, merged=merged, tensors=tensors)
                write_atomically(folder / "README.md", card.encode())
        if is_main_process():
            if self.evaluation.vlmeval:
                self._write_evaluation()
            self.run.finish()
        return summary

    def _write_evaluation(self) -> None:
        """Put a configuration for VLMEvalKit into every result, with the folder that it will have in the end."""
        from expert_merging.card import vlmeval_config
        from expert_merging.writing import write_atomically

        for folder, final in zip(self._results(self.run), self._models(), strict=True):
            name = "-".join([self.backbone.name, self.run.folder.name, *final.relative_to(self.run.model).parts])
            write_atomically(folder / EVALUATION, vlmeval_config(self.evaluation.vlmeval, name, final.resolve()))

    def _models(self) -> list[Path]:
        """Where the results are once the run is complete."""
        return [self.run.model / folder.relative_to(self.run.partial_model) for folder in self._results(self.run)]

    def plan_lines(self) -> list[str]:
        """The plan in words: experts, parameters, memory and disk."""
        from expert_merging.checkpoint import weights_in_other_formats
        from expert_merging.machine import gib
        from expert_merging.plan import show_size

        plan = self.plan
        tensors = len(plan.base.entries)
        lines = [
            f"base {plan.base.folder}",
            *(f"expert {name} {expert.folder}" for name, expert in plan.experts.items()),
        ]
        lines += [f"option {name} {show(value)}" for name, value in self._method_options().items() if value is not None]
        lines += list(self.work.notes) if self.work else []
        lines.append(
            f"{len(plan.merged)} of {tensors} tensors are merged ({plan.merged_elements / 1e6:.1f}M parameters), "
            f"{tensors - len(plan.merged)} keep the base's value"
        )
        written = len(self._results(self.run)) * plan.output_bytes
        needed = gib(self._working_memory)
        lines.append(f"writes {show_size(written)}; merging needs about {needed} of memory on {self.device}")
        unread = weights_in_other_formats(plan.base)
        if unread:
            lines.append(f"not copied, since they hold the base's weights: {', '.join(unread)}")
        return lines

    def print_plan(self) -> None:
        """Show the plan and what may be amiss with it."""
        for line in (f"method {self.resolved.method.name}, run folder {self.run.folder}", *self.plan_lines()):
            self.terminal.console.print(line, markup=False)
        for line in self._warnings():
            self.terminal.console.print(f"warning: {line}", markup=False)
        if self.run.is_complete:
            self.terminal.console.print(_COMPLETE)
        elif self.run.config.exists():
            self.terminal.console.print("this run has been begun and would be continued")
        self.terminal.console.print("dry run: all checks passed, nothing was written")

    def _report(self, summary: Summary | None, seconds: float) -> None:
        if summary is not None:
            if summary.kept_shards:
                logger.info("kept %d finished shards of an earlier, interrupted run", summary.kept_shards)
            if summary.changes:
                name = max(summary.changes, key=lambda key: summary.changes[key])
                where = " outside of them" if summary.kept_shards else ""
                logger.info("largest relative change%s: %.3g in %s", where, summary.changes[name], name)
            logger.info("done in %.1f s", seconds)
        if self.run.board.exists():
            logger.info("curves:       tensorboard --logdir %s", self.run.board)
        for model in self._models():
            logger.info("merged model: %s", model)
            logger.info("load it:      %s", self.backbone.loading[0].format(model=model))
            for command in self.evaluation.commands:
                logger.info("evaluate it:  %s", command.format(model=model, eval=model / EVALUATION))

    def _ask_questions(self, folder: Path) -> None:
        """Let a merged model answer the family's test questions."""
        import torch

        from expert_merging.learned.targets import generate, place

        logger.info("questions to  %s", folder)
        processor = self.backbone.load_processor(folder)
        dtype = torch.float32 if self.device == "cpu" else self.plan.base.entries[self.plan.merged[0]].torch_dtype
        model = self.backbone.load_model(folder, dtype).to(self.device)
        for sample in self.backbone.test_questions:
            inputs = self.backbone.encode_prompt(processor, sample, self.resolved.options.get("prompt_template"))
            answer, _ = generate(model, processor, place(inputs, torch.device(self.device), dtype), 128)
            pictures = "".join(f" [{picture.name}]" for picture in sample.images)
            logger.info("question: %s%s\nanswer: %s", sample.question, pictures, answer.strip())


def _join_processes(learns: bool, device: str) -> Team:
    """Meet the other processes of a parallel run; the team that merges, which for a method that learns is one process.

    Learning runs on what accelerate sets up for the device. Merging exchanges little, and always between CPUs.
    """
    from expert_merging.streaming import Team

    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Team()
    if learns:
        if device == "cpu":
            # Where torch sees a GPU, accelerate's barriers between CPUs use the GPU of each process's number, and there
            # may be none of that number. This must come before anything has asked CUDA for its devices.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from accelerate import PartialState

        # The others wait while the main process asks the experts, which may take longer than the usual ten minutes.
        PartialState(cpu=device == "cpu", timeout=timedelta(hours=12))
        return Team()
    import torch

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return Team(int(os.environ["RANK"]), size)


def _from_main_process(value: Any) -> Any:
    """The main process's value, in every process of a parallel run."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return value
    import torch

    shared = [value]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(shared)
    return shared[0]


def choose_device(asked: str, *, one_each: bool = False) -> str:
    """The device to compute on.

    Args:
        asked: ``cuda`` is the first GPU, or with a launcher of several processes this one's own; ``auto`` is the same
            where there is a GPU, and the CPU elsewhere.
        one_each: no two processes may have the same GPU.

    Raises:
        InputError: there is no such device, or only one where each process needs its own.
    """
    import torch

    if asked == "auto":
        return _own_gpu() if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise InputError(f"--device must be auto, cpu, cuda or cuda:NUMBER, got {asked!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be auto, cpu, cuda or cuda:NUMBER, got {asked!r}")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if one_each and processes > 1 and device.type == "cuda" and device.index is not None:
        raise InputError(
            f"--device {asked} is one GPU, and each of the {processes} processes on this machine needs one of its own; "
            "give --device cuda, or start one process"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {asked}: this machine has {torch.cuda.device_count()} GPUs that torch can use")
    return _own_gpu() if asked == "cuda" else asked


def _own_gpu() -> str:
    """The GPU of this process, by its number among those that a launcher has started on this machine.

    Raises:
        InputError: some process has none; all of them find that, since only the main process tells it.
    """
    import torch

    if "LOCAL_RANK" not in os.environ:
        return "cuda"
    number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", number + 1))
    if processes > count:
        raise InputError(
            f"{processes} processes run on this machine, and torch can use {count} of its GPUs; start one process for "
            "each GPU, or give --device cpu"
        )
    return f"cuda:{number}"


def _check_one_per_expert(resolved: Resolved, experts: tuple[str, ...]) -> None:
    given = resolved.options.get("scaling_coefficient")
    if isinstance(given, list) and len(given) != len(experts):
        raise InputError(
            f"--scaling_coefficient has {len(given)} values for {len(experts)} experts ({', '.join(experts)})"
        )


def _check_output(folder: Path, checkpoints: list[Path]) -> None:
    for checkpoint in checkpoints:
        if folder.resolve().is_relative_to(checkpoint.resolve()):
            raise InputError(
                f"the run folder {folder} would lie inside the checkpoint folder {checkpoint}, which is never written "
                "to; choose another --output_path"
            )
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    if not os.access(existing, os.W_OK):
        raise InputError(f"{existing} cannot be written to; choose another --output_path")
