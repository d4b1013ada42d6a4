"""Every reader of what users give, on good files and on some hundred damaged ones; `make fuzz` takes 50,000."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.readers import READERS, Reader, cases, exchanged, outcome

# Of each reader; twenty readers make 500.
EXAMPLES = 25


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
