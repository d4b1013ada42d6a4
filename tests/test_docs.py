"""The documentation: links lead somewhere, methods have their pages, examples run, the picture shows the table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest

from docs.tools.catalogue import documented_methods
from docs.tools.chart import PICTURE, read_table
from docs.tools.methods import FLAGS, KINDS, METHODS, TABLES, command_of, method_page, read_written, tables
from expert_merging.options import resolve
from expert_merging.parser import parse
from Mistral.backbone import BACKBONE
from tests.launching import run_program, run_together

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "dataset/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
DOCUMENTED = documented_methods()
METHOD_PAGES = sorted(file.stem for file in METHODS.glob("*.md") if file.stem != "index")
ADDING = ROOT / "docs" / "adding-a-method.md"


def prose(file: Path) -> str:
    """A page without its code, in which brackets are no links."""
    text = re.sub(r"^```.*?^```$", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", lambda code: "`" + re.sub(r"[\[\]()]", "", code[0][1:-1]) + "`", text)


@cache
def anchors(file: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the built pages make them."""
    text = prose(file)
    if file.parent == METHODS:  # what is added when the pages are built
        text += "".join(f"\n## {title}\n" for title in ("Details", "Flags", "Command", "Source"))
    found: Counter[str] = Counter()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        found[re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")] += 1
    assert max(found.values(), default=1) == 1, f"{file} has two headings of one name"
    return set(found)


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(file)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (file.parent / path).resolve() if path else file
        assert there.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in anchors(there), f"{target}: there is no such heading"


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_that_pages_name_exist(file):
    names = re.findall(
        r"`((?:expert_merging|configs|docs|zoo|tests|benchmarks|dataset)/[\w./-]+\.\w+)`", file.read_text()
    )
    assert not [name for name in names if not (ROOT / name).exists()]


def broken_tables(text: str) -> list[str]:
    """Rows that have not as many cells as the head of their table, and tables whose second row is no ruler.

    A bar separates cells also in code, unless there is a backslash before it.
    """
    without_code = re.sub(r"^```.*?^```$", lambda code: "\n" * code[0].count("\n"), text, flags=re.M | re.S)
    found, lines = [], without_code.splitlines()
    for before, first, rows in tables_in(lines):
        cells = [len(re.split(r"(?<!\\)\|", row)) for row in rows]
        if len(rows) < 2 or not re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", rows[1]) or before:
            found.append(f"line {first}: no table")
        found += [f"line {first + number}: {count - 2} cells of {cells[0] - 2}" for number, count in enumerate(cells)
                  if count != cells[0]]  # fmt: skip
    return found


def tables_in(lines: list[str]) -> Iterator[tuple[str, int, list[str]]]:
    """Runs of lines that begin with a bar: the line before, the number of the first, and all of them."""
    for is_table, run in groupby(enumerate(lines), key=lambda line: line[1].startswith("|")):
        numbered = list(run)
        if is_table:
            first = numbered[0][0]
            yield lines[first - 1].strip() if first else "", first + 1, [text.rstrip() for _, text in numbered]


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_tables_have_as_many_cells_in_every_row(file):
    assert broken_tables(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", DOCUMENTED)
def test_tables_that_are_made_are_whole(page):
    assert broken_tables(method_page(DOCUMENTED[page], read_written(page))) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("| a | b |\n|---|---|\n| `x\\|y` | 1 |\n| \\| | 2 |\n", []),
        ("```\n| a |\n```\n\n| a | b |\n|---|---|\n| `x|y` | 1 |\n", ["line 7: 3 cells of 2"]),
        ("| a | b |\n|:--|--:|\n| 1 | 2 | 3 |\n| 1 |\n", ["line 3: 3 cells of 2", "line 4: 1 cells of 2"]),
        ("| a | b |\n|---|\n", ["line 2: 1 cells of 2"]),
        ("text\n| a | b |\n|---|---|\n", ["line 2: no table"]),
        ("\n| a | b |\n| 1 | 2 |\n", ["line 2: no table"]),
        ("| a |\n", ["line 1: no table"]),
        ("```\n| a |\n```\n", []),
    ],
)
def test_broken_tables_are_noticed(text, told):
    assert broken_tables(text) == told


@pytest.mark.parametrize("page", sorted({*DOCUMENTED, *METHOD_PAGES}))
def test_every_method_has_an_idea_and_a_formula(page):
    written = read_written(page)
    assert written.title
    formula = written.text.split("## Formula")[1]
    assert "$$" in formula


@pytest.mark.parametrize("page", DOCUMENTED)
def test_a_page_has_all_that_the_program_says(page):
    method = DOCUMENTED[page]
    text = method_page(method, read_written(page))
    assert f"`{method.name}`" in text
    assert method.summary in text
    flags = text.split("\n## Flags\n")[1]
    for flag in method.flags:
        row = next(line for line in flags.splitlines() if line.startswith(f"| `--{flag.name}` |"))
        assert len(re.split(r"(?<!\\)\|", row)) == 6, "four cells"
        assert flag.help[1:].split("|")[0] in row
    for section in ("Idea", "Formula", "Flags", "Command", "Source"):
        assert text.count(f"\n## {section}\n") == 1


def test_a_default_is_told_for_every_family_that_has_its_own():
    flags = {flag.name: flag for flag in DOCUMENTED["task_arithmetic"].flags}
    assert flags["scaling_coefficient"].default == "0.3 (InternVL 0.1)"


@pytest.mark.parametrize("page", DOCUMENTED)
def test_the_command_of_a_page_is_one(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, script, *arguments = command_of(DOCUMENTED[page], read_written(page)).split()
    assert (ROOT / script).is_file()
    resolved = resolve(parse(arguments, BACKBONE), {}, BACKBONE)
    assert DOCUMENTED[page].name in {step.name for step in resolved.steps}
    assert not resolved.ignored


def test_a_page_that_lacks_something_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("docs.tools.methods.PAGES", tmp_path / "docs")
    monkeypatch.setattr("docs.tools.methods.METHODS", tmp_path / "docs")
    (tmp_path / "docs").mkdir()
    with pytest.raises(ValueError, match=r"docs/new\.md is missing"):
        read_written("new")
    (tmp_path / "docs" / "new.md").write_text("---\nkind: closed form\n---\n# New\n\n## Idea\n\nNone.\n")
    with pytest.raises(ValueError, match="lacks sources, Formula"):
        read_written("new")
    (tmp_path / "docs" / "new.md").write_text(
        "---\nkind: odd\nsources: [me]\n---\n# New\n\n## Idea\n\n## Formula\n\n1\n"
    )
    with pytest.raises(ValueError, match=r"kind must be one of closed form, .*got 'odd'"):
        read_written("new")


def test_notes_on_a_flag_appear_once_a_method_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr("docs.tools.methods.FLAGS", tmp_path)
    (tmp_path / "density.md").write_text("Mind the **density**.\n")
    assert "### `--density`\n\nMind the **density**." in method_page(DOCUMENTED["ties"], read_written("ties"))
    assert "Mind" not in method_page(DOCUMENTED["iso"], read_written("iso"))


def test_lists_have_every_method():
    shown = tables(DOCUMENTED)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page, method in DOCUMENTED.items():
        assert f"[`{method.name}`]({page}.md)" in shown
        assert f"[`{method.name}`](docs/methods/{page}.md)" in readme
    assert TABLES in (METHODS / "index.md").read_text(encoding="utf-8")
    assert {read_written(page).kind for page in METHOD_PAGES} <= set(KINDS)
    assert all(file.read_text(encoding="utf-8").strip() for file in FLAGS.glob("*.md"))


def examples() -> dict[str, str]:
    """The Python blocks of each section on adding a method, in their order."""
    sections = re.split(r"^## ", ADDING.read_text(encoding="utf-8"), flags=re.MULTILINE)
    blocks = {text.split("\n")[0]: re.findall(r"^```python.*?\n(.*?)^```$", text, re.M | re.S) for text in sections}
    return {title: "\n".join(found) for title, found in blocks.items() if found}


@pytest.mark.slow
@pytest.mark.parametrize("section", examples())
def test_examples_run(section, tmp_path):
    # In a process of its own, as methods that are registered stay so. Imports from the future go first in a file.
    code = examples()[section].replace("from __future__ import annotations\n", "")
    names = re.findall(r"^def (test_\w+)", code, re.MULTILINE)
    assert names, "an example has a test"
    calls = "\n".join(f"{name}()" for name in names)
    program = f"from __future__ import annotations\n{code}\n{calls}\n"
    done = run_together(1, run_program, program, folder=tmp_path)
    assert done.codes == (0,), done.stderr


def test_the_picture_shows_the_numbers_of_the_table():
    columns, rows = read_table((ROOT / "README.md").read_text(encoding="utf-8"))
    assert columns == ["Chat", "Math", "Code", "mean"]
    picture = PICTURE.read_text(encoding="utf-8")
    for label, numbers in rows.items():
        assert f">{label}<" in picture
        assert f">{numbers[-1]:.1f}<" in picture
        assert numbers[-1] == pytest.approx(sum(numbers[:-1]) / len(numbers[:-1]), abs=0.06)
    assert rows == read_table((ROOT / "docs" / "demo.md").read_text(encoding="utf-8"))[1]


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160
