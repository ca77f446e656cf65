"""The reading protocols, with readers that count, that are frozen, and that forget."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from nestlearn.continual.facts import encyclopaedia
from nestlearn.continual.languages import invent, meanings
from nestlearn.continual.reading import (
    Choice,
    chance,
    domains_in_sequence,
    fact_choices,
    forgotten,
    gain_by_position,
    languages_in_sequence,
    new_facts,
    share_right,
    translation_choices,
)
from nestlearn.errors import UserError


class Counting:
    """Counts which word follows any earlier word of the same sentence, and how often each byte came."""

    def __init__(self, learns=True, keeps=True):
        self.learns, self.keeps = learns, keeps
        self.follows, self.bytes = defaultdict(Counter), Counter()

    def read(self, text):
        bits = np.array([self._byte_bits(byte) for byte in text.encode()])
        if self.learns:
            if not self.keeps:
                self.follows, self.bytes = defaultdict(Counter), Counter()
            self.bytes.update(text.encode())
            for sentence in text.replace(". In English:", " ").split("."):
                words = sentence.split()
                for i, word in enumerate(words):
                    self.follows[word].update(words[i + 1 :])
        return bits

    def bits(self, prompt, text):
        known = 0.0
        for word in prompt.replace(". In English:", " ").split():
            after = self.follows[word]
            known += sum(after[w] for w in text.strip(" .").split()) / (1 + after.total())
        return sum(map(self._byte_bits, text.encode())) - 100 * known * len(text.encode())

    def _byte_bits(self, byte):
        return -np.log2((1 + self.bytes[byte]) / (256 + self.bytes.total()))


def test_the_true_text_must_be_the_only_best():
    class Table:
        def __init__(self, **bits):
            self.table = bits

        def bits(self, prompt, text):
            return self.table[text]

    choice = Choice("?", ("a", "bb"), 0)
    assert share_right(Table(a=1.0, bb=3.0), [choice]) == 1  # pyright: ignore[reportArgumentType]
    assert share_right(Table(a=1.0, bb=2.0), [choice]) == 0  # pyright: ignore[reportArgumentType]
    assert share_right(Table(a=2.0, bb=3.0), [choice]) == 0  # pyright: ignore[reportArgumentType]
    assert chance([choice, Choice("?", ("a", "b", "c", "d"), 0)]) == pytest.approx(0.375)
    with pytest.raises(UserError, match="nothing to choose"):
        share_right(Counting(), [])


def test_new_facts_are_known_after_reading_and_by_no_one_who_does_not_learn():
    entries, other = encyclopaedia(seed=0, people=20), ["Nothing of interest happened that day. " * 5]
    found = new_facts(Counting(), entries, other)
    assert found["before"]["stated"] < 0.3 < 0.7 < found["after"]["stated"] == found["later"]["stated"]
    frozen = new_facts(Counting(learns=False), entries, other)
    assert frozen["before"] == frozen["after"] == frozen["later"]
    lost = new_facts(Counting(keeps=False), entries, other)
    assert lost["later"]["stated"] < 0.3
    assert len(fact_choices(entries, reworded=True)) == len(fact_choices(entries, reworded=False)) == 80


def test_translations_have_one_true_text_in_any_place():
    language, said = invent(seed=0)[0], meanings(seed=0, count=30)
    choices = translation_choices(language, said)
    assert {choice.right for choice in choices} == set(range(10))
    assert all(len(set(choice.texts)) == 10 for choice in choices)
    assert len({choice.texts[choice.right] for choice in choices}) == 30
    with pytest.raises(UserError, match="within 2 and the 30 sentences"):
        translation_choices(language, said, choices=31)


def test_languages_in_sequence_give_the_matrix():
    languages, taught, asked = invent(seed=0), meanings(seed=0, count=150), meanings(seed=1, count=20)
    kept, before = languages_in_sequence(Counting(), languages, taught, asked)
    assert kept.shape == (2, 2) and before.max() < 0.4
    assert kept[0, 0] > 0.6 and kept[1, 1] > 0.6 and kept[1, 0] == kept[0, 0] and kept[0, 1] < 0.4
    lost, _ = languages_in_sequence(Counting(keeps=False), languages, taught, asked)
    assert lost[1, 0] < 0.4 < lost[1, 1]


def test_domains_in_sequence():
    domains, held_out = [["aaaa" * 50], ["bbbb" * 100, "bb"]], ["aaaaaa", "bbbb"]
    measured, curves = domains_in_sequence(Counting(), domains, held_out)
    assert measured.shape == (3, 2) and measured[0] == pytest.approx(8.0)
    assert measured[1, 0] < 8 < measured[1, 1] and measured[2, 0] > measured[1, 0]
    assert [len(curve) for curve in curves] == [200, 402]
    assert forgotten(measured)[0] > 0 and forgotten(measured)[1] == 0
    with pytest.raises(UserError, match="one for each"):
        domains_in_sequence(Counting(), domains, ["a"])


def test_gain_and_forgetting_by_hand():
    gain = gain_by_position(np.array([1.0, 1, 2, 0, 9]), np.array([2.0, 3, 2, 2, 0]), 2)
    assert gain.tolist() == [1.5, 1.0]
    assert forgotten(np.array([[4.0, 4], [2, 4], [3, 1]])).tolist() == [0.5, 0.0]
    with pytest.raises(UserError, match="two equal curves"):
        gain_by_position(np.zeros(3), np.zeros(4), 1)
    with pytest.raises(UserError, match="must be"):
        forgotten(np.zeros((2, 2)))
