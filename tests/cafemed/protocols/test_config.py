import pytest

from cafemed.config import from_mapping
from cafemed.errors import ConfigError
from cafemed.protocols import CohortConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"split_parts": [4, 1]}, "split_parts: expected three numbers"),
        ({"split_parts": [4, 1, 0]}, r"split_parts\[2\]: expected a value in \[1, inf\], got 0"),
        ({"require": ["diagnosis"]}, "require: expected medication"),
        ({"require": ["drug"]}, r"require\[0\]: expected one of 'diagnosis', 'procedure'"),
        ({"target_window_h": 0}, r"target_window_h: expected a value in \(0, inf\], got 0"),
        ({"max_laboratory": 129}, r"max_laboratory: expected a value in \[0, 128\], got 129"),
        ({"inputs": "all"}, "inputs: expected one of 'current', 'history', got 'all'"),
        (
            {"protocol": "published", "inputs": "history", "seed": 3},
            "inputs, seed: protocol=published fixes these",
        ),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(CohortConfig, values, "data.cohort")
