"""SDXL's micro-conditioning: the network is told how large a picture was and how it was cut (2307.01952, section 2.2).

Published preference training tells a constant (Salesforce) or the first picture's size for both (diffusers); here each
candidate has its own true numbers.
"""

from __future__ import annotations


def time_ids(original: tuple[int, int], crop: tuple[int, int], resolution: int) -> list[float]:
    """(original height, original width, crop top, crop left, target height, target width), in pixels.

    ``crop`` counts in the resized (and, where mirrored, mirrored) picture, before the cut.
    """
    return [float(number) for number in (*original, *crop, resolution, resolution)]
