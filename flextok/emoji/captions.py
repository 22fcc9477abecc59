"""What an emoji scene shows, in a sentence: "a red heart left of an ox"."""

import re

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROWS = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
# Names which are not noun phrases, or whose article does not follow from their form.
PHRASES = {
    "rolling on the floor laughing": "a face rolling on the floor laughing",
    "star-struck": "a star-struck face",
    "selfie": "a hand taking a selfie",
    "breast-feeding": "a breast-feeding woman",
    "Santa Claus": "Santa Claus",
    "Mrs. Claus": "Mrs. Claus",
    "mx claus": "Mx Claus",
    "mount fuji": "Mount Fuji",
    "Tokyo tower": "Tokyo Tower",
    "Statue of Liberty": "the Statue of Liberty",
    "kaaba": "the Kaaba",
    "milky way": "the Milky Way",
    "meat on bone": "meat on the bone",
    "foggy": "a foggy bridge",
    "hourglass done": "an hourglass",
    "hourglass not done": "an hourglass with flowing sand",
    "locked": "a closed padlock",
    "unlocked": "an open padlock",
    "locked with pen": "a closed padlock with a pen",
    "locked with key": "a closed padlock with a key",
    "speaker low volume": "a speaker at low volume",
    "speaker medium volume": "a speaker at medium volume",
    "speaker high volume": "a speaker at high volume",
    "palms up together": "palms up together",
    "flower playing cards": "flower playing cards",
    "airplane departure": "a departing airplane",
    "airplane arrival": "an arriving airplane",
}
UNCOUNTED = set(
    """american football, badminton, baguette bread, bacon, bowling, bread, broccoli, bubble tea,
    building construction, butter, camping, canned food, construction, cooked rice, cooking, coral,
    curry rice, custard, dango, dna, field hockey, fire, flatbread, fog, fried shrimp, garlic,
    high voltage, horse racing, ice, ice cream, ice hockey, lacrosse, light rail, luggage, mate,
    money with wings, nail polish, oden, ping pong, popcorn, pouring liquid, rugby football, sake,
    salt, shaved ice, soap, soft ice cream, spaghetti, stuffed flatbread, sushi, tennis, thread,
    wood, yarn""".replace("\n    ", " ").split(", ")
)
# What follows the head of a name: "face | with tears", "person | lifting weights".
TAIL = re.compile(r" (with|without|in|of|on|at|behind|and|[\w-]+ing)\b.*")
SOUNDS_LIKE_CONSONANT = re.compile(r"(uni|eu|ew|one\b)")


def with_article(phrase: str) -> str:
    """ "apple" -> "an apple"."""
    vowel = phrase[0].lower() in "aeiou" and not SOUNDS_LIKE_CONSONANT.match(phrase)
    return f"{'an' if vowel or phrase.startswith('x-ray') else 'a'} {phrase}"


def noun_phrase(name: str) -> str:
    """An emoji's Unicode name in a sentence: "eyes", "an ox", "a man with red hair"."""
    name = name.replace("\u2019", "'")
    if name in PHRASES:
        return PHRASES[name]
    if name.endswith(("o'clock", "-thirty")):
        return f"a clock showing {name}"
    person, _, trait = name.partition(": ")  # "man: red hair", "woman: bald"
    if trait:
        article = "a " if trait == "beard" else ""
        return f"a bald {person}" if trait == "bald" else f"a {person} with {article}{trait}"
    head = TAIL.sub("", name)
    plural = head.endswith("s") and not head.endswith(("ss", "us", "os"))
    if name in UNCOUNTED or plural or head in ("people", "men", "women"):
        return name
    return with_article(name)


def join(phrases: list[str]) -> str:
    """ "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def describe(phrases: list[str], cells: list[tuple[int, int]], grid: tuple[int, int]) -> str:
    """What is where, in reading order; ends so that " on a blue background" may follow."""
    columns, rows = grid
    if len(phrases) == 1:
        return phrases[0]
    if len(phrases) == 2:
        return f"{phrases[0]} {'left of' if columns == 2 else 'above'} {phrases[1]}"
    if grid == (2, 2):
        corners = [f"{ROWS[2][row]} {('left', 'right')[column]}" for column, row in cells]
        placed = [f"{p} at the {corner}" for p, corner in zip(phrases, corners, strict=True)]
        return f"{NUMBERS[len(phrases)]} objects: {join(placed)}, all"
    lines = []
    for row, place_name in enumerate(ROWS[rows]):
        line = [p for p, cell in zip(phrases, cells, strict=True) if cell[1] == row]
        lines.append(f"{join(line)} in the {place_name} row")
    return f"{NUMBERS[len(phrases)]} objects: {'; '.join(lines)}; all"
