"""The things of the world `emoji_scenes`: emoji that show one thing each, whose name is a plain noun.

Names are Unicode's, as OpenMoji annotates its drawings, and the groups are those of its table, which its package does not hold;
the names after the first are others that a thing goes by. Out of 1,300 drawings with a name these are left, so that a list of a
picture's objects is exact:

- things that are counted, in the singular: no "bread", no "scissors";
- of a kind and its members one (no "fish" beside "shark", no "bear" beside "panda", one ball game's ball each), so that a
  question about a thing that is not there has the answer no;
- of things that look alike one (no "rat" beside "mouse", no "telephone" beside "mobile phone");
- nothing that is drawn with another thing, so that who describes one closely does not name the other: no "door" beside "house",
  no "tomato" beside "hamburger", no "snowman", who wears a top hat;
- no word that means something else as often ("bat", "seal", "watch", "present").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GROUPS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "animals-nature": {
        "🐜": ("ant",),
        "🦋": ("butterfly",),
        "🌵": ("cactus",),
        "🐈": ("cat", "kitten"),
        "🐄": ("cow",),
        "🦀": ("crab",),
        "🐊": ("crocodile", "alligator"),
        "🦌": ("deer", "stag"),
        "🐕": ("dog", "puppy"),
        "🐬": ("dolphin",),
        "🦆": ("duck",),
        "🐘": ("elephant",),
        "🦩": ("flamingo",),
        "🦊": ("fox",),
        "🐸": ("frog",),
        "🦒": ("giraffe",),
        "🐐": ("goat",),
        "🦔": ("hedgehog",),
        "🦛": ("hippopotamus", "hippo"),
        "🐝": ("honeybee", "bee"),
        "🐎": ("horse",),
        "🦘": ("kangaroo",),
        "🐨": ("koala",),
        "🐞": ("lady beetle", "ladybug", "ladybird"),
        "🦁": ("lion",),
        "🦞": ("lobster",),
        "🐒": ("monkey",),
        "🐁": ("mouse",),
        "🐙": ("octopus",),
        "🦉": ("owl",),
        "🌴": ("palm tree", "palm", "coconut tree", "coconut palm"),
        "🐼": ("panda", "panda bear"),
        "🦜": ("parrot",),
        "🦚": ("peacock",),
        "🐧": ("penguin",),
        "🐖": ("pig",),
        "🐇": ("rabbit", "bunny"),
        "🦝": ("raccoon",),
        "🦏": ("rhinoceros", "rhino"),
        "🐓": ("rooster", "cockerel", "chicken"),
        "🌹": ("rose",),
        "🦂": ("scorpion",),
        "🦈": ("shark",),
        "🐌": ("snail",),
        "🐍": ("snake",),
        "🌻": ("sunflower",),
        "🦢": ("swan",),
        "🐅": ("tiger",),
        "🌷": ("tulip",),
        "🐢": ("turtle", "tortoise"),
        "🦓": ("zebra",),
    },
    "food-drink": {
        "🥑": ("avocado",),
        "🍌": ("banana",),
        "🍺": ("beer mug", "mug of beer", "beer"),
        "🎂": ("birthday cake", "cake"),
        "🥕": ("carrot",),
        "🍫": ("chocolate bar", "bar of chocolate", "candy bar"),
        "🥥": ("coconut",),
        "🍪": ("cookie", "biscuit"),
        "🥐": ("croissant",),
        "🍩": ("doughnut", "donut"),
        "🥚": ("egg",),
        "🍆": ("eggplant", "aubergine"),
        "🍔": ("hamburger", "burger", "cheeseburger"),
        "🌭": ("hot dog", "hotdog"),
        "🍋": ("lemon",),
        "🍭": ("lollipop",),
        "🍄": ("mushroom", "toadstool"),
        "🧅": ("onion",),
        "🍑": ("peach",),
        "🍐": ("pear",),
        "🍍": ("pineapple",),
        "🍕": ("pizza", "slice of pizza", "pizza slice"),
        "🥨": ("pretzel",),
        "🍎": ("red apple", "apple"),
        "🥪": ("sandwich",),
        "🍓": ("strawberry",),
        "🌮": ("taco",),
        "🍉": ("watermelon", "slice of watermelon", "watermelon slice"),
        "🍷": ("wine glass", "glass of wine", "glass of red wine", "wine"),
    },
    "travel-places": {
        "✈️": ("airplane", "plane", "aeroplane"),
        "🚑": ("ambulance",),
        "⚓": ("anchor",),
        "🚗": ("automobile", "car"),
        "🚲": ("bicycle", "bike"),
        "🚌": ("bus",),
        "🏰": ("castle",),
        "🚒": ("fire engine", "fire truck", "firetruck"),
        "🚁": ("helicopter",),
        "🏠": ("house",),
        "🏍️": ("motorcycle", "motorbike"),
        "🌈": ("rainbow",),
        "🚀": ("rocket",),
        "⛵": ("sailboat", "sailing boat", "boat"),
        "⛺": ("tent",),
        "🚜": ("tractor",),
        "🌋": ("volcano",),
    },
    "activities": {
        "🎈": ("balloon",),
        "🏀": ("basketball",),
        "🎄": ("Christmas tree",),
        "🪁": ("kite",),
        "🧩": ("puzzle piece", "jigsaw piece", "piece of a puzzle", "puzzle"),
        "⚽": ("soccer ball", "football", "soccerball"),
        "🧸": ("teddy bear", "teddy"),
        "🏆": ("trophy",),
    },
    "objects": {
        "⏰": ("alarm clock", "clock"),
        "🪓": ("axe", "ax"),
        "🎒": ("backpack", "rucksack"),
        "🛁": ("bathtub", "bath tub", "tub"),
        "🛏️": ("bed",),
        "🔔": ("bell",),
        "🦴": ("bone", "dog bone"),
        "💼": ("briefcase",),
        "🧹": ("broom",),
        "🪣": ("bucket", "pail"),
        "📷": ("camera",),
        "🕯️": ("candle",),
        "🪑": ("chair",),
        "👑": ("crown",),
        "👗": ("dress",),
        "🥁": ("drum",),
        "✉️": ("envelope",),
        "💎": ("gem stone", "gemstone", "gem", "diamond"),
        "🎸": ("guitar",),
        "🔨": ("hammer",),
        "🔑": ("key",),
        "💻": ("laptop", "laptop computer"),
        "💡": ("light bulb", "lightbulb", "bulb"),
        "💄": ("lipstick",),
        "🧲": ("magnet",),
        "🔬": ("microscope",),
        "📱": ("mobile phone", "cell phone", "cellphone", "smartphone", "phone"),
        "📎": ("paperclip", "paper clip"),
        "✏️": ("pencil",),
        "🧷": ("safety pin",),
        "🎷": ("saxophone",),
        "🧣": ("scarf",),
        "🪛": ("screwdriver",),
        "🛒": ("shopping cart", "shopping trolley", "cart"),
        "🩺": ("stethoscope",),
        "💉": ("syringe",),
        "👕": ("t-shirt", "tshirt", "shirt"),
        "🔭": ("telescope",),
        "🪥": ("toothbrush",),
        "🎩": ("top hat", "hat"),
        "🎺": ("trumpet",),
        "☂️": ("umbrella",),
        "🎻": ("violin",),
        "🔧": ("wrench", "spanner"),
    },
}
"""Characters and names by OpenMoji's group."""


@dataclass(frozen=True)
class Thing:
    """What an emoji shows: its own name, the characters it is drawn from, its group, and other names."""

    name: str
    characters: str
    group: str
    others: tuple[str, ...] = ()


THINGS = tuple(
    Thing(names[0], characters, group, names[1:]) for group, members in GROUPS.items() for characters, names in members.items()
)
