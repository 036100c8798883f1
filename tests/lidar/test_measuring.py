"""What has changed from one model to another on the same scans, by hand."""

from __future__ import annotations

import pytest

from polyalign.modalities.lidar.measuring import paired_change

PLACES = ["a", "a", "b", "b"]


def test_a_change_and_its_ratio() -> None:
    found = paired_change([2.0] * 4, [1.0] * 4, PLACES, 0)
    assert found["ratio"] == 0.5 and found["difference"] == -1.0
    assert found["ratio_interval"] == pytest.approx([0.5, 0.5])
    assert paired_change([0.6] * 4, [0.6] * 4, PLACES, 0)["difference_interval"] == [0.0, 0.0]


def test_intervals_draw_whole_places() -> None:
    """Two places that moved by 0 and by -1: all that can be drawn is 0, -0.5 and -1."""
    low, high = paired_change([2.0] * 4, [2.0, 2.0, 1.0, 1.0], PLACES, 0)["difference_interval"]
    assert (low, high) == (-1.0, 0.0)


def test_no_ratio_to_nothing() -> None:
    assert paired_change([0.0] * 4, [1.0] * 4, PLACES, 0)["ratio"] is None
