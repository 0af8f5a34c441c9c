"""Classes that two datasets name differently. Case and punctuation are ignored (`classes.plain`)."""

from __future__ import annotations

# COCO's name -> Objects365's. Its annotation files misspell a few; corrected spellings occur as well.
OBJECTS365_OF_COCO: dict[str, tuple[str, ...]] = {
    "bird": ("Wild Bird",),  # ducks, geese, swans, parrots, pigeons, penguins and chickens have classes of their own
    "handbag": ("Handbag/Satchel",),
    "suitcase": ("Luggage",),  # in the first version of Objects365 both are classes
    "skis": ("Skiboard",),
    "sports ball": ("Baseball",),  # one of many balls, and the one that published implementations choose
    "bowl": ("Bowl/Basin",),
    "orange": ("Orange/Tangerine",),
    "dining table": ("Dinning Table",),
    "tv": ("Moniter/TV", "Monitor/TV"),
    "teddy bear": ("Stuffed Toy",),
    "hair drier": ("Hair Dryer",),
}
