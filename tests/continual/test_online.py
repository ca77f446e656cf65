"""Levels in context: against an oracle that copies every weight, and the laws of semantics.md §4."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from nestlearn import HopeConfig, HopeForCausalLM, OnlineLearner, OnlineLevel, online_levels, stack_levels
from nestlearn.continual.seam import active
from nestlearn.errors import UserError
from tests.continual.models import MODELS, VOCABULARY, gpt2, hope, levels, llama, text
from tests.oracles import online as oracle

KINDS = list(MODELS)


def deltas(learner):
    return [delta.matrix() for level in learner.state.levels for delta in level.deltas]


def close(ours, theirs, tolerance=1e-10):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= tolerance


@pytest.mark.parametrize(
    "settings", [{}, {"clip": 0.7, "retention": 0.8, "bound": 0.05}, {"clip": math.inf, "lr": 0.1}]
)
def test_equals_copies_of_the_weights(settings):
    model, tokens = llama().double(), text(2, 24)
    learner = OnlineLearner(model, levels("llama", **settings))
    losses = learner.read(tokens)
    told = [
        {"period": int(own.period), "names": [f"{w}.weight" for w in own.weights], "lr": own.lr, "clip": own.clip,
         "retention": own.retention, "bound": own.bound}
        for own in learner.levels
    ]  # fmt: skip
    start = dict(model.named_parameters())
    for row in range(2):
        expected, now = oracle.read(model, tokens[row], told)
        assert torch.allclose(losses[row, 1:].double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6)
        ours = [d[row] for d in deltas(learner)]
        close(ours, [now[n] - start[n] for level in told for n in level["names"]])
        assert all(d.norm() > 0 for d in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_at_a_time_equals_all_at_once(kind):
    tokens = text(2, 19)
    whole, single, uneven = (OnlineLearner(MODELS[kind]().double(), levels(kind)) for _ in range(3))
    losses = whole.read(tokens)
    one_by_one = torch.cat([single.read(tokens[:, i : i + 1]) for i in range(19)], dim=1)
    in_pieces = torch.cat([uneven.read(tokens[:, a:b]) for a, b in ((0, 3), (3, 9), (9, 19))], dim=1)
    for other, learner in ((one_by_one, single), (in_pieces, uneven)):
        assert torch.allclose(losses[:, 1:], other[:, 1:], atol=1e-6)
        close(deltas(whole), deltas(learner))
    assert losses[:, 0].isnan().all() and not losses[:, 1:].isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_share_memory(kind):
    tokens, other = text(3, 17), text(3, 17, seed=1)
    other[1] = tokens[1]
    both = [OnlineLearner(MODELS[kind]().double(), levels(kind)) for _ in range(2)]
    losses = [learner.read(t) for learner, t in zip(both, (tokens, other), strict=True)]
    alone = OnlineLearner(MODELS[kind]().double(), levels(kind))
    assert torch.equal(losses[0][1, 1:], losses[1][1, 1:])
    assert torch.allclose(alone.read(tokens[1])[1:], losses[0][1, 1:], atol=1e-6)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(*map(deltas, both), strict=True))
    close([d[0] for d in deltas(alone)], [d[1] for d in deltas(both[0])])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"period": math.inf}])
def test_no_rate_or_no_period_is_the_pretrained_model_bit_for_bit(kind, settings):
    model, tokens = MODELS[kind](), text(2, 20)
    before = model(tokens).logits
    learner = OnlineLearner(model, [replace(level, **settings) for level in levels(kind)])
    learner.read(tokens)
    with learner.adapted():
        assert torch.equal(model(tokens).logits, before)
    assert all(delta.is_zero for level in learner.state.levels for delta in level.deltas)


def test_the_model_stays_as_it_was():
    model, tokens = llama(), text(2, 20)
    before, weights = model(tokens).logits, {n: p.clone() for n, p in model.named_parameters()}
    OnlineLearner(model, levels("llama")).read(tokens)
    assert torch.equal(model(tokens).logits, before)
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in model.named_parameters())


def test_it_reads_better_what_it_has_read():
    model, tokens = llama(), text(1, 16)
    learner = OnlineLearner(model, levels("llama", (4, 8), lr=1.0, bound=math.inf))
    first = learner.read(tokens)[:, 1:].mean()
    for _ in range(6):
        learner.drop_context()
        last = learner.read(tokens).mean()
    assert last < 0.5 * first


@pytest.mark.parametrize("kind", KINDS)
def test_generate_goes_on_from_the_state(kind):
    model, tokens = MODELS[kind]().double(), text(2, 16)
    learner = OnlineLearner(model, levels(kind))
    learner.read(tokens)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    said = learner.generate(**options)
    assert torch.equal(model.generate(**learner.prompt(), **options)[:, 1:], said)
    # By hand: the greedy continuation is what the learner itself would read with least surprise.
    step, cache, found = learner.state.last, learner.cache(), []
    for _ in range(6):
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        step, cache = out.logits[:, -1:].argmax(dim=-1), out.past_key_values
        found.append(step)
    assert torch.equal(torch.cat(found, dim=1), said)
    assert said.shape == (2, 6) and int(said.max()) < VOCABULARY


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_carries_the_deltas(kind):
    """What is read next has the loss that the cache's logits say; without the deltas the logits are others."""
    model, tokens = MODELS[kind]().double(), text(2, 25)
    learner = OnlineLearner(model, levels(kind))
    learner.read(tokens[:, :16])
    assert learner.state.last is not None
    inputs = torch.cat([learner.state.last, tokens[:, 16:19]], dim=1)
    logits = model(input_ids=inputs, past_key_values=learner.cache(), use_cache=True).logits
    said = -logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 16:19, None])[..., 0]
    assert torch.allclose(learner.read(tokens[:, 16:19]).double(), said, atol=1e-6)
    with learner.adapted():
        changed = model(tokens).logits
    assert (changed - model(tokens).logits).abs().max() > 1e-6


def test_two_states_of_one_model_do_not_interfere():
    model, tokens, other = llama().double(), text(1, 16), text(1, 16, seed=5)
    one, two = (OnlineLearner(model, levels("llama")) for _ in range(2))
    one.read(tokens)
    two.read(other)
    first = model(input_ids=one.state.last, past_key_values=one.cache(), use_cache=True).logits
    model(input_ids=two.state.last, past_key_values=two.cache(), use_cache=True)
    again = model(input_ids=one.state.last, past_key_values=one.cache(), use_cache=True).logits
    assert torch.equal(first, again)


def test_beams_take_their_deltas_with_them():
    model, tokens = llama().double(), text(2, 16)
    learner = OnlineLearner(model, levels("llama"))
    learner.read(tokens)
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    both = learner.generate(**options)
    for row in range(2):
        alone = OnlineLearner(model, levels("llama"))
        alone.read(tokens[row])
        assert torch.equal(alone.generate(**options)[0], both[row])


def test_the_context_is_emptied_and_the_learning_stays():
    model, tokens = gpt2(), text(1, 200)
    learner = OnlineLearner(model, levels("gpt2", (8, 16)))  # 64 positions, 200 tokens
    losses = learner.read(tokens)
    assert losses[:, 1:].isfinite().all() and learner.cache().get_seq_length() < 64
    learned = deltas(learner)
    learner.drop_context()
    assert learner.state.context is None
    close(learned, deltas(learner), 0)


def test_period_one_and_shared_weights():
    """A level of one token learns at every token; two levels on one weight add up."""
    model, tokens = llama().double(), text(1, 9)
    w = levels("llama")[0].weights
    learner = OnlineLearner(model, [OnlineLevel("fast", 1, w, 0.1), OnlineLevel("slow", 4, w, 0.1)])
    learner.read(tokens)
    assert len([c for c in learner.state.changes() if c.level == "fast"]) == 8  # every token but the first has a loss
    with learner.adapted():
        changed = model(tokens).logits
    total = {p: [learner.state.levels[0].deltas[i].add(learner.state.levels[1].deltas[i])] for i, p in enumerate(w)}
    with active({p: tuple(d) for p, d in total.items()}):
        assert torch.allclose(model(tokens).logits, changed, atol=1e-12)


def test_nested_levels_restart_from_the_next_slower():
    model, tokens = hope(connection="nested", levels=[4, 8]).double(), text(2, 16)
    learner = OnlineLearner(model, online_levels(model, lr=0.5), connection="nested")
    learner.read(tokens[:, :12])
    fast, slow = learner.state.levels
    assert (fast.deltas[0].matrix() - slow.deltas[0].matrix()).abs().max() > 1e-6  # the faster one went on from it
    learner.read(tokens[:, 12:])
    fast, slow = learner.state.levels
    assert all(torch.equal(a.matrix(), b.matrix()) for a, b in zip(fast.deltas, slow.deltas, strict=True))
    assert slow.deltas[0].norm().min() > 0


def test_stacked_models_have_their_own_levels():
    learner = OnlineLearner(stack_levels(llama(), [4, 8], by="depth"))
    assert [level.period for level in learner.levels] == [4, 8]
    assert learner.levels[0].weights == levels("llama")[0].weights
    with pytest.raises(UserError, match="by='depth'"):
        OnlineLearner(stack_levels(llama(), [4, 8], by="chain"))


def test_half_precision_weights_have_deltas_in_float32():
    model, tokens = llama().bfloat16(), text(2, 16)
    learner = OnlineLearner(model, levels("llama"))
    assert learner.read(tokens)[:, 1:].isfinite().all()
    assert all(d.dtype == torch.float32 and d.norm() > 0 for d in deltas(learner))


class EightBits(torch.nn.Module):
    """A linear module whose weight is stored in 8 bits, as weight-only quantisation does."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.scale: torch.Tensor
        self.weight: torch.Tensor
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.weight * self.scale).mT


def test_weights_in_eight_bits_learn_as_what_they_stand_for():
    model, plain, tokens = llama(), llama(), text(2, 16)
    for path in (path for level in levels("llama") for path in level.weights):
        parent, _, name = path.rpartition(".")
        quantised = EightBits(model.get_submodule(path))
        setattr(model.get_submodule(parent), name, quantised)
        plain.get_submodule(path).weight.data = quantised.weight * quantised.scale  # pyright: ignore
    one, other = OnlineLearner(model, levels("llama")), OnlineLearner(plain, levels("llama"))
    assert torch.allclose(one.read(tokens)[:, 1:], other.read(tokens)[:, 1:], atol=1e-4)
    for a, b in zip(deltas(one), deltas(other), strict=True):
        assert a.dtype == torch.float32 and b.norm() > 0 and torch.allclose(a, b, atol=1e-5)
    assert model.get_submodule(levels("llama")[0].weights[0]).weight.dtype == torch.int8


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_model_that_passes_no_gradient_down_is_refused():
    model = torch.ao.quantization.quantize_dynamic(llama(), {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UserError, match="passes no gradient down"):
        OnlineLearner(model, levels("llama"))


def test_a_short_period_stays_low_rank():
    """Two changes of at most 4 tokens each: rank 8, fewer numbers than the matrix."""
    model = llama()
    w = ("lm_head",)
    learner = OnlineLearner(model, [OnlineLevel("a", 4, w)])
    learner.read(text(1, 8))
    delta = learner.state.levels[0].deltas[0]
    assert delta.dense is None and delta.left is not None and delta.left.shape[1] == 7
    assert learner.state.sizes()["deltas"] == 4 * 7 * (16 + VOCABULARY)


BAD = [
    (lambda m: OnlineLearner(m), "no levels of its own"),
    (lambda m: OnlineLearner(m, []), "at least one OnlineLevel"),
    (lambda m: OnlineLevel("a", 0.5, ("x",)), "period is 0.5, must be at least 1"),
    (lambda m: OnlineLevel("a", 4, ("x",), rule="sdg"), "did you mean 'sgd'"),
    (lambda m: OnlineLevel("a", 4, ()), "at least one path"),
    (lambda m: OnlineLevel("a", 4, ("x",), retention=0.0), r"retention is 0.0, must be in \(0, 1\]"),
    (lambda m: OnlineLearner(m, [OnlineLevel("a", 4, ("model.layers.0.mlp.gate_prj",))]), "did you mean 'model.layers"),
    (lambda m: OnlineLearner(m, [OnlineLevel("a", 4, ("model.layers.0.mlp",))]), "must be linear"),
    (lambda m: OnlineLearner(m, levels("llama", (8, 4))), "from the fastest to the slowest"),
    (lambda m: OnlineLearner(m, levels("llama", (4, 6)), connection="nested"), "multiple of the one before"),
    (lambda m: OnlineLearner(m, levels("llama"), connection="nest"), "did you mean 'nested'"),
    (lambda m: OnlineLearner(m, levels("llama"), context=1), "context is 1"),
    (lambda m: OnlineLearner(m, levels("llama")).read(torch.zeros(2, 0, dtype=torch.long)), "at least one token"),
    (lambda m: OnlineLearner(m, levels("llama")).read(torch.tensor([99])), "99 to 99, must be from 0"),
    (lambda m: OnlineLearner(m, levels("llama")).prompt(), "nothing was read"),
]


@pytest.mark.parametrize("bad, message", BAD, ids=[message for _, message in BAD])
def test_one_clear_error(bad, message):
    with pytest.raises(UserError, match=message):
        bad(llama())


def test_experts_in_one_parameter_are_said_to_be_no_linear_module():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=31, num_key_value_heads=1, num_local_experts=2, **sizes))
    with pytest.raises(UserError, match="level 'every-4' of MixtralForCausalLM has no linear module"):
        OnlineLearner(stack_levels(model, [4, 8]))


def test_rows_must_stay_the_same():
    learner = OnlineLearner(llama(), levels("llama"))
    learner.read(text(2, 4))
    with pytest.raises(UserError, match="3 rows, but the state holds 2"):
        learner.read(text(3, 4))


def test_a_models_own_levels_take_any_setting_but_their_weights():
    levels = online_levels(hope(), period=4, lr=0.25, bound=0.5)
    assert {(level.period, level.lr, level.bound) for level in levels} == {(4, 0.25, 0.5)} and len(levels) > 1
    with pytest.raises(UserError, match="takes no 'weights'"):
        online_levels(hope(), weights=["lm_head"])


def test_a_weight_that_is_read_without_its_module_is_refused():
    config = HopeConfig(
        vocab_size=32, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, mixer="window-attention"
    )
    model = HopeForCausalLM(config)
    learner = OnlineLearner(model, [OnlineLevel("all", 8, ("model.blocks.0.mixer.project",))])
    with pytest.raises(UserError, match="project' was not called"):
        learner.read(torch.randint(0, 32, (1, 8)))
