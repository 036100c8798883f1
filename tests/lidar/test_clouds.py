"""The page of point clouds: what it holds, that it is closed, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import re

import numpy as np
import pytest

from polyalign.core.errors import UserError
from polyalign.evaluation.report.clouds import MOST_POINTS, CloudScene, clouds_page


def scene(**clouds: np.ndarray) -> CloudScene:
    return CloudScene("street <1>", clouds, {"before": "CD 0.5"})


def points(count: int) -> np.ndarray:
    return np.random.default_rng(count).uniform(-9, 9, (count, 3))


def test_points_are_in_the_page_to_the_centimetre() -> None:
    cloud = points(50)
    page = clouds_page("Scenes", [scene(before=cloud, after=points(20))])
    found = [np.frombuffer(base64.b64decode(data), "<i2").reshape(-1, 3) for data in re.findall(r'data-points="([^"]+)"', page)]
    assert [len(one) for one in found] == [50, 20]
    np.testing.assert_allclose(found[0] / 100, cloud, atol=0.0051)
    assert "street &lt;1&gt;" in page and "CD 0.5" in page and "street <1>" not in page


def test_the_page_is_closed_and_its_policy_fits_its_script() -> None:
    page = clouds_page("Scenes", [scene(before=points(5))])
    assert "http://" not in page and "https://" not in page and "default-src 'none'" in page
    for tag in ("script", "style"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        assert content is not None
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in page


def test_large_clouds_are_thinned() -> None:
    page = clouds_page("Scenes", [scene(before=points(MOST_POINTS + 500))])
    data = re.search(r'data-points="([^"]+)"', page)
    assert data is not None and len(base64.b64decode(data[1])) == 6 * MOST_POINTS


def test_what_cannot_be_drawn_is_refused() -> None:
    for bad in (np.zeros((0, 3)), np.zeros((4, 2)), np.full((4, 3), np.nan)):
        with pytest.raises(UserError, match="finite points"):
            clouds_page("Scenes", [scene(before=bad)])
    with pytest.raises(UserError, match="no clouds"):
        clouds_page("Scenes", [scene()])
