"""What was known before answers beside what is known now: the mixture's law, and that reading on loses nothing."""

import math

import pytest
import torch

from nestlearn import OnlineLearner
from nestlearn.continual.online_reader import OnlineReader
from nestlearn.continual.recall import NOW, SLOW, mixed, voices
from nestlearn.errors import UserError
from tests.continual.models import hope, levels, llama, text


def by_paths(nats, share):
    """-log Σ over every path of voices of its probability: the mixture's definition, without its recursion."""
    n, length = nats.shape
    total = 0.0
    for path in torch.cartesian_prod(*[torch.arange(n)] * length).tolist():
        p = 1 / n
        for t, (voice, before) in enumerate(zip(path, [None, *path], strict=False)):
            if before is not None:
                p *= share / n + (1 - share) * (voice == before)
            p *= math.exp(-float(nats[voice, t]))
        total += p
    return -math.log(total)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_the_mixture_is_the_sum_over_all_paths(share):
    nats = 3 * torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert float(mixed(nats, share).sum()) == pytest.approx(by_paths(nats, share), abs=1e-12)


def test_it_costs_little_more_than_the_best_voice_and_survives_probability_zero():
    nats = 4 * torch.rand(6, 2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    nats[1, :, 7] = math.inf
    allowed = nats.sum(-1).min(0).values + math.log(6) - 50 * math.log(1 - 1e-3)
    assert (mixed(nats).sum(-1) <= allowed + 1e-9).all()
    assert torch.allclose(mixed(nats[:1]), nats[0])


def test_voices_are_the_model_the_marks_and_now():
    model = hope()
    learner = OnlineLearner(model, levels("hope"))
    first, asked = text(1, 16), text(1, 9, seed=1)
    learner.read(first)
    learner.mark("one")
    with learner.adapted():
        at_one = model(input_ids=asked).logits
    learner.read(text(1, 16, seed=2))
    found = voices(learner, asked)
    assert list(found) == [SLOW, "one", NOW] and learner.state.tokens == 32
    for name, logits in ((SLOW, model(input_ids=asked).logits), ("one", at_one)):
        expected = -logits.log_softmax(-1)[0, :-1].gather(1, asked[0, 1:, None])[:, 0]
        assert torch.allclose(found[name][0].float(), expected, atol=1e-5)
    assert not torch.allclose(found[NOW], found["one"]) and not torch.allclose(found[SLOW], found["one"])


def test_a_reader_with_recall_forgets_nothing():
    said, paid = ["abcabcabd" * 12, "zyxwzyxv" * 12], {}
    for recall in (None, "slow", "marks"):
        learner = OnlineLearner(llama(), levels("llama", lr=2.0, clip=5.0, bound=10.0, spike=math.inf))
        reader = OnlineReader(learner, lambda s: [ord(c) - 96 for c in s.replace("\n", "`")], recall=recall)
        before = reader.bits("", said[0])
        reader.read(said[0])
        just = reader.bits("", said[0])
        for _ in range(2):
            reader.read(said[1])
        paid[recall] = before, just, reader.bits("", said[0])
    little = math.log2(5) - len(said[0]) * math.log2(1 - 1e-3)
    assert paid[None][1] < paid[None][0] / 2 and paid[None][2] > paid[None][0] + 10  # learned, and lost
    assert paid["slow"][2] <= paid[None][0] + little
    assert paid["marks"][2] <= paid[None][1] + little


def test_bad_input_is_told():
    learner = OnlineLearner(hope(), levels("hope"))
    with pytest.raises(UserError, match="at least 2 tokens"):
        voices(learner, text(1, 1))
    with pytest.raises(UserError, match="no mark 'two'"):
        voices(learner, text(1, 4), ["two"])
    learner.mark(NOW)
    with pytest.raises(UserError, match="another name"):
        voices(learner, text(1, 4))
    with pytest.raises(UserError, match="share is 1"):
        mixed(torch.zeros(2, 3), share=1)
    with pytest.raises(UserError, match="recall is 'mark'"):
        OnlineReader(learner, lambda s: [len(s)], recall="mark")
