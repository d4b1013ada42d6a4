"""What is kept where, and the memory that is foretold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from expert_merging.checkpoints.checkpoint import Checkpoint
from expert_merging.learned import memory
from expert_merging.learned.estimates import Demand, Machine, describe, estimate, this_machine
from expert_merging.learned.memory import choose
from expert_merging.learned.options import LearningOptions
from expert_merging.learned.task_vectors import DEVICE, DISK, HOST, TaskVectors
from expert_merging.parts import Part
from expert_merging.plan import Plan, make_plan
from tests.checkpoints import write_checkpoint

SIZES = {"a": 40, "b": 40, "c": 20}


@pytest.mark.parametrize(
    ("device", "host", "places", "accumulates"),
    [
        (200, 0, [DEVICE, DEVICE, DEVICE], True),
        (149, 0, [DEVICE, DEVICE, DEVICE], False),  # all task vectors are on the device, so going through them is cheap
        (99, 60, [DEVICE, HOST, HOST], True),  # they are not: gradients come first, then what fits beside them
        (70, 45, [HOST, DISK, DEVICE], True),
        (49, 100, [DEVICE, HOST, HOST], False),
        (-5, 10, [DISK, DISK, DISK], False),
    ],
)
def test_memory_is_given_to_what_saves_most(device, host, places, accumulates):
    """100 bytes of base and experts, 50 of gradients."""
    chosen = choose(SIZES, 50, device, host, task_vectors="auto", weight_gradients="auto")
    assert (list(chosen.places.values()), chosen.accumulates) == (places, accumulates)


@pytest.mark.parametrize("place", [DEVICE, HOST, DISK])
@pytest.mark.parametrize("batches", ["sample", "update"])
def test_what_the_user_asks_for_is_done(place, batches):
    chosen = choose(SIZES, 50, 0, 0, task_vectors=place, weight_gradients=batches)
    assert (set(chosen.places.values()), chosen.accumulates) == ({place}, batches == "update")


def test_gradients_are_added_up_in_what_asked_places_leave():
    assert choose(SIZES, 50, 120, 0, task_vectors=HOST, weight_gradients="auto").accumulates
    assert not choose(SIZES, 50, 120, 0, task_vectors=DEVICE, weight_gradients="auto").accumulates


WHOLE, SHORT = Part.whole("w", (1000,)), Part.whole("v", (7,))


def make_vectors(folder: Path, scale=(1.0, 1.0)) -> tuple[TaskVectors, list[torch.Tensor]]:
    """Three types, and sizes around that of a block."""
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(1000, generator=generator).to(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16)
    ]
    names = ("base", "x", "y")
    folders = [
        write_checkpoint(folder / name, {"w": weight, "v": weight[:7].clone()})
        for name, weight in zip(names, weights, strict=True)
    ]
    plan = make_plan(folders[0], dict(zip(names[1:], folders[1:], strict=True)), [])
    return TaskVectors(plan, scale, torch.device("cpu")), [weight.float() for weight in weights]


@pytest.mark.parametrize("place", [DEVICE, HOST, DISK])
def test_blocks_hold_exactly_the_differences(place, tmp_path):
    vectors, (base, *experts) = make_vectors(tmp_path, scale=(1.0, 0.5))
    vectors._block = 300
    vectors.place({"w": place, "v": place})
    wanted = [WHOLE.between(100, 950), SHORT, WHOLE.between(0, 0)]
    covered = []
    for own, part, found_base, found in vectors.blocks(wanted, then=wanted[0]):
        run = slice(part.start, part.stop)
        assert torch.equal(found_base, base[run])
        assert torch.equal(found, torch.stack([experts[0][run] - base[run], (experts[1][run] - base[run]) * 0.5]))
        covered.append((own, part))
    assert covered == [
        (wanted[0], WHOLE.between(100, 400)),
        (wanted[0], WHOLE.between(400, 700)),
        (wanted[0], WHOLE.between(700, 950)),
        (wanted[1], wanted[1]),
    ]


def test_a_block_is_fetched_while_the_one_before_is_used(tmp_path, monkeypatch):
    vectors, _ = make_vectors(tmp_path)
    vectors._block = 500
    started = []
    bring = vectors._bring
    monkeypatch.setattr(vectors, "_bring", lambda part: (started.append(part), bring(part))[1])
    seen = []
    for _, part, _, _ in vectors.blocks([WHOLE], then=SHORT):
        vectors._coming[1].result()
        seen.append((part, started[-1]))
    assert seen == [(WHOLE.between(0, 500), WHOLE.between(500, 1000)), (WHOLE.between(500, 1000), SHORT)]
    next(vectors.blocks([SHORT]))
    assert len(started) == 3, "what was foreseen is not fetched again"


def test_places_can_change_and_be_released(tmp_path):
    vectors, (base, *_) = make_vectors(tmp_path)
    for place in (HOST, DISK, DEVICE):
        vectors.place(dict.fromkeys(vectors.places, place))
        assert set(vectors.places.values()) == {place}
        assert [torch.equal(found, base) for _, _, found, _ in vectors.blocks([WHOLE])] == [True]
    vectors.release()
    assert set(vectors.places.values()) == {DISK}
    assert [torch.equal(found, base) for _, _, found, _ in vectors.blocks([WHOLE])] == [True]


def test_magnitudes_are_the_means_of_absolute_entries(tmp_path):
    vectors, (base, *experts) = make_vectors(tmp_path)
    expected = [float((expert - base).abs().mean()) for expert in experts]
    assert vectors.magnitudes["w"] == pytest.approx(expected, rel=1e-6)


def hollow_checkpoint(folder: Path, config: dict, shapes: dict[str, tuple[int, ...]]) -> Checkpoint:
    """A checkpoint whose file has a header and its size, but takes no disk."""
    header, position = {}, 0
    for name, (rows, columns) in shapes.items():
        header[name] = {
            "dtype": "BF16",
            "shape": [rows, columns],
            "data_offsets": [position, position + 2 * rows * columns],
        }
        position += 2 * rows * columns
    content = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + position)
    return Checkpoint(folder)


def decoder(layers: int, hidden: int, middle: int, key_value: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name, rows in {"q": hidden, "k": key_value, "v": key_value, "o": hidden}.items():
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, hidden)
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (middle, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, middle)
    return shapes


def tell(plan: Plan, machine: Machine, precision: str = "fp16", longest: int = 2048, **options) -> tuple[str, ...]:
    return describe(Demand(plan, precision, 2048, longest, LearningOptions(**options)), machine)


def plan_of(folder: Path, experts: int, config: dict, shapes: dict[str, tuple[int, ...]]) -> Plan:
    checkpoint = hollow_checkpoint(folder, config, shapes)
    merged = tuple(name for name in shapes if ".layers." in name)
    return Plan(checkpoint, {str(number): checkpoint for number in range(experts)}, merged)


def test_the_plan_for_mistral_7b_with_three_experts(tmp_path):
    """On 16 GiB it takes gradient checkpointing and task vectors elsewhere; on 80 GiB everything is on the device."""
    config = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336}
    plan = plan_of(tmp_path / "mistral", 3, config, decoder(32, 4096, 14336, 1024, 32000))

    def told(free, *, again):
        return tell(plan, Machine("cuda", free * 2**30), gradient_checkpointing=again)

    first, second, third = told(80, again=False)
    assert first.startswith(
        "learning needs at least 26.7 GiB (15.7 GiB with --gradient_checkpointing) for each process on "
    )
    assert "model 13.5 GiB" in first
    assert second.startswith("with base and experts there too, 52.0 GiB more; otherwise they are in host memory")
    assert third == "with weight gradients added up, 26.0 GiB more"
    (asked, *_) = told(16, again=True)
    assert asked.startswith("learning needs at least 15.7 GiB for each process on cuda: model 13.5 GiB, ")
    assert told(16, again=False)[3:] == (
        "that does not fit on cuda, where 16.0 GiB are free: it takes --gradient_checkpointing",
    )
    assert told(16, again=True)[3:] == ()
    ending = "where 15.0 GiB are free: it takes --shard{} over 2 devices, which needs {} GiB on each"
    assert told(15, again=True)[3].endswith(ending.format("", "10.9"))
    assert told(15, again=False)[3].endswith(ending.format(" --gradient_checkpointing", "10.9"))
    (too_much,) = told(1, again=True)[3:]
    assert "it takes shorter samples, smaller pictures" in too_much
    assert "--shard over several devices" in too_much
    assert told(1, again=False)[3:] == (too_much,)


def test_one_sample_at_a_time_is_the_first_advice(tmp_path):
    config = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336}
    plan = plan_of(tmp_path / "mistral", 3, config, decoder(32, 4096, 14336, 1024, 32000))

    def advice(free, precision="fp16"):
        *_, last = tell(plan, Machine("cuda", free * 2**30), precision, longest=256)
        return last.partition("it takes ")[2]

    assert advice(17) == "--batch_tokens 256"
    assert advice(15) == "--batch_tokens 256 --gradient_checkpointing"
    assert advice(17, "no") == "--batch_tokens 256 --mixed_precision fp16"
    assert advice(13).startswith("--batch_tokens 256 --shard over 2 devices")


def test_the_plan_for_a_model_split_over_eight_devices(tmp_path):
    """Each has an eighth of the layers and all of embeddings and head."""
    config = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336}
    plan = plan_of(tmp_path / "mistral", 3, config, decoder(32, 4096, 14336, 1024, 32000))
    whole, share = estimate(plan, 2, 2048), estimate(plan, 2, 2048, shares=8)
    assert share.model == 2 * (plan.merged_elements // 8 + 2 * 4096 * 32000)
    assert (share.task_vectors, share.gradients) == (whole.task_vectors // 8, whole.gradients // 8)
    assert share.working == whole.working + (2 * 2 + 4) * plan.merged_elements // 32
    eight = Machine("cuda", 6 * 2**30, processes=8, local=8, host_free=12 * 2**30)
    first, *others = tell(plan, eight, gradient_checkpointing=True, shard=True)
    assert "for each process on cuda: model 2.1 GiB, " in first
    assert len(others) == 2
    assert "in host memory, 52.0 GiB for the 8 processes of this machine (96.0 GiB are free), or read" in others[0]
    *_, last = tell(plan, replace(eight, free=2**30), gradient_checkpointing=True, shard=True)
    assert last.endswith("it takes shorter samples, smaller pictures (the family's own flags), or more devices")


def test_the_plan_for_qwen2_vl_7b_with_five_experts(tmp_path):
    """32 GiB hold it plainly, with task vectors elsewhere."""
    nested = {"num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944}
    vision = {f"visual.blocks.{block}.mlp.weight": (19660800 // 1280, 1280) for block in range(32)}
    plan = plan_of(tmp_path / "qwen", 5, {"text_config": nested}, decoder(28, 3584, 18944, 512, 152064) | vision)
    needs = estimate(plan, 2, 2048)
    assert needs.model == 2 * plan.base_elements
    assert 28 * 2**30 < needs.model + needs.sample + needs.working < 31 * 2**30
    assert needs.task_vectors == 6 * 2 * plan.merged_elements


def test_all_processes_measure_before_one_takes_anything(monkeypatch):
    """Otherwise the last would find less, divide it by all, and take it for its share."""
    events = []
    vectors = SimpleNamespace(sizes={"w": 8}, places={"w": "disk"}, device=torch.device("cpu"))
    vectors.place = lambda places: events.append("place")
    live = SimpleNamespace(task_vectors=vectors, parts={})
    monkeypatch.setattr(memory, "free_host_memory", lambda: events.append("measure") or 100.0)
    memory.arrange(live, LearningOptions(), lambda: None, lambda: events.append("barrier"))
    assert list(dict.fromkeys(events)) == ["barrier", "measure", "place"]
    last = len(events) - 1 - events[::-1].index("barrier")
    assert "measure" not in events[last:]


V100, V100_32 = 15.5 * 2**30, 31.5 * 2**30  # what a driver leaves of 16 and 32 GB


def test_what_makes_a_7b_model_fit_on_eight_v100s(tmp_path):
    """A plan for each device: what does not fit, and the flags that cost least of those that make it fit."""
    config = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336}
    mistral = plan_of(tmp_path / "mistral", 3, config, decoder(32, 4096, 14336, 1024, 32000))
    nested = {"num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944}
    vision = {f"visual.blocks.{block}.mlp.weight": (19660800 // 1280, 1280) for block in range(32)}
    qwen = plan_of(tmp_path / "qwen", 5, {"text_config": nested}, decoder(28, 3584, 18944, 512, 152064) | vision)
    small = Machine("cuda:0", V100, processes=8, local=8, host_free=60 * 2**30)
    large = replace(small, free=V100_32)

    (problem,) = tell(mistral, small)[3:]
    assert problem == (
        "that does not fit on cuda:0, where 15.5 GiB are free: it takes --shard --gradient_checkpointing, which needs "
        "6.0 GiB on each"
    )
    first, second, third = tell(mistral, small, shard=True, gradient_checkpointing=True)
    assert first.startswith("learning needs at least 6.0 GiB for each process on cuda:0: model 2.1 GiB")
    assert "6.5 GiB more" in second  # which fits as well
    assert third == "with weight gradients added up, 3.2 GiB more"
    assert tell(qwen, large)[3:] == ()
    assert "72.9 GiB more; otherwise they are in host memory, 583.4 GiB for the 8" in tell(qwen, large)[1]
    assert tell(qwen, large, task_vectors="host")[3:] == (
        "--task_vectors host does not fit, where 60.0 GiB are free a process: use auto",
    )
    assert tell(qwen, large, task_vectors="device")[3:] == (
        "--task_vectors device does not fit on cuda:0, where 31.5 GiB are free: use auto",
    )
    assert tell(qwen, large, task_vectors="device", shard=True)[3:] == ()


def test_the_plan_tells_of_own_heads_of_memory_and_of_half_precision(tmp_path):
    config = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336}
    plan = plan_of(tmp_path / "mistral", 3, config, decoder(32, 4096, 14336, 1024, 32000))
    first, second, _ = tell(plan, Machine("cuda", 80 * 2**30))
    assert first.endswith(", and up to 0.7 GiB for experts' own output heads")
    assert second.endswith("or read from the files")
    assert tell(plan, Machine("cuda", 78 * 2**30))[1].endswith("the files, as cuda has no memory left for them")
    tied = plan_of(tmp_path / "tied", 3, config, {"model.embed_tokens.weight": (9, 5), "model.layers.0.w": (5, 5)})
    assert "output heads" not in tell(tied, Machine("cuda", 2**40))[0]

    def advice(free, device, **options):
        (problem,) = tell(plan, Machine(device, free * 2**30), "no", **options)[3:]
        return problem.rpartition("it takes ")[2]

    assert advice(28, "cpu") == "--mixed_precision bf16"
    assert advice(1, "cpu").endswith("or a machine with more memory"), "its processes share what it has"
    assert advice(20, "cuda:0") == "--mixed_precision fp16 --gradient_checkpointing"
    assert advice(20, "cuda:0", gradient_checkpointing=True) == "--mixed_precision fp16"


def test_the_machine_is_what_the_launcher_says(monkeypatch):
    for module in ("machine", "learned.estimates"):
        monkeypatch.setattr(f"expert_merging.{module}.free_host_memory", lambda: 5.0)
    assert this_machine("cpu") == Machine("cpu", 5.0, 1, 1, 5.0)
    for name, value in {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert this_machine("cpu") == Machine("cpu", 5.0, 16, 8, 5.0)


def test_estimated_activations_are_those_that_autograd_keeps(tmp_path):
    """Of a small decoder in bfloat16, counted one by one."""
    from transformers import MistralConfig, MistralForCausalLM

    config = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 384}
    model = MistralForCausalLM(MistralConfig(**config, vocab_size=50, num_attention_heads=4, num_key_value_heads=2))
    model = model.eval().bfloat16()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.zeros(1, 512, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model.model(tokens, output_hidden_states=True, use_cache=False)
    counted = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    counted += sum(state.nbytes for state in outputs.hidden_states if state.untyped_storage().data_ptr() not in kept)
    plan = plan_of(tmp_path / "small", 1, config, decoder(4, 128, 384, 64, 50))
    assert 0.7 < counted / estimate(plan, 2, 512).sample < 1.3
