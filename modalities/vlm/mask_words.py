"""English words by which :mod:`polyalign.modalities.vlm.masking` finds what an answer says of a picture. All of them can be
replaced in a recipe (``words``), but those that only mark where a noun begins and ends."""

from __future__ import annotations

from collections.abc import Mapping

_COLOURS = (
    "red green blue yellow purple black white orange brown pink grey gray silver gold golden beige tan teal turquoise "
    "violet maroon navy cyan magenta cream blond blonde dark light bright colourful colorful"
)
_SIZES = "big small large little tiny huge tall short long wide narrow thin thick giant massive medium high low deep"
_SHAPES = "round circular rectangular oval triangular curved flat straight spherical cubic pointed spiral square-shaped"
_MATERIALS = (
    "wooden wood metal metallic plastic glass leather brick concrete stone marble paper cotton woollen ceramic steel rubber "
    "fabric cardboard grassy sandy snowy"
)
_STATES = (
    "old young new wet dry open closed empty full clean dirty striped spotted plaid patterned smooth rough shiny "
    "transparent blurry happy sad smiling broken furry fluffy"
)
_PEOPLE = "man woman person child boy girl baby lady gentleman player crowd group"
_THINGS = (
    "bicycle bike car motorcycle airplane plane bus train truck boat traffic light fire hydrant stop sign parking meter "
    "bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee ski "
    "snowboard ball kite bat glove skateboard surfboard racket bottle cup fork knife spoon bowl banana apple sandwich "
    "broccoli carrot pizza donut cake chair couch sofa plant bed table toilet television tv laptop mouse remote keyboard "
    "phone microwave oven toaster sink refrigerator fridge book clock vase scissors toothbrush wall floor window door tree "
    "grass sky road street building house field beach water ocean river mountain shirt hat jacket plate counter shelf lamp "
    "mirror flower fence bridge animal vehicle food"
)
_GEOMETRY = "square circle triangle cross star diamond rectangle hexagon cube sphere cylinder shape object"
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve dozen several many few couple"
_SPATIAL = (
    "in front of",
    "on top of",
    "to the left of",
    "to the right of",
    "on the left",
    "on the right",
    "in the middle of",
    "in the corner of",
    "next to",
    "close to",
    "far from",
    "left of",
    "right of",
    *"on onto under underneath above below beneath behind beside between near inside outside over against around across "
    "along alongside among atop".split(),
)
_LOGICAL = (
    "because of",
    "due to",
    "so that",
    "as a result",
    "in order to",
    *"because since therefore thus hence although however unless until before after".split(),
)

LISTS: Mapping[str, tuple[str, ...]] = {
    "objects": tuple(f"{_PEOPLE} {_THINGS} {_GEOMETRY}".split()),
    "attributes": tuple(f"{_COLOURS} {_SIZES} {_SHAPES} {_MATERIALS} {_STATES}".split()),
    "counts": tuple(_NUMBERS.split()),
    "relations": (*_SPATIAL, *_LOGICAL),
    "verdicts": tuple("yes no not never none nothing nobody without neither nor cannot isn't aren't doesn't don't".split()),
}
"""By kind, in the singular."""

IRREGULAR: Mapping[str, str] = {
    "buses": "bus",
    "men": "man",
    "women": "woman",
    "people": "person",
    "children": "child",
    "knives": "knife",
    "shelves": "shelf",
    "feet": "foot",
    "mice": "mouse",
}
"""Plurals that do not show it by their s."""

DETERMINERS = frozenset(
    "a an the this that these those his her its their my our your some any each every another both no".split()
)
SINGULAR = frozenset("a an this that each every another".split())
BEING = frozenset("is are was were".split())
FRAMES = frozenset(
    "image images picture pictures photo photograph scene view background foreground left right top bottom front middle center "
    "centre side corner".split()
)
"""Nouns that are about the picture itself, or places in it."""

FUNCTION = frozenset(
    "is are was were be been being am has have had do does did can could will would may might must shall should of in at to "
    "for from with by and or but as than which who whom whose where when while there here it they he she i we you him them us "
    "me very also so too then if into through during about what how why just only more most other such up down out off".split()
)
"""Words that end a noun's run."""
