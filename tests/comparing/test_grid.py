"""The points of a sweep, from ranges and lists."""

from __future__ import annotations

import pytest

from expert_merging.comparing.grid import label_of, points_of, values_of
from expert_merging.errors import InputError


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ("0.1:0.5:0.1", [0.1, 0.2, 0.3, 0.4, 0.5]),
        ("0:2:1", [0, 1, 2]),
        ("3:1:-1", [3, 2, 1]),
        ("0.1:0.35:0.1", [0.1, 0.2, 0.3]),
        ("1e-3:3e-3:1e-3", [0.001, 0.002, 0.003]),
        ("0,1,2", [0, 1, 2]),
        ("ties, dare_ta", ["ties", "dare_ta"]),
        ("ties,0.5,true", ["ties", 0.5, True]),
        ("[0.1, 0.2],[0.3, 0.4]", [[0.1, 0.2], [0.3, 0.4]]),
        ("auto", ["auto"]),
        ('"Math: 1.2, mlp: 0.8"', ["Math: 1.2, mlp: 0.8"]),
        ('"Math: 1.2, mlp: 0.8",Math: 0', ["Math: 1.2, mlp: 0.8", "Math: 0"]),
        ('Math: 0, "Math: 1.2, mlp: 0.8"', ["Math: 0", "Math: 1.2, mlp: 0.8"]),
        ([1, "x"], [1, "x"]),
        (0.5, [0.5]),
    ],
)
def test_values_are_ranges_with_both_ends_or_lists(given, values):
    assert values_of("x", given) == values
    assert [type(value) for value in values_of("x", given)] == [type(value) for value in values]


def test_every_combination_is_a_point_once():
    grid = {"method": "ties,svd", "scaling-coefficient": "0.1:0.2:0.1"}
    points = points_of(grid)
    assert points == [
        {"method": method, "scaling_coefficient": number} for method in ("ties", "svd") for number in (0.1, 0.2)
    ]
    assert points_of([grid, {"method": "weight_average"}, grid]) == [*points, {"method": "weight_average"}]
    assert label_of(points[0]) == "ties, scaling_coefficient 0.1"
    alone = {"method": "task_arithmetic", "scaling_coefficient": {"Chat": 0, "Math": 1}}
    assert label_of(alone) == "task_arithmetic, scaling_coefficient Math: 1"
    assert (
        label_of({"scaling_coefficient": {"Chat": 0, "Math": 0}, "post": ["svc"]})
        == 'scaling_coefficient 0, post ["svc"]'
    )


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            {},
            "what is to be swept? Give --sweep OPTION=VALUES, such as --sweep scaling_coefficient=0.1:1.0:0.1, got {}",
        ),
        (
            ["x"],
            "what is to be swept? Give --sweep OPTION=VALUES, such as --sweep scaling_coefficient=0.1:1.0:0.1, got "
            '["x"]',
        ),
        ({"seed": []}, "--sweep seed takes FIRST:LAST:STEP or values with commas between them, got []"),
        (
            {"method": "ties,,svd"},
            '--sweep method takes FIRST:LAST:STEP or values with commas between them, got "ties,,svd"',
        ),
        ({"seed": "1:0:1"}, "--sweep seed=1:0:1: no steps of 1 lead from 1 to 0"),
        ({"seed": "0:1:0"}, "--sweep seed=0:1:0: no steps of 0 lead from 0 to 1"),
        (
            {"expert": "a,b"},
            "--sweep expert: scores of such points cannot be compared with each other; give --expert once",
        ),
        (
            {"seed": "1:200:1", "density": "0.1:0.9:0.01"},
            "--sweep has 16200 combinations, and at most 10000 are taken; leave some out",
        ),
    ],
)
def test_what_is_no_grid_is_refused(given, reason):
    with pytest.raises(InputError) as raised:
        points_of(given)
    assert str(raised.value) == reason
