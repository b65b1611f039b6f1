"""Whoever measures a second version on the test patients is told; jobs/ measures (tests/jobs)."""

from pathlib import Path

import pytest

from cafemed import final_test, registry

MADE = Path(__file__).parent / "old_bundles" / "without-pace"


def test_versions_that_were_measured_before_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for _ in range(4):
        registry.publish(tmp_path, MADE, {})
    final_test._say_earlier(tmp_path, 2)
    assert capsys.readouterr().out == ""
    for version in (1, 3):
        registry.write_card(tmp_path, version, {"format_version": 1, "model": {}}, "# Card")
    final_test._say_earlier(tmp_path, 4)
    assert "measured on the test patients before: version 0001, 0003;" in capsys.readouterr().out
    registry.write_card(tmp_path, 4, {"format_version": 1, "model": {}}, "# Card")
    final_test._say_earlier(tmp_path, 4)
    assert "version 0001, 0003;" in capsys.readouterr().out
