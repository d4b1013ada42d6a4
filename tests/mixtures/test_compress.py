"""Mixtures with fewer experts: which are chosen, against naive loops, and what is written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from expert_merging.commands.main import main
from expert_merging.compress import RECORD
from expert_merging.mixtures.grouping import Group, LayerStatistics, hc_smoe, m_smoe, reap
from expert_merging.mixtures.layouts import MIXTURES
from tests.checkpoints import EXPERTS, SINGLE, tensors_of, write_tasks
from tests.mixtures.merging import ACTIVE, CONFIGS, COUNT, save_mixture
from tests.statistics.twin import RESPONSES, answered

KINDS = tuple(CONFIGS)
PARTS = {"mixtral": ("w1", "w3", "w2"), "others": ("gate_proj", "up_proj", "down_proj")}
SAMPLES = 3


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """A mixture of each kind, and calibration files."""
    root = tmp_path_factory.mktemp("mixtures")
    write_tasks(root / "dataset", responses=RESPONSES)
    return {"dataset": root / "dataset", **{kind: save_mixture(root / kind, kind) for kind in KINDS}}


def arguments(mixtures, kind, target, *more):
    given = ["compress", mixtures[kind], "--output", target, "--data_dir", mixtures["dataset"]]
    return list(map(str, [*given, "--samples_per_task", SAMPLES, "--device", "cpu", *more]))


def compressed(mixtures, kind, target, *more):
    """The new folder, and the record of what each layer's experts are made of."""
    assert main(arguments(mixtures, kind, target, *more)) == 0
    return target, json.loads((target / RECORD).read_text())


def refusal(capsys, *given):
    capsys.readouterr()
    assert main([*map(str, given)]) == 1
    return capsys.readouterr().err.splitlines()


def questions(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [one for name in EXPERTS for one in answered(tokenizer, name, RESPONSES[name], range(SAMPLES))]


@torch.no_grad()
def block_inputs(model, layer, asked):
    """What goes into a layer's mixture, ``(tokens, hidden size)``."""
    seen = []
    block = model.get_submodule(f"model.layers.{layer}.mlp")
    hook = block.register_forward_pre_hook(lambda _block, given: seen.append(given[0].flatten(0, -2).clone()))
    for inputs, _ in asked:
        model(**inputs)
    hook.remove()
    return torch.cat(seen).double()


def stem_of(kind, layer):
    return f"model.layers.{layer}.{'block_sparse_moe' if kind == 'mixtral' else 'mlp'}"


def output_of(tensors, kind, layer, number, vectors):
    """An expert's outputs, from the tensors of the files."""
    gate, up, down = (
        tensors[f"{stem_of(kind, layer)}.experts.{number}.{part}.weight"].double()
        for part in PARTS.get(kind, PARTS["others"])
    )
    return (torch.nn.functional.silu(vectors @ gate.T) * (vectors @ up.T)) @ down.T


def naive(folder, kind, layer, *, normalised):
    """Statistics of a layer, token by token: choices, saliencies, logits ``(tokens, experts)`` and mean outputs."""
    tensors = tensors_of(folder)
    vectors = block_inputs(AutoModelForCausalLM.from_pretrained(folder), layer, questions(folder))
    logits = vectors @ tensors[f"{stem_of(kind, layer)}.gate.weight"].double().T
    outputs = [output_of(tensors, kind, layer, number, vectors) for number in range(COUNT)]
    chosen, saliency = [0] * COUNT, [0.0] * COUNT
    for token, row in enumerate(logits):
        shares = row.softmax(0)
        best = sorted(range(COUNT), key=lambda number: -float(shares[number]))[:ACTIVE]
        total = sum(float(shares[number]) for number in best) if normalised else 1.0
        for number in best:
            chosen[number] += 1
            saliency[number] += float(shares[number]) / total * float(outputs[number][token].norm())
    return chosen, saliency, logits, torch.stack([output.mean(0) for output in outputs])


NORMALISED = {"mixtral": True, "qwen3_moe": True, "qwen2_moe": False, "olmoe": False}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_reap_keeps_the_experts_of_the_largest_scores(kind, mixtures, tmp_path):
    target, record = compressed(mixtures, kind, tmp_path / "new", "--experts", ACTIVE)
    before, after = tensors_of(mixtures[kind]), tensors_of(target)
    for layer in range(3):
        chosen, saliency, _, _ = naive(mixtures[kind], kind, layer, normalised=NORMALISED[kind])
        scores = [total / max(1, count) for total, count in zip(saliency, chosen, strict=True)]
        kept = sorted(sorted(range(COUNT), key=lambda number: -scores[number])[:ACTIVE])
        assert [entry["router_row"] for entry in record["layers"][str(layer)]] == kept
        stem = stem_of(kind, layer)
        assert torch.equal(after[f"{stem}.gate.weight"], before[f"{stem}.gate.weight"][kept])
        for place, number in enumerate(kept):
            for part in PARTS.get(kind, PARTS["others"]):
                old = before[f"{stem}.experts.{number}.{part}.weight"]
                assert torch.equal(after[f"{stem}.experts.{place}.{part}.weight"], old)
    others = {name for name in before if ".experts." not in name and ".gate." not in name}
    assert all(torch.equal(after[name], before[name]) for name in others)
    assert len(after) == len(others) + 3 * (1 + 3 * ACTIVE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_m_smoe_joins_experts_to_the_most_used(kind, mixtures, tmp_path):
    target, _ = compressed(mixtures, kind, tmp_path / "new", "--experts", 2, "--method", "m_smoe")
    for layer in range(3):
        chosen, _, logits, _ = naive(mixtures[kind], kind, layer, normalised=True)
        first, second = sorted(range(COUNT), key=lambda number: -chosen[number])[:2]
        groups = {first: [first], second: [second]}
        for number in set(range(COUNT)) - {first, second}:
            likeness = {
                centre: float(torch.cosine_similarity(logits[:, number], logits[:, centre], dim=0))
                for centre in (first, second)
            }
            groups[max(likeness, key=likeness.__getitem__)].append(number)
        assert_merged(mixtures[kind], target, kind, layer, groups, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", "olmoe"])
def test_hc_smoe_joins_experts_with_like_outputs(kind, mixtures, tmp_path):
    target, _ = compressed(mixtures, kind, tmp_path / "new", "--experts", 2, "--method", "hc_smoe")
    for layer in range(3):
        chosen, _, _, means = naive(mixtures[kind], kind, layer, normalised=True)
        clusters = [[number] for number in range(COUNT)]
        while len(clusters) > 2:
            pairs = [(a, b) for a in range(len(clusters)) for b in range(a)]
            a, b = min(pairs, key=lambda pair: average_distance(means, clusters[pair[0]], clusters[pair[1]]))
            clusters[b] += clusters.pop(a)
        groups = {max(sorted(own), key=lambda number: chosen[number]): own for own in clusters}
        assert_merged(mixtures[kind], target, kind, layer, groups, chosen)


def average_distance(means, first, second):
    return sum(float((means[a] - means[b]).norm()) for a in first for b in second) / len(first) / len(second)


def assert_merged(source, target, kind, layer, groups, chosen):
    """A layer's new experts are the groups' members, averaged by use, and its router has the centres' rows."""
    before, after, stem = tensors_of(source), tensors_of(target), stem_of(kind, layer)
    centres = sorted(groups)
    assert torch.equal(after[f"{stem}.gate.weight"], before[f"{stem}.gate.weight"][centres])
    for place, centre in enumerate(centres):
        own = groups[centre]
        total = sum(chosen[number] for number in own)
        for part in PARTS.get(kind, PARTS["others"]):
            old = [before[f"{stem}.experts.{number}.{part}.weight"] * (chosen[number] / total) for number in own]
            torch.testing.assert_close(after[f"{stem}.experts.{place}.{part}.weight"], sum(old), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["reap", "m_smoe"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_an_expert_that_never_works_the_mixture_computes_what_it_did(kind, method, mixtures, tmp_path):
    source, idle = save_mixture(tmp_path / "source", kind), 1
    tensors = tensors_of(source)
    tensors["model.embed_tokens.weight"][:, 0] = 0.3  # every token has it, and expert 1 is rated low by it
    for layer in range(3):
        router = tensors[f"{stem_of(kind, layer)}.gate.weight"]
        router[:, 0] = 0
        router[idle] = 0
        router[idle, 0] = -50
    save_file(tensors, source / SINGLE, metadata={"format": "pt"})
    given = {**mixtures, kind: source}
    target, record = compressed(given, kind, tmp_path / "new", "--experts", COUNT - 1, "--method", method)
    for own in record["layers"].values():
        assert [entry["router_row"] for entry in own] == [0, 2, 3]
    new, report = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(report.values()), report
    assert json.loads((target / "config.json").read_text())[COUNTS.get(kind, "num_experts")] == COUNT - 1
    old = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for inputs, _ in questions(source):
            torch.testing.assert_close(new(**inputs).logits, old(**inputs).logits, rtol=1e-4, atol=1e-5)


COUNTS = {"mixtral": "num_local_experts"}


def statistics(chosen, **more):
    count = len(chosen)
    given = {"saliency": torch.zeros(count), "likeness": torch.eye(count).double(), "outputs": None, "tokens": 10}
    return LayerStatistics(torch.tensor(chosen), **{**given, **more})


def test_an_expert_that_never_works_has_no_score_and_no_weight():
    found = statistics([0, 4, 2], saliency=torch.tensor([0.0, 2.0, 3.0]))
    assert reap(found, 2) == [Group(1, {1: 1.0}), Group(2, {2: 1.0})]
    assert reap(found, 1) == [Group(2, {2: 1.0})], "the mean counts, not the sum"
    likeness = torch.tensor([[1.0, 0.1, 0.9], [0.1, 1, 0.2], [0.9, 0.2, 1]]).double()
    assert m_smoe(statistics([0, 4, 2], likeness=likeness), 2) == [Group(1, {1: 1.0}), Group(2, {0: 0.0, 2: 1.0})]


def test_experts_of_which_none_works_count_alike():
    outputs = torch.tensor([[0.0, 0], [9, 9], [0, 1], [9, 8]]).double()
    found = hc_smoe(statistics([0, 3, 0, 1], outputs=outputs), 2)
    assert found == [Group(0, {0: 0.5, 2: 0.5}), Group(1, {1: 0.75, 3: 0.25})]


def test_clusters_are_always_as_many_as_asked_for():
    """Also where all experts put out the same."""
    found = hc_smoe(statistics([1, 1, 1, 1], outputs=torch.zeros(4, 3).double()), 3)
    assert len(found) == 3
    assert sorted(number for group in found for number in group.members) == [0, 1, 2, 3]


@pytest.mark.slow
def test_the_command_tells_what_it_does_and_leaves_a_card(mixtures, tmp_path, capsys):
    target, record = compressed(mixtures, "mixtral", tmp_path / "new", "--experts", 3, "--method", "hc_smoe")
    told = capsys.readouterr().out
    assert f"{COUNT} experts in each of 3 layers, {ACTIVE} for each token; 3 are left" in told
    assert "the mixture runs over 9 samples" in told
    assert f"compressed mixture: {target}" in told
    assert "layer 2: " in told
    assert (record["method"], len(record["layers"])) == ("hc_smoe", 3)
    assert "by hc_smoe on 9 calibration\nsamples" in (target / "README.md").read_text()
    assert (target / "tokenizer.json").read_bytes() == (mixtures["mixtral"] / "tokenizer.json").read_bytes()


def test_problems_are_told_before_anything_is_written(mixtures, tiny_zoo, tmp_path, capsys, monkeypatch):
    mixtral, target = mixtures["mixtral"], tmp_path / "new"
    given = arguments(mixtures, "mixtral", target)
    assert refusal(capsys, "compress", mixtral) == [
        "error: --output FOLDER is needed",
        "error: --experts NUMBER is needed",
        "error: --data_dir FOLDER is needed",
    ]
    with monkeypatch.context() as patch:
        patch.setattr("expert_merging.compress.find_spec", lambda _: None)
        assert refusal(capsys, *given, "--experts", 3, "--method", "hc_smoe") == [
            "error: --method hc_smoe needs scipy, which clusters experts; pip install scipy"
        ]
    for count in (1, COUNT):
        assert refusal(capsys, *given, "--experts", count) == [
            f"error: --experts must be less than the {COUNT} that each layer has, and at least the {ACTIVE} that work "
            f"on a token, got {count}"
        ]
    (told,) = refusal(capsys, *given, "--experts", 3, "--data_dir", tmp_path / "none")
    assert "does not exist" in told
    (empty := tmp_path / "empty").mkdir()
    assert refusal(capsys, *given, "--experts", 3, "--data_dir", empty) == [
        f"error: --data_dir {empty} holds no TASK.json and no TASK.jsonl"
    ]
    dense = tiny_zoo / "Mistral-7B-v0.1"
    assert refusal(capsys, "compress", dense, *given[2:], "--experts", 2) == [
        f"error: {dense} has the model_type 'mistral', and mixtures that can be compressed are mixtral, olmoe, "
        "qwen2_moe, qwen3_moe"
    ]
    assert not target.exists()


def test_mixtures_in_another_form_are_refused(mixtures, tmp_path, capsys):
    source = save_mixture(tmp_path / "source", "mixtral")
    tensors = tensors_of(source)
    stacked = {name: tensor for name, tensor in tensors.items() if "layers.1.block_sparse_moe.experts" not in name}
    given = ["compress", source, "--output", tmp_path / "new", "--data_dir", mixtures["dataset"], "--experts", 2]
    save_file(stacked, source / SINGLE, metadata={"format": "pt"})
    assert refusal(capsys, *given) == [
        f"error: {source} lacks model.layers.1.block_sparse_moe.experts.0.w1.weight: experts must have tensors of "
        "their own; if they are stacked, load the folder with transformers 5 and save it again"
    ]
    uneven = {**tensors, "model.layers.1.block_sparse_moe.gate.weight": torch.ones(2, 32)}
    save_file(uneven, source / SINGLE, metadata={"format": "pt"})
    assert refusal(capsys, *given) == [f"error: {source} has layers with 2 and 4 experts"]
    more = {**tensors, "model.layers.0.block_sparse_moe.experts.3.w1.bias": torch.ones(5)}
    save_file(more, source / SINGLE, metadata={"format": "pt"})
    assert refusal(capsys, *given) == [
        f"error: {source} has model.layers.0.block_sparse_moe.experts.3.w1.bias beside the routers' rows and the "
        "matrices of 4 experts in each layer, and they cannot be left out one by one"
    ]
    save_file(tensors, source / SINGLE, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": "two"}))
    assert refusal(capsys, *given) == [
        f"error: config.json of {source} has num_experts_per_tok 'two', which is no number"
    ]
    (source / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": COUNT}))
    assert refusal(capsys, *given) == [
        f"error: {source} has {COUNT} experts in each layer, and by its config.json {COUNT} work on a token, so there "
        "are none to leave out"
    ]


def test_a_mixture_that_computes_nan_is_refused(mixtures, tmp_path, capsys):
    source = save_mixture(tmp_path / "source", "olmoe")
    tensors = tensors_of(source)
    tensors["model.layers.1.input_layernorm.weight"].fill_(float("inf"))
    save_file(tensors, source / SINGLE, metadata={"format": "pt"})
    given = ["compress", source, "--output", tmp_path / "new", "--data_dir", mixtures["dataset"], "--experts", 2]
    assert refusal(capsys, *given) == ["error: the mixture computes NaN or infinite values in layer 1"]
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_layers_without_experts_stay_as_they_are(mixtures, tmp_path):
    source = save_mixture(tmp_path / "source", "qwen3_moe", mlp_only_layers=[1])
    given = {**mixtures, "qwen3_moe": source}
    target, record = compressed(given, "qwen3_moe", tmp_path / "new", "--experts", 3)
    assert list(record["layers"]) == ["0", "2"]
    before, after = tensors_of(source), tensors_of(target)
    dense = [name for name in before if ".1.mlp." in name]
    assert len(dense) == 3
    assert all(torch.equal(after[name], before[name]) for name in dense)
    report = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)[1]
    assert not any(report.values()), report


@pytest.mark.parametrize("kind", MIXTURES)
def test_settings_of_mixtures_are_those_of_transformers(kind):
    """Releases write the number of experts under either name, and read the one that published files have."""
    config = AutoConfig.for_model(kind, **{MIXTURES[kind].count: 3})
    assert MIXTURES[kind].usual_per_token == config.num_experts_per_tok
    written = config.to_dict()
    assert [written[name] for name in ("num_experts", "num_local_experts") if name in written] == [3]
