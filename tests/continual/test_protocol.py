"""The training loop around each method, on an encoder of a few thousand parameters."""

import copy

import pytest
import torch

from nestlearn.continual.classifier import Classifier, MemoryHead
from nestlearn.continual.encoder import Encoded
from nestlearn.continual.methods import Anchor, Method, choose, methods
from nestlearn.continual.protocol import EncodedTask, Learner, Settings, run
from nestlearn.errors import UserError
from tests.continual import small

SETTINGS = Settings(trained=2, epochs=2, batch=4)


@pytest.fixture(scope="module")
def encoder():
    return small.encoder()


@pytest.fixture(scope="module")
def tasks(encoder):
    rows, found = small.rows(), []
    for first in (0, 2, 4):
        own = [row for row in rows if row["label"] in (f"class {first}", f"class {first + 1}")]
        encoded = encoder.encode([r["text"] for r in own], [int(r["label"][-1]) for r in own])
        found.append(EncodedTask((first, first + 1), encoded[range(0, 16, 2)], encoded[range(1, 16, 2)]))
    return found


def learner(encoder, method, lr=1e-2):
    torch.manual_seed(0)
    return Learner(copy.deepcopy(encoder), 6, method, lr, SETTINGS, seed=0)


def test_the_two_parts_of_the_encoder_are_the_encoder(encoder, tasks):
    batch = tasks[0].train
    assert torch.allclose(encoder(*batch.padded()), batch.frozen, atol=1e-6)
    alone = torch.cat([encoder(*batch[[i]].padded()) for i in range(len(batch))])
    assert torch.allclose(alone, batch.frozen, atol=1e-6)  # padding changes nothing
    again = Encoded.from_dict(batch.to_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.hidden, batch.hidden, strict=True))


@pytest.mark.parametrize("method", methods((64, 128)).values(), ids=lambda m: m.name)
def test_every_method_learns_and_leaves_the_given_encoder_alone(encoder, tasks, method):
    before = [p.clone() for p in encoder.parameters()]
    outcome = run(encoder, tasks, method, 3e-3, SETTINGS, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True))
    r = torch.tensor(outcome.accuracies)
    known = torch.isfinite(r)
    assert known[-1].all() and (method.joint or torch.equal(known, torch.ones(3, 3).tril().bool()))
    assert outcome.tokens > 0 or method.periods == ()
    # chance is 1/6 for all tasks at once, and on average 11/36 for each task just after it was learned
    assert r[-1].mean() > 0.35 if method.joint else r.diagonal().mean() > 0.5
    again = run(encoder, tasks, method, 3e-3, SETTINGS, seed=0)
    assert torch.tensor(again.accuracies).nan_to_num(-1).equal(r.nan_to_num(-1)) and again.tokens == outcome.tokens


def test_all_read_the_same_tokens(encoder, tasks):
    expected = SETTINGS.epochs * sum(len(h) for task in tasks for h in task.train.hidden)
    for name, slack in (("sequential", 0), ("ewc", 0), ("levels-4", 0), ("joint", 0), ("replay-10", 0.15)):
        tokens = run(encoder, tasks, methods((64, 128))[name], 1e-3, SETTINGS, seed=0).tokens
        assert abs(tokens - expected) <= slack * expected


def test_a_memory_over_frozen_features_is_the_nearest_class_mean(encoder, tasks):
    frozen = learner(encoder, Method("frozen", head="memory", periods=()))
    for task in tasks:
        frozen.learn(task.classes, task.train)
    head = frozen.model.classifier
    assert isinstance(head, MemoryHead)
    means = torch.stack([
        torch.cat([t.train.frozen[t.train.labels == c] for t in tasks]).mean(0) for c in range(6)
    ])  # fmt: skip
    cosines = torch.nn.functional.cosine_similarity(tasks[1].test.frozen[:, None], means[None], dim=-1)
    expected = (cosines.argmax(1) == tasks[1].test.labels).double().mean()
    assert frozen.accuracies([tasks[1]])[0] == pytest.approx(float(expected))


def test_classes_that_have_not_come_are_no_answer(encoder, tasks):
    one = learner(encoder, Method("sequential"))
    one.learn(tasks[0].classes, tasks[0].train)
    assert one.accuracies(tasks)[1:] == [0.0, 0.0]
    assert torch.isinf(one.model(tasks[0].test)[:, 2:]).all()


def test_each_mlp_level_changes_on_its_own_period(encoder, tasks):
    one = learner(encoder, Method("levels", head="memory", periods=(16, 10**6)))
    before = {name: p.clone() for name, p in one.model.named_parameters()}
    one.learn(tasks[0].classes, tasks[0].train)
    moved = {n for n, p in one.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(".layer.2." in name and ("intermediate" in name or "output" in name) for name in moved)


def test_low_rank_changes_are_of_low_rank_and_end_in_the_weights(encoder, tasks):
    one = learner(encoder, Method("lora", rank=1))
    before = {name: p.clone() for name, p in one.model.named_parameters()}
    for number, task in enumerate(tasks[:2], 1):
        one.learn(task.classes, task.train)
        after = dict(one.model.named_parameters())
        assert after.keys() == before.keys()
        ranks = [torch.linalg.matrix_rank(after[n] - before[n], atol=1e-5)
                 for n in before if "intermediate" in n and n.endswith("weight")]  # fmt: skip
        assert max(ranks) == number


def test_low_rank_changes_share_one_head_and_its_optimizer(encoder, tasks, monkeypatch):
    one, made = learner(encoder, Method("lora", rank=1)), []
    own = one._optimizer
    monkeypatch.setattr(one, "_optimizer", lambda **which: made.append(own(**which)) or made[-1])
    names = lambda optimizer: [n for group in optimizer.param_groups for n in group["param_names"]]  # noqa: E731
    assert names(one.optimizer) and all(n.startswith("classifier.") for n in names(one.optimizer))
    for task in tasks[:2]:
        one.learn(task.classes, task.train)
    assert len(made) == 2 and all("parametrizations" in n for optimizer in made for n in names(optimizer))


def test_ewc_is_the_quadratic_pull_of_each_parameter():
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[1.0, 2.0]]))
    anchor = Anchor(strength=3.0)
    assert anchor.penalty(layer) == 0
    anchor.hold(layer, {"weight": torch.tensor([[2.0, 0.5]])})
    anchor.hold(layer, {"weight": torch.tensor([[1.0, 0.0]])})
    layer.weight.data.copy_(torch.tensor([[2.0, 4.0]]))
    assert anchor.penalty(layer).item() == pytest.approx(3 / 2 * (3 * 1 + 0.5 * 4))


def test_replay_keeps_its_share_and_gives_it_a_quarter_of_the_epoch(encoder, tasks):
    one = learner(encoder, Method("replay", replay=0.25))
    one.learn(tasks[0].classes, tasks[0].train)
    assert one.store is not None and len(one.store) == 2
    epoch = one._with_stored(tasks[1].train)
    assert len(epoch) == 8 and sum(int(label) < 2 for label in epoch.labels) == 2


def test_what_does_not_exist_is_refused(encoder):
    with pytest.raises(UserError, match="did you mean 'sequential'"):
        choose(["sequentiel"], methods((8,)))
    with pytest.raises(UserError, match="within 1 and the encoder's 3"):
        small.encoder(trained=4)
    assert not Classifier(encoder, "linear", 3).seen.any()


def test_only_the_head_learns_at_the_head_s_rate(encoder):
    """Head and encoder share kinds and periods: in one group, the encoder would learn ten times as fast."""
    one = learner(encoder, methods((8,))["sequential"], lr=1e-3)
    assert one.optimizer is not None
    rates = {n: g["lr"] for g in one.optimizer.param_groups for n in g["param_names"]}
    assert {r for n, r in rates.items() if n.startswith("classifier.")} == {1e-3 * SETTINGS.head_lr}
    assert {r for n, r in rates.items() if n.startswith("encoder.")} == {1e-3}
