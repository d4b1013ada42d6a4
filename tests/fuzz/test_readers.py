"""Every reader of what users give, on good files and on some hundred damaged ones; `make fuzz` takes 50,000."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.readers import READERS, Reader, cases, exchanged, outcome

# Of each reader; twenty readers make 500.
EXAMPLES = 25
# What every setting of a model is exchanged for; in turn, where it is not `make fuzz` that asks.
VALUES = ('"x"', "[1]", "{}", "null", "-1", "0", "1e400")


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_damaged_files_are_read_or_refused(reader: Reader, tmp_path):
    folder = tmp_path / "files"
    reader.make(folder)
    assert outcome(reader, folder) == "read"

    @settings(
        max_examples=min(EXAMPLES, settings().max_examples),
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(reader, folder))
    def one(case: tuple[str, bytes]) -> None:
        name, content = case
        with exchanged(folder / name, content):
            assert outcome(reader, folder) in ("read", "refused")

    one()
    assert outcome(reader, folder) == "read"


def settings_of(config: dict[str, object], *above: str) -> Iterator[tuple[str, ...]]:
    """Paths of all settings of a configuration, those of its parts too."""
    for name, value in config.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from settings_of(value, *above, name)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Mistral", "Qwen2-VL", "InternVL"])
def test_every_setting_of_a_model_may_be_anything(family, tmp_path):
    reader = next(reader for reader in READERS if reader.name == f"config {family}")
    folder = tmp_path / "files"
    reader.make(folder)
    content = (folder / "config.json").read_text()
    for number, path in enumerate(settings_of(json.loads(content))):
        for value in VALUES if "FUZZ" in os.environ else [VALUES[number % len(VALUES)]]:
            config = json.loads(content)
            part = config
            for name in path[:-1]:
                part = part[name]
            part[path[-1]] = "@here@"
            with exchanged(folder / "config.json", json.dumps(config).replace('"@here@"', value).encode()):
                try:
                    assert outcome(reader, folder) in ("read", "refused")
                except BaseException as error:
                    raise AssertionError(f"{'.'.join(path)}: {value}") from error
