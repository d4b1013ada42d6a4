"""Every reader of what users give: what it reads, and how. Damage must end in a result or in `InputError`, soon."""

from __future__ import annotations

import io
import json
import signal
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safetensors import SafetensorError, deserialize

import InternVL.backbone
import Qwen2VL.backbone
from expert_merging import options
from expert_merging.backbone import Backbone
from expert_merging.catalogue import find_method
from expert_merging.checkpoints import configurations
from expert_merging.checkpoints.adapter import Adapter
from expert_merging.checkpoints.checkpoint import Checkpoint, read_header
from expert_merging.checkpoints.tokenizer_files import read_vocabulary
from expert_merging.context import Context
from expert_merging.convert import convert
from expert_merging.errors import InputError, lines_of
from expert_merging.extract import extract
from expert_merging.learned.coefficients import Coefficients
from expert_merging.learned.earlier import applied
from expert_merging.learned.start import _remembered
from expert_merging.machine import limited_memory
from expert_merging.outputs import make_header, metadata_of
from expert_merging.parser import parse
from expert_merging.plan import make_plan
from expert_merging.progress import no_progress
from expert_merging.questions import templates
from expert_merging.questions.calibration import Sample, load_samples
from expert_merging.questions.pictures import read_picture
from expert_merging.run import Run
from expert_merging.search.record import Evaluation, Record
from expert_merging.shortage import shortage_of
from expert_merging.verify import verify
from Mistral.backbone import BACKBONE
from tests import checkpoints, internvl, qwen2vl
from tests.adapters import save_adapter
from tests.command import TENSORS, flags, merge
from tests.fuzz import measured
from tests.fuzz.damage import KINDS, damaged

# What one damaged file may take: seconds of a processor, and bytes of memory.
SECONDS = 5
MEMORY = 1 << 30
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class Reader:
    """One reader.

    Args:
        name: what it reads.
        make: puts good files into a folder.
        files: those that are damaged, one at a time.
        read: reads the folder.
        share: how many cases it gets beside the others; one that takes long gets few.
    """

    name: str
    make: Callable[[Path], object]
    files: tuple[str, ...]
    read: Callable[[Path], object]
    share: int = 10


class Slow(BaseException):
    """A case that has taken too long."""


@contextmanager
def _in_time() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Slow(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS, SECONDS / 4)  # again, where what is raised is not heard
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def outcome(reader: Reader, folder: Path) -> str:
    """``read`` or ``refused``, whatever lies in the folder; anything else is raised.

    A refusal has at least one problem, each of one line.
    """
    try:
        with _in_time(), limited_memory(MEMORY), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(folder)
        return "read"
    except InputError as error:
        problems, lines = error.problems, lines_of(error).splitlines()
    except (MemoryError, RuntimeError) as error:
        if shortage_of(error) is None:
            raise
        return "refused"  # by the command, which tells of memory in one line
    assert problems
    assert all(map(str.strip, problems))
    assert len(lines) == len(problems), lines
    return "refused"


def cases(reader: Reader, folder: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    """Names of files with damaged contents."""

    def of_file(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
        content = (folder / name).read_bytes()
        kind = KINDS.get(Path(name).suffix or Path(name).name, damaged)
        return st.tuples(st.just(name), kind(content))

    return st.one_of([of_file(name) for name in reader.files])


@contextmanager
def exchanged(file: Path, content: bytes) -> Iterator[None]:
    """Put other bytes into a file for a while."""
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


def _tiny(folder: Path) -> None:
    tensors = {**TENSORS, "steps": torch.ones(2, dtype=torch.int64), "half": torch.ones(3, dtype=torch.bfloat16)}
    checkpoints.write_checkpoint(folder, tensors, metadata={"format": "pt", "x": "y"})


def _header(folder: Path) -> None:
    """What the library accepts is read as the library reads it, and nothing else is read."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    try:
        expected = {name: (said["dtype"], said["shape"], bytes(said["data"])) for name, said in deserialize(content)}
    except SafetensorError:
        expected = None
    try:
        header, entries = read_header(file)
    except InputError:
        assert expected is None, "refused, and the library accepts it"
        raise
    found = {
        entry.name: (entry.dtype, list(entry.shape), content[entry.offset : entry.offset + entry.size])
        for entry in entries
    }
    assert found == expected
    assert header == content[: 8 + struct.unpack("<Q", content[:8])[0]]
    metadata_of(header)
    Checkpoint(folder)


def _sharded(folder: Path) -> None:
    names = list(TENSORS)
    checkpoints.write_checkpoint(folder, *({name: TENSORS[name]} for name in names))


def _model(folder: Path) -> None:
    checkpoints.save_model(folder, 0)
    (folder / "added_tokens.json").write_text('{"<new>": 75}')


def _configuration(folder: Path, *, backbone: Backbone, loads: bool = False) -> None:
    config = Checkpoint(folder).config
    configurations.differing_settings({"model_type": "mistral", "num_hidden_layers": 3}, {"A": config})
    configurations.layer_count(config)
    backbone.parameter_names(folder)
    if loads:
        backbone.load_model(folder, torch.float32)


def _tokenizer(folder: Path, *, backbone: Backbone = BACKBONE) -> None:
    read_vocabulary(folder)
    processor = backbone.load_processor(folder)
    backbone.encode_prompt(processor, Sample.test("Which of 7 seas is blue"), None)


def _vocabularies(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for place in ("json", "text", "pieces"):
        (folder / place).mkdir()
    vocabulary = {token: number for number, token in enumerate(checkpoints.CHARACTERS)}
    (folder / "json" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "json" / "added_tokens.json").write_text('{"<new>": 75}')
    (folder / "json" / "tokenizer_config.json").write_text(
        '{"eos_token": {"content": "</s>"}, "added_tokens_decoder": {"76": {"content": "<x>", "special": true}}}'
    )
    (folder / "text" / "vocab.txt").write_text("\n".join(checkpoints.CHARACTERS[:10]))
    pieces = b"".join(
        b"\x0a" + bytes([len(piece) + 2]) + b"\x0a" + bytes([len(piece)]) + piece for piece in (b"<s>", b"a")
    )
    (folder / "pieces" / "tokenizer.model").write_bytes(pieces)


def _read_vocabularies(folder: Path) -> None:
    for place in ("json", "text", "pieces"):
        read_vocabulary(folder / place)


def _templates(folder: Path) -> None:
    for name in ("own", "settings"):
        (folder / name).mkdir(parents=True)
    (folder / "own" / "chat_template.jinja").write_text(_TEMPLATE)
    (folder / "own" / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    settings = {"chat_template": _TEMPLATE, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "settings" / "tokenizer_config.json").write_text(json.dumps(settings))


def _template(folder: Path) -> None:
    for name in ("own", "settings"):
        found = templates.read_template(folder / name)
        if found is not None:
            problem = templates.fault.__wrapped__(found)
            if problem is not None:
                raise InputError(problem)
            templates.turn_end.__wrapped__(found)
            found.ask("Which of 7 seas is blue")


def _tasks(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (3, 2)).save(folder / "a.png")
    entries = [
        {"question": "a?", "response": "b", "question_id": 3, "image_path": "a.png"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image", "url": "a.png"}]}]},
        {"conversations": [{"from": "human", "value": "<image>x"}, {"from": "gpt", "value": "y"}], "images": ["a.png"]},
        {"instruction": "a", "input": "b", "output": "c", "system": "d", "history": [["a", "b"]]},
    ]
    (folder / "Chat.json").write_text(json.dumps(entries))
    (folder / "Code.jsonl").write_text("\n".join(map(json.dumps, entries)))


def _samples(folder: Path) -> None:
    load_samples(folder, ("Chat", "Code"), default_count=9, counts={}, task_expert={})


_PICTURES = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "tif": "TIFF", "webp": "WEBP", "bmp": "BMP", "ppm": "PPM"}
_SCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) show\n%%EOF\n"


def _pictures(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    picture = Image.linear_gradient("L").resize((16, 9)).convert("RGB")
    for ending, kind in _PICTURES.items():
        picture.save(folder / f"a.{ending}", kind)
    picture.convert("P").save(folder / "b.png", transparency=0)
    picture.convert("RGBA").save(folder / "c.png")
    (folder / "q.png").write_bytes(_SCRIPT)


def _read_pictures(folder: Path) -> None:
    refused = []
    for file in sorted(folder.iterdir()):
        try:
            read_picture(file, on_white=True)
        except InputError as error:
            refused.append(str(error))
    if len(refused) > 1:  # the script is always refused
        raise InputError(*refused)


def _run(folder: Path) -> None:
    for name, shift in {"base": 0, "A": 1, "B": 2}.items():
        checkpoints.write_checkpoint(folder / name, {key: tensor + shift for key, tensor in TENSORS.items()})
    values = {"layers.0.weight": torch.rand(2, 2), "layers.1.weight": torch.rand(2, 1)}
    (folder / "run").mkdir()
    Coefficients(("A", "B"), values, (1.0, 1.0)).save(folder / "run" / "coefficients.safetensors")
    published = {"layers_0_weight": [[0.5, 0.25], [1.0, 0.125]], "layers_1_weight": [0.75, 0.0625]}
    (folder / "weight_coeffs.json").write_text(json.dumps(published))


def _coefficients(folder: Path) -> None:
    plan = make_plan(folder / "base", {name: folder / name for name in "AB"}, list(BACKBONE.exclude_params))
    context = Context(plan, BACKBONE, Run(folder / "new"), 0, "cpu", "none", no_progress, find_method)
    for place in ("run", "weight_coeffs.json"):
        applied(context, folder / place, {"A": 0.5}, None, force=False).run()


def _options(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    given = {
        "method": "expert_merging",
        "seed": 3,
        "base_model_path": "base",
        "expert": {"Chat": "a", "Code": "b"},
        "samples_per_task_dict": {"Chat": 3},
        "exclude_params": [".*norm.*"],
        "scaling_coefficient": 0.3,
        "post": None,
        "shard": False,
        "learning_rate": 0.5,
        "output_path": "out",
    }
    (folder / "options.yaml").write_text(json.dumps(given))
    (folder / "run.json").write_text(json.dumps({"family": "Mistral", "method": "ties", "seed": 1, "options": given}))
    arguments = ["--method", "ties", "--expert", "A=a", "--base_model_path", "b", "--density", "0.5", "--seed", "3"]
    more = ["--coeffs_size_dict", '{"a": 1}', "--task_vector_coeffs_dict", "A=1", "--exclude_params", '[".*norm.*"]']
    (folder / "arguments.json").write_text(json.dumps(arguments))
    (folder / "more.json").write_text(json.dumps(more))
    (folder / ".env").write_text("CACHE_DIR=~/models")


def _configured(folder: Path) -> None:
    for name in ("options.yaml", "run.json"):
        options.resolve({"config": str(folder / name)}, {}, BACKBONE)


def _dotenv(folder: Path) -> None:
    with mock.patch.object(options, "ROOT", folder):
        options.resolve({}, {}, BACKBONE)


def _arguments(folder: Path) -> None:
    given = []
    for name in ("arguments.json", "more.json"):
        try:
            given += [str(value) for value in json.loads((folder / name).read_bytes())]
        except (ValueError, TypeError, RecursionError):
            return
    if not any(value.startswith("-") and "--help".startswith(value) for value in given):
        options.resolve(parse(given, BACKBONE), {}, BACKBONE)


def _adapter(folder: Path) -> None:
    from transformers import MistralForCausalLM

    checkpoints.save_model(folder / "base", 0)
    save_adapter(partial(MistralForCausalLM.from_pretrained, folder / "base"), folder / "adapter")


def _read_adapter(folder: Path) -> None:
    adapter = Adapter(folder / "adapter", Checkpoint(folder / "base"))
    for name in adapter.changed:
        adapter.read(name)
    adapter.fingerprint(whole=True)


def _records(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    recorded = {
        "family": "Mistral",
        "method": "ties",
        "seed": 1,
        "options": {},
        "checkpoints": {"base": "x"},
        "inputs": {},
    }
    (folder / "config.json").write_text(json.dumps(recorded))
    record = Record(folder / "evaluations.json", ["A"])
    record.add([Evaluation((0.5,), {"x": 0.5, "y": 0.25})], save=True)
    chosen = {"chosen": "svd", "divergence": {"svd": 0.5, "aswudi": 0.6}}
    (folder / "start.json").write_text(json.dumps(chosen))
    run = Run(folder)
    run.kept.write(folder / "card.md", b"card")
    (folder / "model.safetensors").write_bytes(make_header(()))
    run.kept.note_others(folder)


def _read_records(folder: Path) -> None:
    now = {"family": "Mistral", "method": "ties", "options": {}, "checkpoints": {"base": "x"}, "inputs": {}}
    run = Run(folder)
    _ = run.recorded_seed(3)
    for evaluation in Record(folder / "evaluations.json", ["A"]).evaluations:
        _ = evaluation.score
    _remembered(SimpleNamespace(run=run), SimpleNamespace(starts=("svd", "aswudi")))  # type: ignore[arg-type]
    for name, written in run.kept.files().items():
        written.differing(folder / name)
        run.kept.has(folder / name)
    run.check(now)


def _finished(folder: Path) -> None:
    for name, shift in {"base": 0, "A": 1, "B": 2}.items():
        checkpoints.write_checkpoint(folder / name, {key: tensor + shift for key, tensor in TENSORS.items()})
    places = flags(folder / "base", A=folder / "A", B=folder / "B")
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        assert merge("--method", "ties", *places, "--output_path", folder, "--run_name", "r") == 0


def _verified(folder: Path) -> None:
    verify(folder / "ties" / "r", Console(file=io.StringIO()))


def _pickles(folder: Path) -> None:
    tensors = {**TENSORS, "half": torch.ones(3, dtype=torch.bfloat16), "part": torch.rand(6)[::2]}
    for name, is_archive in {"new": True, "old": False}.items():
        (folder / name).mkdir(parents=True)
        torch.save(tensors, folder / name / "pytorch_model.bin", _use_new_zipfile_serialization=is_archive)


def _converted(folder: Path) -> None:
    for name in ("new", "old"):
        with tempfile.TemporaryDirectory() as place, redirect_stdout(io.StringIO()):
            convert(folder / name, Path(place) / "model", Console(file=io.StringIO()))


def _masked(folder: Path) -> None:
    for name, shift in {"base": 0, "A": 1, "B": 2}.items():
        checkpoints.write_checkpoint(folder / name, {key: tensor + shift for key, tensor in TENSORS.items()})
    places = flags(folder / "base", A=folder / "A", B=folder / "B")
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        assert merge("--method", "emr", *places, "--output_path", folder, "--run_name", "r") == 0


def _extracted(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place, redirect_stdout(io.StringIO()):
        extract(folder / "emr" / "r", "A", Path(place) / "model", None, Console(file=io.StringIO()))


def _command(folder: Path) -> None:
    checkpoints.make_zoo(folder)


def _whole(folder: Path, *, method: str) -> None:
    experts = {name: folder / place for name, place in list(checkpoints.EXPERTS.items())[:2]}
    chosen = ["--method", method, *flags(folder / checkpoints.BASE, **experts), "--output_path", folder / "out"]
    chosen += ["--data_dir", folder / "dataset"] if method == "expert_merging" else []
    errors, shown = io.StringIO(), io.StringIO()
    with redirect_stderr(errors), redirect_stdout(shown):
        code = merge(*chosen, "--dry_run")
    lines = errors.getvalue().splitlines()
    assert code == bool(lines), lines
    assert all(line.startswith("error: ") for line in lines), lines
    if lines:
        raise InputError(*lines)


_SMALL = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_VOCABULARIES = ("json/vocab.json", "json/added_tokens.json", "json/tokenizer_config.json")
_BASE, _EXPERT = checkpoints.BASE, checkpoints.EXPERTS["Chat"]
_FOLDERS = tuple(
    f"{place}/{name}"
    for place in (_BASE, _EXPERT)
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    )
)

_MASKED = (
    "config.json",
    "model/model.safetensors",
    "model/masks/model.safetensors",
    "model/masks/rescalers.safetensors",
)
_FINISHED = ("config.json", "digests.json", "model/config.json", "model/model.safetensors", "model/README.md")

READERS = (
    Reader("header", _tiny, ("model.safetensors",), _header, 60),
    Reader("index", _sharded, (checkpoints.INDEX,), lambda folder: Checkpoint(folder), 30),
    Reader(
        "config Mistral",
        _model,
        ("config.json", "generation_config.json"),
        partial(_configuration, backbone=BACKBONE, loads=True),
        8,
    ),
    Reader(
        "config Qwen2-VL",
        lambda folder: qwen2vl.save_model(folder, 0),
        ("config.json",),
        partial(_configuration, backbone=Qwen2VL.backbone.BACKBONE),
        5,
    ),
    Reader(
        "config InternVL",
        lambda folder: internvl.save_model(folder, 0),
        ("config.json",),
        partial(_configuration, backbone=InternVL.backbone.BACKBONE),
        8,
    ),
    Reader("tokenizer", _model, ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"), _tokenizer, 8),
    Reader(
        "processor Qwen2-VL",
        lambda folder: qwen2vl.save_model(folder, 0),
        ("preprocessor_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.json"),
        partial(_tokenizer, backbone=Qwen2VL.backbone.BACKBONE),
        4,
    ),
    Reader(
        "processor InternVL",
        lambda folder: internvl.save_model(folder, 0),
        ("preprocessor_config.json", "tokenizer_config.json", "vocab.json", "config.json"),
        partial(_tokenizer, backbone=InternVL.backbone.BACKBONE),
        4,
    ),
    Reader(
        "vocabulary",
        _vocabularies,
        (
            "json/vocab.json",
            "json/added_tokens.json",
            "json/tokenizer_config.json",
            "text/vocab.txt",
            "pieces/tokenizer.model",
        ),
        _read_vocabularies,
        40,
    ),
    Reader("template", _templates, ("own/chat_template.jinja", "settings/tokenizer_config.json"), _template, 8),
    Reader("calibration", _tasks, ("Chat.json", "Code.jsonl"), _samples, 40),
    Reader(
        "picture", _pictures, (*(f"a.{ending}" for ending in _PICTURES), "b.png", "c.png", "q.png"), _read_pictures, 30
    ),
    Reader(
        "coefficients",
        _run,
        ("run/coefficients.json", "run/coefficients.safetensors", "weight_coeffs.json"),
        _coefficients,
        30,
    ),
    Reader("options", _options, ("options.yaml", "run.json"), _configured, 30),
    Reader(".env", _options, (".env",), _dotenv, 20),
    Reader("flags", _options, ("arguments.json", "more.json"), _arguments, 8),
    Reader(
        "adapter", _adapter, ("adapter/adapter_config.json", "adapter/adapter_model.safetensors"), _read_adapter, 15
    ),
    Reader("records", _records, ("config.json", "evaluations.json", "start.json", "digests.json"), _read_records, 30),
    Reader("measured", measured.measure, measured.MEASURED, measured.read_measured, 8),
    Reader("sweep", measured.sweep, ("sweep.json",), measured.read_sweep, 20),
    Reader("toolkits", measured.toolkits, measured.TOOLKITS, measured.read_toolkits, 15),
    Reader("labelled", measured.label, ("Chat.json", "Math.jsonl"), measured.read_labelled, 20),
    Reader("routed", measured.route, ("routed.json",), measured.read_routed, 20),
    Reader("verify", _finished, tuple(f"ties/r/{name}" for name in _FINISHED), _verified, 8),
    Reader("pickle files", _pickles, ("new/pytorch_model.bin", "old/pytorch_model.bin"), _converted, 15),
    Reader("extract", _masked, tuple(f"emr/r/{name}" for name in _MASKED), _extracted, 8),
    Reader("command, closed form", _command, _FOLDERS, partial(_whole, method="ties"), 3),
    Reader(
        "command, learned",
        _command,
        (*_FOLDERS, "dataset/Chat.json"),
        partial(_whole, method="expert_merging"),
        2,
    ),
)
