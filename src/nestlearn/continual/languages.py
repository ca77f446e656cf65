"""Artificial languages with a lexicon and a grammar of their own, beside English: material to learn to translate.

A language has its words (no two languages share one), its order of subject, verb and object, a place for adjectives,
and endings for the plural, the object and the past. A sentence says who did what to whom:

    the old farmer saw the dogs    →    words in the language's order, with its endings
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from nestlearn.continual.invented import words
from nestlearn.errors import UserError

NOUNS = ("farmer", "dog", "king", "bird", "child", "boat", "tree", "wolf", "sister", "horse", "stone", "fish")
VERBS = (("see", "saw"), ("find", "found"), ("carry", "carried"), ("follow", "followed"), ("hear", "heard"),
         ("call", "called"))  # fmt: skip
ADJECTIVES = ("old", "small", "red", "quiet", "strong", "young")
PLURALS = {"wolf": "wolves", "child": "children", "fish": "fishes"}
ORDERS = tuple(permutations("SVO"))


@dataclass(frozen=True)
class Material:
    """What there is to say; if plain, no adjectives, no plurals, no endings, and all of it in the past."""

    nouns: tuple[str, ...] = NOUNS
    verbs: tuple[tuple[str, str], ...] = VERBS
    plain: bool = False


@dataclass(frozen=True)
class Noun:
    word: str
    plural: bool
    adjective: str | None


@dataclass(frozen=True)
class Meaning:
    """Who did what to whom."""

    subject: Noun
    verb: tuple[str, str]
    object: Noun
    past: bool


@dataclass(frozen=True)
class Language:
    """lexicon: English word → own word; order: of S, V and O; endings: of "plural", "object" and "past"."""

    name: str
    lexicon: dict[str, str]
    order: tuple[str, ...]
    adjective_first: bool
    endings: dict[str, str]

    def say(self, meaning: Meaning) -> str:
        verb = self.lexicon[meaning.verb[0]] + (self.endings["past"] if meaning.past else "")
        parts = {"S": self._noun(meaning.subject, False), "V": verb, "O": self._noun(meaning.object, True)}
        return " ".join(parts[role] for role in self.order)

    def _noun(self, noun: Noun, is_object: bool) -> str:
        word = self.lexicon[noun.word] + (self.endings["plural"] if noun.plural else "")
        word += self.endings["object"] if is_object else ""
        if noun.adjective is None:
            return word
        both = (self.lexicon[noun.adjective], word)
        return " ".join(both if self.adjective_first else both[::-1])

    def dictionary(self) -> str:
        """The lexicon as text, a line for each word."""
        return "".join(f"{own} means {english}.\n" for english, own in self.lexicon.items())


def invent(
    seed: int, count: int = 2, material: Material = Material(), stock: Sequence[str] | None = None
) -> list[Language]:
    """Languages that share no word and no order, with words for what the material can say.

    stock  words to take: what a word of it means differs from seed to seed. None: words are built anew
    """
    if not 1 <= count <= len(ORDERS):
        raise UserError(f"count is {count}: must lie within 1 and {len(ORDERS)}, as each language has its own order")
    draw = random.Random(seed)
    english = [*material.nouns, *(verb for verb, _ in material.verbs)]
    english += [] if material.plain else ADJECTIVES
    needed = count * (len(english) + 1)
    if stock is not None and len(stock) < needed:
        raise UserError(f"stock has {len(stock)} words: {count} languages need {needed}; give more words")
    own = words(draw, needed) if stock is None else draw.sample(stock, needed)
    endings = [""] * (3 * count) if material.plain else words(draw, 3 * count, syllables=1)
    orders = draw.sample(ORDERS, count)
    return [
        Language(
            name=own.pop().capitalize(),
            lexicon={word: own.pop() for word in english},
            order=order,
            adjective_first=draw.random() < 0.5,
            endings={kind: endings.pop() for kind in ("plural", "object", "past")},
        )
        for order in orders
    ]


def english(meaning: Meaning) -> str:
    """The sentence in English."""
    verb = meaning.verb[1] if meaning.past else meaning.verb[0] + ("" if meaning.subject.plural else "s")
    verb = "carries" if verb == "carrys" else verb
    return f"{_english_noun(meaning.subject)} {verb} {_english_noun(meaning.object)}"


def meanings(seed: int, count: int, material: Material = Material()) -> list[Meaning]:
    """``count`` different meanings. The same seed gives the same ones, to say them in several languages."""
    nouns, verbs = material.nouns, material.verbs
    if material.plain and count > (most := len(nouns) * (len(nouns) - 1) * len(verbs)):
        raise UserError(f"count is {count}: only {most} different things can be said; ask for fewer")
    draw, found = random.Random(seed), {}
    while len(found) < count:
        subject, other = draw.sample(nouns, 2)
        if material.plain:
            meaning = Meaning(Noun(subject, False, None), draw.choice(verbs), Noun(other, False, None), True)
        else:
            meaning = Meaning(_noun(draw, subject), draw.choice(verbs), _noun(draw, other), draw.random() < 0.5)
        found[meaning] = None
    return list(found)


def lesson(language: Language, said: list[Meaning]) -> str:
    """Text to learn from: the dictionary, then sentences with their English."""
    lines = (f"In {language.name}: {language.say(m)}. In English: {english(m)}.\n" for m in said)
    return language.dictionary() + "".join(lines)


def _noun(draw: random.Random, word: str) -> Noun:
    return Noun(word, draw.random() < 0.4, draw.choice(ADJECTIVES) if draw.random() < 0.5 else None)


def _english_noun(noun: Noun) -> str:
    word = PLURALS.get(noun.word, noun.word + "s") if noun.plural else noun.word
    return " ".join(filter(None, ("the", noun.adjective, word)))
