"""Point clouds to turn by hand, in one page without any connection: input, before, after and ground truth of some scenes."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from polyalign.core.errors import UserError
from polyalign.evaluation.report.markup import text

HERE = Path(__file__).parent
SCRIPT = HERE / "clouds.js"
MOST_POINTS = 20_000
"""Points of a cloud that are shown; of larger ones, so many spread evenly over it."""

CLOUD_STYLE = """
.clouds { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 12px; }
.clouds figure { margin: 0; }
.clouds canvas { width: 100%; aspect-ratio: 1; background: #0e1116; border: 1px solid #8884; border-radius: 6px;
  touch-action: none; cursor: grab; }
"""
"""Of the clouds alone, for a page that has a style of its own."""

STYLE = (
    """
:root { color-scheme: light dark; --ink: #1c2430; --quiet: #586172; --page: #f7f6f3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --quiet: #a3acba; --page: #14171c; } }
body { margin: 0 auto; max-width: 1240px; padding: 24px; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
p, figcaption span { color: var(--quiet); }
"""
    + CLOUD_STYLE
)


@dataclass(frozen=True)
class CloudScene:
    """Clouds (N, 3) in metres by what they are called, with a remark for each that has one."""

    name: str
    clouds: Mapping[str, np.ndarray]
    remarks: Mapping[str, str]


def clouds_page(title: str, scenes: Sequence[CloudScene]) -> str:
    """The whole document. Its policy allows nothing but its own style and script.

    Raises:
        UserError: a scene without clouds, or a cloud that is no finite points.
    """
    script = SCRIPT.read_text(encoding="utf-8")
    policy = f"default-src 'none'; style-src '{_hashed(STYLE)}'; script-src '{_hashed(script)}'; base-uri 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{text(title, 120)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{text(title, 120)}</h1>\n"
        f"{clouds_body(scenes)}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def clouds_body(scenes: Sequence[CloudScene], *, heading: str = "h2") -> str:
    """The scenes alone, for a page that has the script and :data:`CLOUD_STYLE`; ``heading`` is the tag of their names.

    Raises:
        UserError: as :func:`clouds_page`.
    """
    return (
        "<p>Drag to turn, wheel to come nearer; with the keyboard, arrows, + and -. Colour is height.</p>\n"
        "<noscript><p>The clouds are drawn by the page's own script, which is switched off here.</p></noscript>\n"
        + "".join(_scene(scene, heading) for scene in scenes)
    )


def _scene(scene: CloudScene, heading: str) -> str:
    """One row of canvases that share centre, scale and colours."""
    if not scene.clouds:
        raise UserError(f"scene {scene.name!r} has no clouds to show")
    clouds = {label: _shown(scene.name, label, cloud) for label, cloud in scene.clouds.items()}
    every = np.concatenate(list(clouds.values()))
    low, high = np.percentile(every[:, 2], [1, 99])
    reach = float(np.percentile(np.linalg.norm(every[:, :2], axis=1), 99)) or 1.0
    figures = "".join(_figure(label, cloud, scene.remarks.get(label, "")) for label, cloud in clouds.items())
    numbers = f'data-reach="{100 * reach:.0f}" data-low="{100 * low:.0f}" data-span="{max(1.0, 100 * (high - low)):.0f}"'
    name = f"<{heading}>{text(scene.name, 120)}</{heading}>"
    return f'<div data-scene="" {numbers}>{name}<div class="clouds">{figures}</div></div>'


def _figure(label: str, cloud: np.ndarray, remark: str) -> str:
    centimetres = np.clip(np.round(100 * cloud), -32767, 32767).astype("<i2")
    data = base64.b64encode(centimetres.tobytes()).decode("ascii")
    said = f"{label}, {len(cloud):,} points"
    return (
        f'<figure><canvas width="520" height="520" tabindex="0" role="img" aria-label="{text(said, 120)}" '
        f'data-points="{data}"></canvas><figcaption>{text(label, 60)} <span>{text(remark, 120)}</span></figcaption></figure>'
    )


def _shown(scene: str, label: str, cloud: np.ndarray) -> np.ndarray:
    points = np.asarray(cloud, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3 or not len(points) or not np.isfinite(points).all():
        raise UserError(f"scene {scene!r}: {label!r} has to be finite points (N, 3), found {points.shape}")
    return points[np.linspace(0, len(points) - 1, min(len(points), MOST_POINTS)).round().astype(int)]


def _hashed(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode("ascii")
