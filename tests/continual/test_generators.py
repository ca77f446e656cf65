"""The invented encyclopaedia and languages: what is asked can be known, and only from what was read."""

import pytest

from nestlearn.continual.facts import FORMS, encyclopaedia
from nestlearn.continual.languages import Language, Material, Meaning, Noun, english, invent, lesson, meanings
from nestlearn.errors import UserError


def test_every_answer_stands_in_its_article_and_no_name_in_another():
    entries = encyclopaedia(seed=0, people=40)
    assert entries == encyclopaedia(seed=0, people=40) != encyclopaedia(seed=1, people=40)
    for entry in entries:
        assert sum(entry.name in other.article for other in entries) == 1
        assert len(entry.questions) == 2 * len(FORMS)
        for question in entry.questions:
            assert question.answer in entry.article and question.answer in question.choices
            assert len(set(question.choices)) == 10
            assert (question.prompt in entry.article) is not question.reworded


def test_the_place_of_the_answer_among_the_choices_says_nothing():
    places = [q.choices.index(q.answer) for e in encyclopaedia(0, 200) for q in e.questions]
    assert all(0.05 < places.count(place) / len(places) < 0.15 for place in range(10))


def test_unique_answers_belong_to_one_person():
    entries = encyclopaedia(seed=3, people=30)
    for kind in ("birthplace", "year", "work"):
        answers = [q.answer for e in entries for q in e.questions if q.kind == kind and not q.reworded]
        assert len(set(answers)) == 30


MEANING = Meaning(Noun("dog", True, "old"), ("see", "saw"), Noun("king", False, None), past=True)


def test_a_sentence_by_hand():
    lexicon = {"dog": "tak", "king": "rum", "see": "lin", "old": "po"}
    endings = {"plural": "sa", "object": "ne", "past": "da"}
    language = Language("Zo", lexicon, ("S", "O", "V"), False, endings)
    assert language.say(MEANING) == "taksa po rumne linda"
    assert english(MEANING) == "the old dogs saw the king"
    assert "In Zo: taksa po rumne linda. In English: the old dogs saw the king.\n" in lesson(language, [MEANING])


def test_languages_share_no_word_and_no_order_and_say_different_things_differently():
    one, two = invent(seed=0)
    assert not set(one.lexicon.values()) & set(two.lexicon.values()) and one.order != two.order
    assert one.lexicon.keys() == two.lexicon.keys() and one == invent(seed=0)[0]
    said = meanings(seed=1, count=300)
    assert len(set(said)) == len({one.say(m) for m in said}) == len({english(m) for m in said}) == 300
    assert all(word in lesson(one, []) for word in one.lexicon.values())


def test_plain_languages_of_a_stock():
    material, stock = Material(("dog", "king", "fox"), (("hit", "hit"),), plain=True), [f"w{i}" for i in range(10)]
    one, two = invent(0, 2, material, stock)
    assert {*one.lexicon.values(), *two.lexicon.values()} <= {*stock} and one.lexicon.keys() == {*material.nouns, "hit"}
    said = meanings(1, 6, material)
    assert {word for m in said for word in one.say(m).split()} == {*one.lexicon.values()}
    assert all(english(m) == f"the {m.subject.word} hit the {m.object.word}" for m in said)
    with pytest.raises(UserError, match="only 6"):
        meanings(0, 7, material)
    with pytest.raises(UserError, match="need 15"):
        invent(0, 3, material, stock)


def test_bad_counts_are_refused():
    with pytest.raises(UserError, match="within 2"):
        encyclopaedia(0, people=5)
    with pytest.raises(UserError, match="within 1 and 6"):
        invent(0, 7)
