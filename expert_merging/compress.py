"""Make a mixture smaller: fewer experts in each layer, by what its routers and experts do on samples.

The mixture is loaded once and runs over the samples. What it has shown decides which experts stay or become one, and
then the new folder is written tensor by tensor, in the layout that the mixture had.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from expert_merging.console import say
from expert_merging.documents import resolved
from expert_merging.errors import InputError, Problems
from expert_merging.flags import Count
from expert_merging.running.options import SampleOptions
from expert_merging.writing import check_free_disk, check_new_folder, making_folder, write_atomically

if TYPE_CHECKING:
    from rich.console import Console

    from expert_merging.console import Terminal
    from expert_merging.context import Context
    from expert_merging.mixtures.compressed import StoredMixture
    from expert_merging.mixtures.grouping import Group, LayerStatistics
    from expert_merging.running.samples import Samples

# What the mixture is called in messages about samples.
NAME = "mixture"
RECORD = "compression.json"
_CARD = """---
base_model:
- {source}
tags:
- mixture-of-experts
- expert-merging
---

# {title}

The mixture {base} with {count} instead of {experts} experts in each layer, by {method} on {samples} calibration
samples. `{record}` says which experts each one is made of. All else is the mixture's.
"""


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """Options of ``python -m expert_merging compress``.

    Args:
        output: folder that is made.
        experts: how many experts each layer keeps.
        method: reap keeps those whose weighted outputs are largest; m_smoe merges experts into the most used ones, by
            their routers' logits; hc_smoe merges experts whose mean outputs are alike.
        data_dir: folder with calibration files, TASK.json; all of them are taken.
        samples_per_task: samples taken from each file, from its beginning.
        loss_tokens: look at all tokens, or at those that predict the response.
        mixed_precision: type of the weights while the mixture runs; auto is bf16 or fp16 on a GPU and float32 on a CPU.
        max_new_tokens: bound on the length of the responses that the mixture writes where the files have none.
        prompt_template: text with {question} in it; by default the mixture's own words.
        family: model family of the mixture, as its folder is called; by default by its config.json.
        device: where to compute; auto takes the first GPU if there is one.
    """

    output: str | None = None
    experts: Count | None = None
    method: Literal["reap", "m_smoe", "hc_smoe"] = "reap"
    data_dir: str | None = None
    samples_per_task: Count = 128
    loss_tokens: Literal["all", "response"] = "all"
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    max_new_tokens: Count = 128
    prompt_template: str | None = None
    family: str | None = None
    device: str = "auto"


def compress(place: Path, options: CompressOptions, console: Console) -> None:
    """Write a mixture with fewer experts as a complete model folder.

    Args:
        place: the mixture: a folder, a run, or a repository on the Hub.
        options: the command's options.
        console: told what is written.

    Raises:
        InputError: every problem found, before anything is written.
    """
    from expert_merging.console import Terminal

    count, target = _given(options)
    with tempfile.TemporaryDirectory() as scratch, closing(Terminal()) as terminal:
        context, mixture, samples = _check(place, options, Path(scratch), terminal)
        base = mixture.base
        mixture.check(count)
        check_new_folder(target, [base.folder], "--output")
        check_free_disk(target, mixture.total("size", count), "--output")
        for line in _plan(mixture, count, samples):
            say(console, line)
        groups = _groups(context, mixture, samples, options.method, count)
        with making_folder(target) as partial:
            _write(partial, context, mixture, groups, options.method, samples)
    for line in _told(groups):
        say(console, line)
    say(console, f"compressed mixture: {target}")


def _given(options: CompressOptions) -> tuple[int, Path]:
    """The number of experts and the new folder.

    Raises:
        InputError: what is missing.
    """
    problems = Problems()
    for flag, what in (("output", "FOLDER"), ("experts", "NUMBER"), ("data_dir", "FOLDER")):
        if getattr(options, flag) is None:
            problems.add(f"--{flag} {what} is needed")
    if options.method == "hc_smoe" and find_spec("scipy") is None:
        problems.add("--method hc_smoe needs scipy, which clusters experts; pip install scipy")
    problems.check()
    return int(options.experts or 0), resolved(str(options.output))


def _check(
    place: Path, options: CompressOptions, scratch: Path, terminal: Terminal
) -> tuple[Context, StoredMixture, Samples]:
    """The mixture, and the samples that it can be asked.

    Raises:
        InputError: every problem found.
    """
    from expert_merging.catalogue import find_method
    from expert_merging.checkpoints.checkpoint import Checkpoint
    from expert_merging.comparing.asked import family_of
    from expert_merging.comparing.compare import find_models
    from expert_merging.context import Context
    from expert_merging.machine import limit_threads
    from expert_merging.mixtures.compressed import StoredMixture
    from expert_merging.plan import Plan
    from expert_merging.processes import choose_device
    from expert_merging.questions.calibration import find_tasks
    from expert_merging.run import Run
    from expert_merging.running.samples import check_samples

    (found,) = find_models([place])
    mixture = StoredMixture.of(Checkpoint(found.folder))
    limit_threads()
    folder = Path(str(options.data_dir))
    tasks = find_tasks(folder, ()) if folder.is_dir() else {}
    if folder.is_dir() and not tasks:
        raise InputError(f"--data_dir {folder} holds no TASK.json and no TASK.jsonl")
    context = Context(
        plan=Plan(mixture.base, {NAME: mixture.base}, ()),
        backbone=family_of(found, options.family),
        run=Run(scratch),
        seed=0,
        device=choose_device(options.device),
        log_with="none",
        progress=terminal.progress,
        find_method=find_method,
    )
    asked = SampleOptions(
        data_dir=str(folder),
        samples_per_task=options.samples_per_task,
        task_expert=dict.fromkeys(tasks, NAME),
        mixed_precision=options.mixed_precision,
        loss_tokens=options.loss_tokens,
        max_new_tokens=options.max_new_tokens,
        prompt_template=options.prompt_template,
    )
    return context, mixture, check_samples(context, asked, compares_logits=False)


def _plan(mixture: StoredMixture, count: int, samples: Samples) -> Iterator[str]:
    before, after = (mixture.total("elements", experts) / 1e6 for experts in (mixture.experts, count))
    yield (
        f"{mixture.base.folder}: {mixture.experts} experts in each of {len(mixture.routers)} layers, "
        f"{mixture.per_token} for each token; {count} are left, {after:.1f}M parameters of {before:.1f}M"
    )
    yield f"the mixture runs over {len(samples.samples)} samples"


def _groups(
    context: Context, mixture: StoredMixture, samples: Samples, method: str, count: int
) -> dict[int, list[Group]]:
    """Which experts stay or become one, by the number of the layer."""
    import torch

    from expert_merging.mixtures.grouping import METHODS
    from expert_merging.mixtures.watching import MixtureWatch

    choose, all_outputs = METHODS[method]
    seen: dict[int, LayerStatistics] = {}

    def look(_name: str, model: Any, own: Iterator[Any]) -> None:
        watch = MixtureWatch(model, mixture.routers, context.backbone.file_name, all_outputs=all_outputs)
        seen.update(watch.run(own))

    samples.target_maker(context, (), torch.device(context.device)).ask(samples.samples, look)
    return {layer: choose(found, count) for layer, found in seen.items()}


def _write(
    folder: Path,
    context: Context,
    mixture: StoredMixture,
    groups: Mapping[int, Sequence[Group]],
    method: str,
    samples: Samples,
) -> None:
    """Write the new folder."""
    import torch

    from expert_merging.card import CARD, code
    from expert_merging.checkpoints.folders import owner
    from expert_merging.merge import write_output

    base = owner(mixture.base.folder)
    output, made = mixture.output(groups), mixture.new_routers(groups)
    cpu, progress = torch.device("cpu"), context.progress
    how: dict[str, Any] = {"unit": "entries", "device": cpu, "progress": progress, "title": "writing"}
    write_output(output, context.plan, _no_rule, folder, made=made, **how)
    layers = {
        str(layer): [{"router_row": group.centre, "experts": dict(group.members)} for group in own]
        for layer, own in groups.items()
    }
    record = {"method": method, "of": base, "samples": samples.digest, "layers": layers}
    write_atomically(folder / RECORD, (json.dumps(record, indent=2) + "\n").encode())
    counts = {"count": len(next(iter(groups.values()))), "experts": mixture.experts, "samples": len(samples.samples)}
    card = _CARD.format(
        source=json.dumps(base, ensure_ascii=False),
        title="A smaller mixture",
        base=code(base),
        method=method,
        record=RECORD,
        **counts,
    )
    write_atomically(folder / CARD, card.encode())


def _no_rule(*_given: Any) -> Any:
    raise TypeError("nothing of a compressed mixture is merged of task vectors")


def _told(groups: Mapping[int, Sequence[Group]]) -> Iterator[str]:
    """The experts that are left, by layer."""
    for layer, own in groups.items():
        yield f"layer {layer}: {', '.join('+'.join(map(str, sorted(group.members))) for group in own)}"
