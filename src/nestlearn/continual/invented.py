"""Words and names that no text holds: built from syllables, distinct, a pure function of a random generator."""

from __future__ import annotations

import random
from collections.abc import Sequence

VOWELS, CONSONANTS = "aeiou", "bdfgklmnprstvz"


def words(draw: random.Random, count: int, syllables: int = 2, avoid: Sequence[str] = ()) -> list[str]:
    """``count`` different words of so many syllables (consonant, vowel, now and then a final consonant)."""
    known, found = set(avoid), []
    while len(found) < count:
        word = "".join(draw.choice(CONSONANTS) + draw.choice(VOWELS) for _ in range(syllables))
        word += draw.choice(CONSONANTS) if draw.random() < 0.5 else ""
        if word not in known:
            known.add(word)
            found.append(word)
    return found


def names(draw: random.Random, count: int, parts: int = 1, avoid: Sequence[str] = ()) -> list[str]:
    """``count`` different names, each of ``parts`` capitalised words that no other name has."""
    flat = [word.capitalize() for word in words(draw, count * parts, 2 if parts > 1 else 3, [a.lower() for a in avoid])]
    return [" ".join(flat[i * parts : (i + 1) * parts]) for i in range(count)]
