"""Short tales put together by rule: simple, well-formed English in any amount, to steady so small a model.

In: a random generator. Out: (tale, noun the tale is about). Every sentence here is our own writing. A tale follows one
hero who wants one thing: how it begins, what happens on the way, how it ends; names, things and order vary.
"""

# ruff: noqa: E501 - sentences stay on one line

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field


@dataclass
class Tale:
    rng: random.Random
    hero: str  # "the miller"
    kind: str  # "miller"
    he: str
    his: str
    him: str
    name: str  # "" when the hero has none
    home: str
    wish: str  # what is sought, with its article: "a silver bell"
    thing: str  # "the silver bell"
    why: str
    carried: str = ""  # a gift got on the way
    friends: list[str] = field(default_factory=list)

    def pick(self, *choices: str) -> str:
        return self.rng.choice(choices)

    @property
    def who(self) -> str:
        """The hero by pronoun, kind or name, as may stand at the head of a sentence."""
        return self.rng.choice([self.he, self.he, self.name or self.hero])


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


MEN = ["miller", "tailor", "shoemaker", "fisherman", "farmer", "king", "prince", "soldier", "sailor", "shepherd", "baker",
       "woodcutter", "boy", "clockmaker", "gardener", "teacher", "ferryman", "painter", "tinker", "old man"]  # fmt: skip
WOMEN = ["girl", "princess", "queen", "widow", "weaver", "goose girl", "old woman", "cook", "little girl", "seamstress",
         "dairymaid", "miller's daughter"]  # fmt: skip
BEASTS = [
    "fox",
    "hare",
    "mouse",
    "bear",
    "duck",
    "cat",
    "dog",
    "frog",
    "hedgehog",
    "owl",
    "sparrow",
    "goose",
    "squirrel",
    "donkey",
    "goat",
    "crow",
]
MEN_NAMES = ["Hans", "Peter", "Tom", "John", "Robert", "Jack", "William", "Karl", "Martin", "Ned", "Oliver", "Simon"]
WOMEN_NAMES = ["Anna", "Mary", "Lucy", "Emma", "Ida", "Rose", "Kate", "Helen", "Clara", "Martha", "Alice", "Jane"]
QUALITIES = [
    "kind",
    "poor",
    "clever",
    "cheerful",
    "quiet",
    "brave",
    "honest",
    "patient",
    "lazy",
    "proud",
    "merry",
    "lonely",
    "careful",
    "curious",
    "gentle",
]
HOMES = ["a small house at the edge of the forest", "a village by the sea", "a cottage beside the mill", "a valley between two hills",
         "a little town with narrow streets", "a tower above the river", "a farm on the hill", "a house with a green door",
         "an old castle that nobody visited", "a hut near the marsh", "a garden behind the church", "a cave under the mountain"]  # fmt: skip
BEAST_HOMES = ["a hole under an old oak", "a hollow tree", "a corner of the barn", "a nest of dry leaves", "the reeds beside the pond",
               "a warm place behind the stove", "a hedge at the end of the field", "the roof of a mill"]  # fmt: skip
THINGS = ["silver bell", "golden key", "red lantern", "blue feather", "white rose", "glass ball", "lost ring", "warm coat",
          "little boat", "wooden flute", "bag of seed", "clear mirror", "good lamp", "pair of strong shoes", "book of songs",
          "loaf of white bread", "jar of honey", "stone that shone at night", "map of the hills", "copper kettle"]  # fmt: skip
REASONS = ["for the winter was near", "for {his} mother was ill", "because {he} had promised it to a friend",
           "and could think of nothing else", "for without it the house was dark", "because the children of the place had none",
           "though {he} did not know where to look", "and often dreamed of it at night", "to give it to {his} sister on her birthday"]  # fmt: skip
STRANGERS = ["an old woman with a basket", "a tired soldier", "a boy who had lost his way", "a grey cat", "a pedlar with a heavy pack",
             "a bird with a broken wing", "a small dwarf in a green cap", "a shepherd without a dog", "a blind man and his dog",
             "a girl who was crying", "an ant in a pool of water", "a thin horse", "a fox whose foot was caught in a trap",
             "a fish that lay upon the sand", "two children with no bread", "a crow that spoke like a man"]  # fmt: skip
GIFTS = ["a ball of thread", "a handful of nuts", "a small whistle", "a grey stone", "a candle that never burned down", "a piece of chalk",
         "a single grain of corn", "an old penny", "a feather", "a crust of bread"]  # fmt: skip
PLACES = ["forest", "river", "mountain", "marsh", "meadow", "desert", "lake", "valley", "bridge", "market"]
WEATHER = ["The sun shone, and the grass was wet with dew.", "It was a cold morning, and the wind came from the north.",
           "Snow lay on the roofs, and the air was still.", "It had rained all night, and the road was soft.",
           "It was a fine day in spring, and the birds sang in every tree.", "The leaves were red and yellow, for it was autumn.",
           "The moon stood over the hill and made everything white.", "A thick mist lay on the fields."]  # fmt: skip


def begin(rng: random.Random) -> Tale:
    beast = rng.random() < 0.35
    man = rng.random() < 0.5
    kind = rng.choice(BEASTS if beast else MEN if man else WOMEN)
    he, his, him = ("he", "his", "him") if man else ("she", "her", "her")
    name = "" if beast or rng.random() < 0.4 else rng.choice(MEN_NAMES if man else WOMEN_NAMES)
    thing = rng.choice(THINGS)
    why = rng.choice(REASONS).format(he=he, his=his)
    home = rng.choice(BEAST_HOMES if beast else HOMES)
    return Tale(rng, f"the {kind}", kind, he, his, him, name, home, article(thing), f"the {thing}", why)


def opening(t: Tale) -> str:
    quality = t.rng.choice(QUALITIES)
    named = f" named {t.name}" if t.name else ""
    first = (
        t.pick(
            f"Once upon a time there was {article(quality)} {t.kind}{named} who lived in {t.home}.",
            f"Once upon a time {article(quality)} {t.kind}{named} lived in {t.home}.",
            f"Once upon a time, in {t.home}, there lived {article(quality)} {t.kind}{named}.",
            f"There was once {article(quality)} {t.kind}{named} who had lived all {t.his} life in {t.home}.",
            f"Long ago there lived {article(quality)} {t.kind}{named} in {t.home}.",
        )
        .replace("in the roof", "on the roof")
        .replace("in a farm", "on a farm")
    )
    second = t.pick(
        f"More than anything in the world {t.who} wished for {t.wish}, {t.why}.",
        f"{t.who.capitalize()} had all that was needed, but {t.he} had never owned {t.wish}.",
        f"Every evening {t.he} sat at the door and thought of {t.wish}, {t.why}.",
        f"{t.who.capitalize()} had only one wish, and that was to find {t.wish}.",
        f"The neighbours were rich and had everything, but {t.who} wanted only {t.wish}, {t.why}.",
    )
    third = t.pick(
        f'One morning {t.he} said, "If I stay at home, I shall never find it," and so {t.he} set out.',
        f"One day {t.he} put some bread in {t.his} pocket, shut the door, and went out into the wide world.",
        f'"I will go and look for it," said {t.hero}, and {t.he} left the same day.',
        f"At last {t.he} could wait no longer, and before the sun was up {t.he} was on the road.",
        f'{t.pick("An aunt", "A neighbour", "An old friend", "The priest")} said, "You will not find it here. You must go beyond the hills." So {t.he} went.',
    )
    return f"{first} {second} {third}"


def way(t: Tale) -> str:
    """Weather and road."""
    place = t.rng.choice(PLACES)
    walked = t.pick(
        f"{t.who.capitalize()} walked for three days until {t.he} came to {article('great ' + place)}.",
        f"The road went up and down, and in the evening {t.he} reached {article(place)}.",
        f"After a long time {t.he} came to {article(place)} where nobody lived.",
        f"{t.who.capitalize()} went on and on, and at noon {t.he} saw {article(place)} before {t.him}.",
    )
    after = t.pick(
        f"There was no one to be seen, and {t.he} was a little afraid.",
        f"{t.he.capitalize()} sat down on a stone and ate half of {t.his} bread.",
        f"It was so quiet that {t.he} could hear {t.his} own heart.",
        f'"This is farther than I thought," said {t.he}, but {t.he} did not turn back.',
        f"There {t.he} slept under a tree, and in the morning {t.he} went on.",
    )
    return f"{t.pick(*WEATHER)} {walked} {after}"


def meeting(t: Tale) -> str:
    """Someone in need, who is helped, and gives something for it."""
    stranger = t.rng.choice(
        [s for s in STRANGERS if all(f[4:] not in s for f in t.friends) and t.kind not in s] or STRANGERS
    )
    short = "the " + re.split(r" (?:with|who|that|in|without|and)\b", stranger.split(" ", 1)[1])[0]
    plural = stranger.startswith("two")
    short = "the children" if plural else short
    t.friends.append(short)
    ask = t.pick("Please help me", "Will you not stop and help me", "I have had nothing to eat since yesterday",
                 "I cannot go any farther", "Everyone passes by and no one looks at me", "The night is cold, and I am far from home")  # fmt: skip
    if plural:
        ask = (
            ask.replace("help me", "help us")
            .replace(" me", " us")
            .replace("I have", "We have")
            .replace("I cannot", "We cannot")
        )
        ask = ask.replace("I am", "we are")
    gift = t.rng.choice(GIFTS)
    t.carried = gift
    met = t.pick(f"By the side of the road {t.he} met {stranger}.", f"Then {t.he} saw {stranger}.", f"Not far from there stood {stranger}."
                 if "lay" not in stranger else f"Then {t.he} saw {stranger}.", f"Soon afterwards {t.he} came upon {stranger}.")  # fmt: skip
    helped = t.pick(
        f"{t.who.capitalize()} was in a hurry, but {t.he} stopped and did what {t.he} could.",
        f"{t.who.capitalize()} had not much, but {t.he} shared it gladly.",
        f'"That I will do," said {t.hero}, and {t.he} helped as well as {t.he} could.',
        f"So {t.hero} stayed until all was well again.",
    )
    thanks = t.pick(
        f'"You have a good heart," said {short}. "Take {gift}. One day you will need it."',
        f'"I shall not forget it," said {short}, and gave {t.him} {gift}.',
        f'Then {short} gave {t.him} {gift} and said, "Keep it well, and do not ask what it is for."',
    )
    if plural:
        thanks = thanks.replace("I shall", "We shall")
    asked = f'"{ask}?"' if ask.startswith("Will") else f'"{ask},"'
    return f"{met} {asked} said {short}. {helped} {thanks}"


def obstacle(t: Tale) -> str:
    gift = t.carried.split(" ", 1)[1] if t.carried else ""
    what, solved = t.rng.choice([
        ("a door without a handle", "and the door opened by itself"),
        ("a river without a bridge", "and a boat came over the water to fetch {him}"),
        ("a giant who let nobody pass", "and the giant laughed and stepped aside"),
        ("a wall as high as a church", "and a little gate appeared in the wall"),
        ("a dog as big as a calf", "and the dog lay down and went to sleep"),
        ("a wood so dark that no path could be seen", "and at once it was light between the trees"),
        ("a queen who asked hard questions", "and the queen smiled and let {him} go on"),
    ])  # fmt: skip
    trouble = t.pick(f"But at the end of the road was {what}.", f"Now {t.he} came to {what}, and there was no other way.",
                     f"The next day {t.he} stood before {what}.")  # fmt: skip
    if gift:
        used = t.pick(f"Then {t.he} remembered {t.carried.replace('a ', 'the ', 1).replace('an old', 'the old')} in {t.his} pocket.",
                      f'"What good is {t.carried} now?" thought {t.hero}, but {t.he} took it out.',
                      f"{t.who.capitalize()} thought for a long while, and then {t.he} held up the {gift}.")  # fmt: skip
        return f"{trouble} {used} {t.pick('No sooner had ' + t.he + ' done so than it grew quiet,', t.he.capitalize() + ' laid it on the ground,')} {solved.format(him=t.him)}."
    used = t.pick(f'{t.who.capitalize()} bowed and said, "Good day to you. I mean no harm,"', f"{t.who.capitalize()} sat down and sang the only song {t.he} knew,",
                  f"{t.who.capitalize()} waited patiently until the evening,")  # fmt: skip
    return f"{trouble} {used} {solved.format(him=t.him)}."


def ending(t: Tale) -> str:
    found = t.pick(
        f"On the other side, under an apple tree, lay {t.wish}.",
        f"And there, in the middle of a green meadow, {t.he} found {t.wish}.",
        f"Behind it was a small room, and on the table lay {t.thing}.",
        f'There sat a very old man, and in his hand he held {t.wish}. "I have kept it for you," he said.',
        f"{t.who.capitalize()} looked everywhere, but {t.thing} was not there. Sadly {t.he} went home, and what did {t.he} see? It lay before {t.his} own door.",
    )
    joy = t.pick(
        f"{t.he.capitalize()} was so glad that {t.he} danced for joy.",
        f"{t.who.capitalize()} took it carefully in both hands and could not speak.",
        f'"Now I have all that I want," said {t.hero}.',
        f"{t.he.capitalize()} laughed and cried at the same time.",
    )
    if t.kind in BEASTS:
        joy = joy.replace("took it carefully in both hands and", "looked at it for a long time and")
    home = t.pick(
        f"Then {t.he} went home, and everyone in the place came to see it.",
        f"On the way back {t.he} met {t.friends[0] if t.friends else 'an old friend'} again, and they walked together.",
        "The way home seemed only half as long.",
        f"When {t.he} came home, the lamps were lit and supper stood on the table.",
    )
    last = t.pick(
        f"From that day on {t.he} was never lonely again.",
        "And if they have not moved away, they live there still.",
        "A kind deed is never lost.",
        f"{t.he.capitalize()} lived happily for many years and told the story to anyone who would listen.",
        "Since then people say that those who give with one hand receive with the other.",
        f"And {t.he} kept it until the end of {t.his} days.",
        "That was the end of the journey, and it was a good end.",
    )
    return f"{found} {joy} {home} {last}"


def tale(rng: random.Random) -> tuple[str, str]:
    """A tale of three to six paragraphs, and the noun for a request about it."""
    t = begin(rng)
    parts = [opening(t)]
    middle = [way, meeting, obstacle]
    if rng.random() < 0.4:
        middle.insert(rng.randint(0, 2), rng.choice([way, meeting]))
    parts += [part(t) for part in middle]
    parts.append(ending(t))
    return "\n\n".join(parts), rng.choice(
        [t.kind.split()[-1], t.kind, t.thing.split()[-1]] if " " not in t.thing[4:] else [t.kind]
    )
