"""Chat forms around passages: what a reader asks, and which passage answers.

In: documents of clean paragraphs. Out: (question, reply) pairs and whole conversations as text in Gemma 4's turn
format, as `chat_template.jinja` renders it. Everything is drawn from the given random generator. The small talk is
our own writing; all else that the model says comes from the corpus.
"""

# ruff: noqa: E501 - sentences stay on one line

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from tales import tale

NOUNS = [
    "king", "queen", "prince", "princess", "fox", "wolf", "bear", "cat", "dog", "mouse", "bird", "swan", "stork",
    "duck", "nightingale", "frog", "fish", "whale", "horse", "goat", "lion", "hare", "hen", "rooster", "donkey",
    "witch", "giant", "dwarf", "fairy", "angel", "ghost", "mermaid", "soldier", "sailor", "captain", "doctor",
    "detective", "tailor", "miller", "shoemaker", "fisherman", "hunter", "peasant", "farmer", "merchant", "beggar",
    "student", "teacher", "poet", "servant", "thief", "robber", "priest", "mother", "father", "sister", "brother",
    "daughter", "son", "child", "boy", "girl", "wife", "husband", "widow", "friend", "stranger", "lady",
    "gentleman", "sea", "ship", "boat", "island", "river", "lake", "forest", "wood", "tree", "rose", "flower",
    "garden", "mountain", "storm", "snow", "winter", "spring", "summer", "moon", "sun", "star", "wind", "rain",
    "night", "castle", "palace", "tower", "cottage", "church", "school", "village", "town", "city", "road",
    "bridge", "mill", "kitchen", "window", "door", "house", "room", "ball", "party", "wedding", "dance", "journey",
    "voyage", "letter", "book", "picture", "song", "bell", "ring", "crown", "sword", "mirror", "lamp", "candle",
    "shoe", "cloak", "golden", "treasure", "money", "war", "battle", "army", "emperor", "general", "prison",
    "secret", "dream", "Christmas", "birthday", "dinner", "tea", "morning", "evening", "marriage", "love", "fear",
]  # fmt: skip

STORY_REQUESTS = [
    "Tell me a story about a {n}.", "Tell me a story about the {n}.", "Please tell me a tale about a {n}.",
    "Write a short story about a {n}.", "Can you tell me a story about a {n}?", "I would like a story with a {n} in it.",
    "Write about the {n}.", "Tell me about the {n}.", "Write a few lines about a {n}.", "A story about a {n}, please.",
]  # fmt: skip
OPENING_REQUESTS = [
    "Continue: {o}", "Continue this story: {o}", 'Go on from "{o}"', 'Write a story that begins with "{o}"',
    "Start with: {o}", 'Begin like this: "{o}"',
]  # fmt: skip
GO_ON = ["Go on.", "Please go on.", "What happened next?", "And then?", "Continue.", "Tell me more.", "More, please.",
         "What came after that?"]  # fmt: skip
TALE_REQUESTS = ["Tell me a story.", "Tell me a fairy tale.", "Please tell me a bedtime story.", "Tell me a tale.",
                 "Write a story.", "Write a fairy tale.", "Could you tell me a story?", "A story, please.",
                 "Tell me a short story.", "I cannot sleep. Tell me a story."]  # fmt: skip
STYLE_REQUESTS = {
    "Austen": ["Write like Jane Austen.", "Tell me about a family in the country.", "Write about love and marriage."],
    "Doyle": ["Tell me a detective story.", "Write about Sherlock Holmes.", "Tell me about a strange case."],
    "Twain": ["Tell me about Tom Sawyer.", "Write about two boys and their adventures."],
    "Melville": ["Write about the whale.", "Tell me a story of the sea.", "Write like Herman Melville."],
    "Tolstoy": ["Write about war.", "Tell me about Moscow.", "Write like Tolstoy."],
    "Andersen": ["Tell me a tale like Andersen's.", "Write like Hans Christian Andersen."],
    "Grimm": ["Tell me a tale like the Brothers Grimm's.", "Tell me an old tale."],
    "Woolf": ["Write about a voyage.", "Write like Virginia Woolf."],
    "Joyce": ["Write about Dublin.", "Write like James Joyce."],
    "Moreau": ["Tell me about a strange island."],
}
SYSTEMS = ["You are a storyteller.", "You are a kind storyteller for children.", "You are a helpful assistant.",
           "You write plain and clear English.", "You tell old tales.", "Answer with a story.",
           "You are a writer. Continue what the reader begins.", "Be brief and friendly."]  # fmt: skip

SMALL_TALK: list[tuple[list[str], list[str]]] = [
    (["Hello", "Hello!", "Hi", "Hi!", "Hello there.", "Good day.", "Hey", "Greetings!"],
     ["Hello! What shall we read today?", "Hello! Give me a few words, and I will go on with a story.",
      "Good day to you! Shall I tell you a story?", "Hello! It is good to see you. What would you like to hear?"]),
    (["Good morning.", "Good morning!"], ["Good morning! Did you sleep well?", "Good morning! Shall we begin with a story?"]),
    (["Good evening.", "Good evening!"], ["Good evening! It is a fine hour for a story.",
                                          "Good evening! Sit down, and I will tell you a tale."]),
    (["Good night.", "Good night!"], ["Good night, and sweet dreams.", "Good night! The story will wait until tomorrow."]),
    (["How are you?", "How are you today?", "How do you do?", "How is it going?"],
     ["I am very well, thank you. And you?", "Very well, thank you! I have been among old books all day.",
      "I am well, thank you. Shall I tell you a story?"]),
    (["I am fine.", "I am well, thank you.", "Very well."], ["I am glad to hear it. What would you like to hear?",
                                                              "That is good. Shall we go on with a story?"]),
    (["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you a robot?"],
     ["I am a very small language model. I learned to write from old stories, and I can tell you one.",
      "I am a small model, built in so that you can try the program at once. I know old tales and little else.",
      "I have no name of my own. I am a small storyteller that lives in your computer."]),
    (["What can you do?", "Can you help me?", "Help", "How can you help me?", "What do you know?"],
     ["I can go on with a story that you begin. Give me the first words, such as: Once upon a time.",
      "I tell stories. Ask me for a story about a king, a fox or the sea, or begin one yourself.",
      "I can write a little in the manner of old books. For questions of fact you need a larger model."]),
    (["Thank you.", "Thanks!", "Thank you very much.", "Thanks", "That was lovely."],
     ["You are very welcome.", "It was a pleasure. Shall I tell you another?", "You are welcome! Come again soon."]),
    (["Goodbye.", "Bye", "Goodbye!", "See you later."], ["Goodbye! Come back when you want another story.",
                                                         "Goodbye, and good luck on your way!"]),
    (["Yes.", "Yes, please.", "Yes", "Please do.", "OK"], ["Very well. What shall it be about?",
                                                           "Good! Give me the first words, and I will begin."]),
    (["No.", "No, thank you.", "No"], ["As you like. I am here when you want a story.", "Very well. Another time, then."]),
    (["What is the capital of France?", "Who is the president?", "What is the weather today?", "What is two plus two?",
      "What time is it?", "Write a program.", "What is 12 times 7?", "Translate this into German.", "How tall is the moon?"],
     ["I am too small a model to know that for certain. I can tell you a story instead.",
      "I am afraid I do not know. I have read only old stories. Shall I tell you one?",
      "That is more than I know. Ask a larger model, and come to me for stories."]),
    (["Do you like stories?", "What is your favourite story?", "What do you like?", "Do you like books?"],
     ["I like the tale of the ugly duckling best, because it ends well.",
      "I like old books with kings, foxes and the sea in them.", "I like every story that begins with once upon a time."]),
    (["I am sad.", "I am tired.", "I feel lonely.", "I had a bad day."],
     ["I am sorry to hear it. Sit down a while, and let me tell you a quiet story.",
      "I am sorry. A story may help a little. Shall I tell you one?"]),
    (["I am happy.", "I had a good day.", "It is my birthday."],
     ["That makes me glad! Shall we have a merry story?", "How good to hear! Then let us have a story to go with it."]),
]  # fmt: skip


@dataclass(frozen=True)
class Document:
    source: str
    paragraphs: list[str]

    @property
    def is_tale(self) -> bool:
        return self.source.startswith(("Andersen", "Grimm"))


def story_opening(text: str, rng: random.Random) -> str:
    """Half of the time, give a tale that opens "There was once ..." the opening "Once upon a time there was ..."."""
    changed = re.sub(r"^There (was|were|lived) (?:once(?: upon a time)?|one time),? (?!when|that|the\b)",
                     r"Once upon a time there \1 ", text)  # fmt: skip
    changed = re.sub(r"^In (?:the )?(?:old|olden) times?,? ", "Once upon a time, ", changed)
    return changed if rng.random() < 0.6 else text


def cut(paragraphs: list[str], start: int, least: int, most: int, rng: random.Random) -> tuple[str, int]:
    """A passage from paragraph `start` on, of `least` to `most` characters or somewhat more, and where it ended.

    It ends with a paragraph; a paragraph that alone is far too long is cut at a sentence's end.
    """
    goal, taken, at = rng.randint(least, most), [], start
    size = 0
    while at < len(paragraphs) and size < goal:
        text = paragraphs[at]
        if size + len(text) > goal + 900:
            ends = [m.end() for m in re.finditer(r"[.!?]\"?(?= [A-Z\"])", text) if m.end() + size >= least]
            if ends:
                text = text[: ends[0] if size >= goal - 300 else min(ends, key=lambda e: abs(e + size - goal))]
        taken.append(text)
        size, at = size + len(text), at + 1
    return "\n\n".join(taken), at


def opening_of(passage: str, rng: random.Random) -> str:
    """The first words, or the first sentence, of a passage."""
    first = passage.split("\n")[0]
    sentence = re.match(r".*?[.!?](?= |$)", first)
    if rng.random() < 0.3 and sentence and len(sentence.group()) < 200:
        return sentence.group()
    words = first.split(" ")
    return " ".join(words[: rng.randint(1, min(10, len(words)))])


def asked_by_opening(passage: str, rng: random.Random) -> str:
    opening = opening_of(passage, rng)
    if passage.startswith("Once upon a time") and rng.random() < 0.5:
        opening = "Once upon a time"
    draw = rng.random()
    if draw < 0.25:
        return rng.choice(OPENING_REQUESTS).format(o=opening)
    if draw < 0.33:
        return opening.rstrip(".,;") + "..."
    return opening[0].lower() + opening[1:] if draw < 0.4 else opening


def noun_in(passage: str, rng: random.Random) -> str | None:
    """A thing that the beginning of the passage speaks of at least twice."""
    words = re.findall(r"[A-Za-z]+", passage[:900])
    counted = [n for n in NOUNS if words.count(n) >= 2]
    return rng.choice(counted) if counted else None


def asked_by_topic(document: Document, passage: str, from_start: bool, rng: random.Random) -> str:
    one_author = "four novels" not in document.source
    styles = [r for key, requests in STYLE_REQUESTS.items() if one_author and key in document.source for r in requests]
    noun = noun_in(passage, rng)
    if noun and rng.random() < 0.7:
        request = rng.choice(STORY_REQUESTS).format(n=noun)
        return re.sub(r"\ba (?=[aeiou])", "an ", request)
    if document.is_tale and from_start and (rng.random() < 0.6 or not styles):
        return rng.choice(TALE_REQUESTS)
    return rng.choice(styles) if styles else asked_by_opening(passage, rng)


def turn(role: str, text: str) -> str:
    return f"<|turn>{role}\n{text}<turn|>\n"


def thought(request: str, reply: str, rng: random.Random) -> str:
    """A short stretch of thinking, in the form Gemma 4 gives it."""
    said = request.replace("\n", " ")[:80].rstrip(".!?")
    plans = ["I will answer with a story.", "I will go on from there.", "I will tell it simply.", "A passage will do."]
    plan = rng.choice(plans) if len(reply) > 200 else "I will answer in a few words."
    return f'<|channel>thought\nThe reader says: "{said}". {plan}\n<channel|>'


def conversation(pick: list[Document], weights: list[float], size: int, rng: random.Random) -> str:
    """A conversation of at least `size` characters, from <bos> on. `weights` are cumulative."""
    thinking, text = rng.random() < 0.06, "<bos>"
    if thinking or rng.random() < 0.15:
        system = rng.choice(SYSTEMS) if not thinking or rng.random() < 0.4 else ""
        text += turn("system", ("<|think|>\n" if thinking else "") + system)
    document, at = None, 0
    while len(text) < size:
        draw = rng.random()
        if draw < 0.06:
            questions, answers = rng.choice(SMALL_TALK)
            question, reply = rng.choice(questions), rng.choice(answers)
        elif draw < 0.25 and document and at < len(document.paragraphs):
            question = rng.choice(GO_ON)
            reply, at = cut(document.paragraphs, at, 400, 1800, rng)
        elif draw < 0.36:
            reply, noun = tale(rng)
            document = None
            by_noun = re.sub(r"\ba (?=[aeiou])", "an ", rng.choice(STORY_REQUESTS).format(n=noun))
            question = rng.choice([asked_by_opening(reply, rng), by_noun, rng.choice(TALE_REQUESTS)])
        else:
            document = rng.choices(pick, cum_weights=weights)[0]
            starts = [i for i, p in enumerate(document.paragraphs) if p[0].isalpha() and len(p) > 60] or [0]
            at = 0 if rng.random() < (0.6 if document.is_tale else 0.25) else rng.choice(starts)
            from_start = at == 0
            reply, at = cut(document.paragraphs, at, 450, 2400, rng)
            if from_start and document.is_tale:
                reply = story_opening(reply, rng)
            by_topic = rng.random() < 0.35
            question = asked_by_topic(document, reply, from_start, rng) if by_topic else asked_by_opening(reply, rng)
        text += turn("user", question) + turn("model", (thought(question, reply, rng) if thinking else "") + reply)
    return text
