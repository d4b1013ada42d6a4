"""The one loop over experts and their samples, and what training keeps of it.

Experts are frozen and the samples fixed, so each expert is loaded once, answers the samples that have no response,
runs over its samples, and is released. What training needs of it stays: the hidden states at the aligned layers, the
input of its output head, and the head itself where it is not the merged model's own.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from expert_merging.asking import choose_formats
from expert_merging.backbone import Backbone
from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.checkpoints.configurations import size_setting
from expert_merging.checkpoints.tying import same_tensor
from expert_merging.documents import read_object
from expert_merging.errors import InputError
from expert_merging.plan import Plan
from expert_merging.progress import Advance, Progress, no_advance
from expert_merging.provenance import library_versions
from expert_merging.questions.calibration import Sample
from expert_merging.roles import word_tables
from expert_merging.running.batches import pack, together
from expert_merging.running.generating import generate
from expert_merging.running.kept_targets import KeptTargets, identity, name_of
from expert_merging.running.prompts import Prompts, check_lengths, place, tokenizer_of, with_response
from expert_merging.running.sharding import load_on
from expert_merging.writing import write_atomically

logger = logging.getLogger(__name__)

# Entry of the responses' file that says how experts were asked; all others have slashes.
FORMATS = "formats"
# Tokens whose logits are looked at together.
_SLICE = 64


@dataclass(frozen=True)
class Asked:
    """One sample as its expert is asked.

    Args:
        number: its place among the samples.
        sample: the sample, its response filled in.
        inputs: model inputs of prompt and response, batch of one.
        tokens: ``(selected,)`` positions that are looked at.
    """

    number: int
    sample: Sample
    inputs: Mapping[str, Tensor]
    tokens: Tensor


# ``(expert's name, its model, its samples)``; the model is released when it returns.
Look: TypeAlias = Callable[[str, Any, Iterator[Asked]], None]


@dataclass(frozen=True)
class Target:
    """One sample ready for training.

    Args:
        sample: the sample, its response filled in.
        inputs: model inputs of prompt and response, batch of one.
        tokens: ``(selected,)`` positions that the losses look at.
        last_hidden: ``(selected, hidden)`` input of the expert's output head.
        layers: ``(selected, hidden)`` the expert's hidden states at each aligned layer.
        head: the expert's output head; None where it is the merged model's.
    """

    sample: Sample
    inputs: Mapping[str, Tensor]
    tokens: Tensor
    last_hidden: Tensor
    layers: tuple[Tensor, ...]
    head: torch.nn.Module | None

    @property
    def task(self) -> str:
        """The task that the sample belongs to."""
        return self.sample.task

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return int(self.inputs["input_ids"].shape[1])


@dataclass(frozen=True)
class TargetMaker:
    """Loads experts, asks them and records their behaviour.

    Args:
        backbone: the model family.
        plan: the checkpoints.
        layers: indices of the aligned hidden states; 0 is the embeddings' output.
        response_only: losses look at the tokens that predict the response, instead of all.
        max_new_tokens: bound on the length of a response that an expert writes.
        prompt_template: text with ``{question}`` in it, or texts by expert or task; None for the experts' own words.
        dtype: type of the weights.
        device: where models run.
        responses: file that keeps the responses written by experts.
        progress: shows how far the work is.
        sharded: models are split over all processes, which work side by side, and the main one writes.
        batch_tokens: tokens that go through a model together, a single sample's at least.
        prompts: the samples' prompts, checked; by default they are made and checked before an expert is asked.
        kept: folder of what experts have said to other runs; None to ask them whatever they have said.
    """

    backbone: Backbone
    plan: Plan
    layers: tuple[int, ...]
    response_only: bool
    max_new_tokens: int
    prompt_template: str | Mapping[str, str] | None
    dtype: torch.dtype
    device: torch.device
    responses: Path
    progress: Progress
    sharded: bool = False
    batch_tokens: int = 1
    prompts: Prompts | None = None
    kept: Path | None = None

    def make(self, samples: Sequence[Sample]) -> list[Target]:
        """Targets of all samples, in their order; what experts have said to other runs is read."""
        prompts, made = self._checked(samples), dict[int, Target]()
        experts = {expert: self._kept_of(expert, prompts) for expert in self.plan.experts}

        def look(expert: str, model: Any, own: Iterator[Asked]) -> None:
            head, found = self._own_head(model, expert), dict[int, Target]()
            for batch in pack(own, lambda asked: asked.inputs["input_ids"].numel(), self.batch_tokens):
                found.update(self._record(model, batch, head))
            made.update(found)
            if (kept := experts[expert]) is not None and _is_plain(model.get_output_embeddings(), self.dtype):
                self._keep_states(kept, _of(expert, samples), found)

        for expert, kept in experts.items():
            made.update({} if kept is None else self._known(expert, kept, prompts, _of(expert, samples)))
        known = {samples[number].expert for number in made}
        self._ask(samples, look, prompts, {name: kept for name, kept in experts.items() if name not in known})
        return [made[number] for number in range(len(samples))]

    def ask(self, samples: Sequence[Sample], look: Look) -> None:
        """Load each expert once and look at it with its samples; only one is in memory at a time.

        Args:
            samples: the samples of all experts of the plan.
            look: is shown each expert.
        """
        prompts = self._checked(samples)
        self._ask(samples, look, prompts, {expert: self._kept_of(expert, prompts) for expert in self.plan.experts})

    def answered(self, samples: Sequence[Sample]) -> Iterator[Asked]:
        """The samples with their experts' answers; an expert is loaded only for answers that it has not given yet."""
        prompts, known, silent = self._checked(samples), dict[str, Any](), dict[str, KeptTargets | None]()
        for expert in self.plan.experts:
            own, kept = [*_of(expert, samples).values()], self._kept_of(expert, prompts)
            known = self._known_answers(prompts, kept, own)
            if any(sample.response is None and _key(sample) not in known for sample in own):
                silent[expert] = kept
        if silent:
            self._ask(samples, lambda *_: None, prompts, silent)
            known = self._known_answers(prompts, None, samples)
        return self._asked(prompts, dict(enumerate(samples)), [_with_answer(sample, known) for sample in samples])

    def _ask(
        self, samples: Sequence[Sample], look: Look, prompts: Prompts, experts: Mapping[str, KeptTargets | None]
    ) -> None:
        if not experts:
            return
        asked = [sample for sample in samples if sample.expert in experts]
        missing = sum(sample.response is None for sample in asked)
        with self.progress("asking the experts", len(asked) + missing, "sample") as advance:
            for expert, kept in experts.items():
                advance(0, expert)
                checkpoint = self.plan.experts[expert]
                model = load_on(self.device, self.backbone, checkpoint, self.dtype, sharded=self.sharded)
                own = _of(expert, samples)
                answered = self._answer(model, prompts, list(own.values()), kept, advance)
                look(expert, model, self._asked(prompts, own, answered, advance))
                del model

    def written(self, model: Any, samples: Sequence[Sample]) -> list[str]:
        """What a model, such as a merge, answers to the samples' questions, in their order.

        Args:
            model: the model.
            samples: the samples; the answers that they have do not matter.
        """
        prompts, found = self._checked(samples), dict[Sample, str]()
        for ends, batch in self._batches(prompts, samples):
            answers = self._generate(model, prompts, batch, ends)
            found.update(zip(batch, (str(answer["response"]) for answer in answers), strict=True))
        return [found[sample] for sample in samples]

    def _checked(self, samples: Sequence[Sample]) -> Prompts:
        """The prompts of the samples."""
        prompts = self.prompts
        if prompts is None:
            formats = choose_formats(self.backbone, self.plan, self.prompt_template)
            prompts = Prompts(self.backbone, self.plan.base, formats)
            prompts.check(samples)
        return prompts

    def _kept_of(self, expert: str, prompts: Prompts) -> KeptTargets | None:
        """What an expert has said to all runs that asked it as this one does; None where that is not kept."""
        # Processes that share a model must all ask or none, and each would look for the files by itself.
        if self.kept is None or self.sharded:
            return None
        way = {
            "base": self.plan.base.fingerprint(whole=True),
            "expert": self.plan.experts[expert].fingerprint(whole=True),
            "family": [self.backbone.name, self.backbone.values],
            "formats": prompts.formats.digest,
            "settings": [str(self.dtype), self.device.type, self.max_new_tokens, self.batch_tokens],
            "versions": library_versions(),
            **({"order": order} if (order := self.plan.experts[expert].order_digest) else {}),
        }
        return KeptTargets(self.kept, expert, way)

    def _known(self, expert: str, kept: KeptTargets, prompts: Prompts, own: Mapping[int, Sample]) -> dict[int, Target]:
        """Targets of an expert's samples, by number, from what was kept; none where something of it is missing."""
        answers = self._known_answers(prompts, kept, list(own.values()))
        if any(sample.response is None and _key(sample) not in answers for sample in own.values()):
            return {}
        complete = [_with_answer(sample, answers) for sample in own.values()]
        states = kept.states(self._name_of(complete))
        if states is None:
            return {}
        logger.info("expert %s is not asked: what it says is known from another run", expert)
        head, given = self._stored_head(expert), iter(states)
        return {
            asked.number: Target(
                sample=asked.sample,
                inputs=asked.inputs,
                tokens=asked.tokens,
                last_hidden=next(given).to(self.device),
                layers=tuple(next(given).to(self.device) for _ in self.layers),
                head=head,
            )
            for asked in self._asked(prompts, own, complete)
        }

    def _keep_states(self, kept: KeptTargets, own: Mapping[int, Sample], made: Mapping[int, Target]) -> None:
        """Keep the states of an expert's targets for other runs."""
        states = [state for number in own for state in (made[number].last_hidden, *made[number].layers)]
        kept.add_states(self._name_of(made[number].sample for number in own), [state.cpu() for state in states])

    def _name_of(self, samples: Iterable[Sample]) -> str:
        """What states of these samples, responses and all, are called."""
        return name_of(map(identity, samples), self.layers, response_only=self.response_only)

    def _asked(
        self,
        prompts: Prompts,
        samples: Mapping[int, Sample],
        answered: Sequence[Sample],
        advance: Advance = no_advance,
    ) -> Iterator[Asked]:
        """The samples with their answers as model inputs, one after the other."""
        for (number, sample), complete in zip(samples.items(), answered, strict=True):
            prompt = prompts.take(sample)
            inputs = place(with_response(prompt, self._response(prompts, prompt, complete)), self.device, self.dtype)
            first, length = prompt["input_ids"].shape[1], inputs["input_ids"].shape[1]
            # A token is predicted at the position before it; nothing follows the last one.
            positions = range(first - 1, length - 1) if self.response_only else range(length)
            yield Asked(number, complete, inputs, torch.tensor(list(positions), device=self.device))
            advance(1, sample.expert)

    def _response(self, prompts: Prompts, prompt: Mapping[str, Tensor], sample: Sample) -> Sequence[int]:
        """Tokens of a response. What an expert has written is checked here: its length was not known before."""
        tokens = prompts.response_tokens(sample)
        if not tokens:
            raise InputError(
                f"{sample.place}: expert {sample.expert} answered with nothing; give the sample a response"
            )
        if sample.tokens is not None:
            check_lengths(self.plan.base, self.backbone, [(sample, prompt["input_ids"].shape[1] + len(tokens))])
        return tokens

    @torch.no_grad()
    def _record(self, model: Any, batch: Sequence[Asked], head: torch.nn.Module | None) -> dict[int, Target]:
        """Targets of samples that go through their expert together, by number."""
        hidden, last = hidden_states(model, together([asked.inputs for asked in batch]))
        made = {}
        for row, asked in enumerate(batch):
            length = asked.inputs["input_ids"].shape[1]
            states = [state[row, :length] for state in (*hidden, last)]
            self._check_finite(asked.sample, states, model.get_output_embeddings())
            made[asked.number] = Target(
                sample=asked.sample,
                inputs=asked.inputs,
                tokens=asked.tokens,
                last_hidden=last[row, asked.tokens],
                layers=tuple(hidden[layer][row, asked.tokens] for layer in self.layers),
                head=head,
            )
        return made

    def _check_finite(self, sample: Sample, states: Sequence[Tensor], head: torch.nn.Module) -> None:
        """Refuse states and logits that nothing can be learned from.

        Args:
            sample: the sample.
            states: hidden states, ``(tokens, hidden)`` each; the last is the input of the head.
            head: the expert's output head.

        Raises:
            InputError: some are NaN or infinite.
        """
        logits = (head(tokens) for tokens in torch.split(states[-1], _SLICE))
        if all(bool(values.isfinite().all()) for values in itertools.chain(states, logits)):
            return
        hint = "its weights are damaged, or not those of config.json; download it again"
        if self.dtype == torch.float16:
            hint = "it computes beyond float16's range; give --mixed_precision bf16 or no"
        raise InputError(f"{sample.place}: expert {sample.expert} computes NaN or infinite values; {hint}")

    def _own_head(self, model: Any, expert: str) -> torch.nn.Module | None:
        """The expert's output head where it differs from the one that the merged model will have while training."""
        head: torch.nn.Module = model.get_output_embeddings()
        if getattr(head, "bias", None) is None and self._differing_head(expert) is None:
            return None
        return copy.deepcopy(head)

    def _stored_head(self, expert: str) -> torch.nn.Module | None:
        """The same of an expert that is not loaded, whose head is a matrix."""
        name, own = self._differing_head(expert), self.plan.experts[expert]
        if name is None:
            return None
        rows, columns = own.entries[name].shape
        head = torch.nn.Linear(columns, rows, bias=False, device="meta")
        weight = own.read(name).view(rows, columns).to(self.device).to(self.dtype)
        head.weight = torch.nn.Parameter(weight, requires_grad=False)
        return head

    def _differing_head(self, expert: str) -> str | None:
        """Name of the expert's output head in its files; None where it is the merged model's."""
        base, own = self.plan.base, self.plan.experts[expert]
        name, own_name = _head_name(base), _head_name(own)
        return None if self.plan.merged_as(name) is None and same_tensor(base, name, own, own_name) else own_name

    def _answer(
        self, model: Any, prompts: Prompts, samples: list[Sample], kept: KeptTargets | None, advance: Advance
    ) -> list[Sample]:
        """The samples with a response each: their own, one kept from an earlier part of the run, or a new one."""
        known = self._known_answers(prompts, kept, samples)
        missing = [sample for sample in samples if sample.response is None and _key(sample) not in known]
        advance(len([sample for sample in samples if sample.response is None]) - len(missing))
        for ends, batch in self._batches(prompts, missing):
            found = self._generate(model, prompts, batch, ends)
            known.update(zip(map(_key, batch), found, strict=True))
            self._keep(known)
            advance(len(batch), batch[0].expert)
        if kept is not None:
            kept.add_answers({identity(sample): known[_key(sample)] for sample in samples if sample.response is None})
        return [_with_answer(sample, known) for sample in samples]

    def _known_answers(self, prompts: Prompts, kept: KeptTargets | None, samples: Sequence[Sample]) -> dict[str, Any]:
        """All answers of the run by `_key`, with those to these samples that were given to other runs."""
        known = read_object(self.responses, advice="move it away") if self.responses.exists() else {}
        before = dict(known)
        known[FORMATS] = prompts.formats.record
        answers = {} if kept is None else kept.answers()
        for sample in samples:
            if sample.response is None and _key(sample) not in known and identity(sample) in answers:
                known[_key(sample)] = answers[identity(sample)]
        if known != before:
            self._keep(known)
        return known

    def _batches(self, prompts: Prompts, samples: Sequence[Sample]) -> Iterator[tuple[list[int], list[Sample]]]:
        """Samples that are answered together, and what ends their answers."""
        by_end: dict[tuple[int, ...], list[Sample]] = {}
        for sample in samples:
            by_end.setdefault(tuple(prompts.end_tokens(sample)[:1]), []).append(sample)

        def length(sample: Sample) -> int:
            return int(prompts.get(sample)["input_ids"].shape[1]) + self.max_new_tokens

        for ends, own in by_end.items():
            for batch in pack(own, length, self.batch_tokens):
                yield [*ends], batch

    def _keep(self, responses: Mapping[str, Any]) -> None:
        """Write how experts are asked, and what they have answered so far."""
        if not self.sharded or torch.distributed.get_rank() == 0:
            text = json.dumps(responses, indent=2, ensure_ascii=False) + "\n"
            write_atomically(self.responses, text.encode())

    def _generate(
        self, model: Any, prompts: Prompts, samples: Sequence[Sample], ends: Sequence[int]
    ) -> list[dict[str, Any]]:
        """The expert's answers as fields of `Sample`."""
        inputs = [place(prompts.get(sample), self.device, self.dtype) for sample in samples]
        # A fine-tune may have added tokens, such as an end of its own, that the base has no embedding for.
        known = size_setting(self.plan.base.config, "vocab_size") or len(tokenizer_of(prompts.processor))
        return [
            {"response": response, "tokens": list(itertools.takewhile(lambda token: token < known, tokens))}
            for response, tokens in generate(model, prompts.processor, inputs, self.max_new_tokens, ends)
        ]


def _of(expert: str, samples: Sequence[Sample]) -> dict[int, Sample]:
    """An expert's samples by number."""
    return {number: sample for number, sample in enumerate(samples) if sample.expert == expert}


def _is_plain(head: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Whether an output head can be made of its matrix in the files."""
    return type(head) is torch.nn.Linear and head.bias is None and head.weight.dtype == dtype


def _with_answer(sample: Sample, answers: Mapping[str, Any]) -> Sample:
    """A sample with its own response, or with its answer."""
    return sample if sample.response is not None else replace(sample, **answers[_key(sample)])


def _key(sample: Sample) -> str:
    """Name of a sample among the responses."""
    return "/".join([sample.task, sample.identity, sample.question, *map(str, sample.images)])


def hidden_states(model: Any, inputs: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Hidden states of the decoder, ``(samples, tokens, hidden)`` each.

    Returns:
        The embeddings' output and every layer's; and the input of the output head.
    """
    outputs = model.base_model(**inputs, output_hidden_states=True, use_cache=False)
    return outputs.hidden_states, outputs.last_hidden_state


def _head_name(checkpoint: Checkpoint) -> str:
    """File name of the output head's weight."""
    embedding, head = word_tables(checkpoint.entries)
    found = head or embedding
    if found is None:
        raise InputError(f"{checkpoint.folder} has neither an lm_head nor embed_tokens; learning needs an output head")
    return found
