"""stack_levels: any Hugging Face model gets levels, starts as itself, saves them, and gives them back."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from nestlearn import HopeConfig, HopeForCausalLM, load_stacked, stack_levels, stacked_levels, unstack
from nestlearn.errors import UserError
from nestlearn.optim import Leveled, parameter_groups

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
DISTIL = {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 4, "n_heads": 2, "dropout": 0.0}
MIXTRAL = {**GROUPED, "num_local_experts": 2}
OPT = {"vocab_size": 40, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
       "word_embed_proj_dim": 16, "max_position_embeddings": 32}  # fmt: skip
MODELS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, GROUPED),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, GROUPED),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, GROUPED),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, GROUPED),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig, GROUPED),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, GROUPED),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, GROUPED),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, GPT2),
    "neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, SMALL),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, MIXTRAL),
    "opt": (hf.OPTForCausalLM, hf.OPTConfig, OPT),
    "bert": (hf.BertForSequenceClassification, hf.BertConfig, {**SMALL, "num_labels": 3}),
    "distilbert": (hf.DistilBertForSequenceClassification, hf.DistilBertConfig, DISTIL),
    "llama-classifier": (hf.LlamaForSequenceClassification, hf.LlamaConfig, {**GROUPED, "num_labels": 3}),
}
PERIODS = [16, 32, 64, math.inf]
CHAINED = [name for name in MODELS if name != "opt"]
IDS = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(0))


def build(name, dtype=torch.float32):
    torch.manual_seed(0)
    model_class, config, options = MODELS[name]
    return model_class._from_config(config(**options), dtype=dtype).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def loss(model):
    out = model(input_ids=IDS).logits
    return nn.functional.cross_entropy(out.flatten(0, -2).float(), torch.arange(out.flatten(0, -2).shape[0]) % 3)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def optimizer(model, lr=0.1, **options):
    return Leveled(partial(torch.optim.SGD, lr=lr), parameter_groups(model), **options)


def train(model, optimizer, steps, tokens=16):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step(tokens=tokens)


def stirred(model, size=0.05):
    """Every parameter of a level moved, so that no level is at its start."""
    torch.manual_seed(1)
    parameters = dict(model.named_parameters())
    for names in stacked_levels(model).values():
        for name in names:
            parameters[name].data.add_(size * torch.randn_like(parameters[name]))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_by_depth_adds_nothing_and_changes_nothing(name):
    model, plain = build(name), build(name)
    assert stack_levels(model, PERIODS) is model
    assert torch.equal(logits(model), logits(plain))
    assert weights(model).keys() == weights(plain).keys()
    unstack(model)
    assert model.config.to_dict() == plain.config.to_dict() and not hasattr(model, "parameter_periods")
    assert all(torch.equal(p, weights(plain)[name]) for name, p in weights(model).items())


@pytest.mark.parametrize("name", MODELS)
def test_by_depth_deals_every_mlp_to_one_level_the_deepest_the_fastest(name):
    model = stack_levels(build(name), PERIODS)
    dealt = stacked_levels(model)
    assert [level.period for level in dealt] == PERIODS
    for names, depth in zip(dealt.values(), (3, 2, 1, 0), strict=True):
        assert names and all(f".{depth}." in own for own in names)
    mlps = [own for own in weights(model) if any(w in own for w in ("mlp", "ffn", "fc1", "fc2", "intermediate"))]
    assert set(mlps) <= {own for names in dealt.values() for own in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CHAINED)
def test_a_chain_starts_as_the_model_itself(name, dtype):
    model, plain = stack_levels(build(name, dtype), PERIODS, by="chain"), build(name, dtype)
    assert torch.equal(logits(model), logits(plain))
    deltas = {own: p for own, p in model.named_parameters() if ".deltas." in own}
    assert all(p.dtype == torch.float32 and not p.any() for p in deltas.values())
    stirred(model)
    assert not torch.equal(logits(model), logits(plain))
    unstack(model)
    assert torch.equal(logits(model), logits(plain)) and model.state_dict().keys() == plain.state_dict().keys()
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]


def test_a_chain_is_the_equation():
    model = stirred(stack_levels(build("gpt2"), [16, 32, 64], by="chain"))
    chain = model.transformer.h[1].mlp
    x = torch.randn(2, 5, 16)

    def mlp(level, z):
        w = {
            n: p + (chain.deltas[level].get_parameter(n) if level else 0) for n, p in chain.original.named_parameters()
        }
        hidden = nn.functional.gelu(z @ w["c_fc.weight"] + w["c_fc.bias"], approximate="tanh")
        return hidden @ w["c_proj.weight"] + w["c_proj.bias"]

    first = mlp("every-16", x) - mlp(None, x)
    second = mlp("every-32", x + first) - mlp(None, x)
    expected = mlp("every-64", x + first + second) + first + second
    assert (chain(x) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("by", ["depth", "chain"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_each_level_steps_on_its_own_period(name, by):
    model = stack_levels(build(name), PERIODS, by=by)
    step = optimizer(model)
    start, by_level = weights(model), stacked_levels(model)
    moved_at = {level.period: [] for level in by_level}
    for number in range(1, 5):
        before = weights(model)
        train(model, step, 1)
        now = weights(model)
        for level, names in by_level.items():
            if any(not torch.equal(before[own], now[own]) for own in names):
                moved_at[level.period].append(number)
    assert moved_at == {16: [1, 2, 3, 4], 32: [2, 4], 64: [4], math.inf: []}
    levels = {own for names in by_level.values() for own in names}
    rest = [own for own in start if own not in levels and not own.startswith("classifier")]
    assert rest and all(torch.equal(start[own], weights(model)[own]) for own in rest)


def test_shares_say_how_many_blocks_a_level_gets(tmp_path):
    model = stack_levels(build("llama"), [16, math.inf], shares=[1, 3])
    model.save_pretrained(tmp_path)
    for one in (model, load_stacked(hf.LlamaForCausalLM, tmp_path)):
        fast, frozen = stacked_levels(one).values()
        assert {name.split(".")[2] for name in fast} == {"3"} and {name.split(".")[2] for name in frozen} == {*"012"}


def test_the_head_of_a_classifier_learns_at_every_step_and_the_rest_if_asked_to():
    periods = stack_levels(build("bert"), PERIODS).parameter_periods()
    assert periods["classifier.weight"] == 1 and periods["bert.embeddings.word_embeddings.weight"] == math.inf
    periods = stack_levels(build("llama"), PERIODS, rest=64).parameter_periods()
    assert periods["lm_head.weight"] == 64 and periods["model.layers.3.self_attn.q_proj.weight"] == 64


def test_what_requires_no_gradient_never_changes():
    model = build("llama")
    for own, p in model.named_parameters():
        p.requires_grad_("mlp" in own)
    step = optimizer(stack_levels(model, [16, 32], rest=1))
    start = weights(model)
    train(model, step, 2)
    moved = {own for own, p in weights(model).items() if not torch.equal(p, start[own])}
    assert moved == {own for own in start if "mlp" in own}


@pytest.mark.parametrize("first", ["adapters", "levels"])
def test_with_adapters_of_peft(first):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    if first == "adapters":
        model = stack_levels(peft.get_peft_model(build("llama"), lora), PERIODS, rest=1)
    else:
        model = peft.get_peft_model(stack_levels(build("llama"), PERIODS, rest=1), lora)
    start = weights(model)
    train(model, optimizer(model), 2)
    moved = {own for own, p in weights(model).items() if not torch.equal(p, start[own])}
    adapters = {own for own in start if "lora_" in own}
    slow = {own for own in adapters if "down_proj" in own and (".0." in own or ".1." in own)}
    assert moved == adapters - slow and slow


@pytest.mark.parametrize("by", ["depth", "chain"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_save_pretrained_keeps_the_levels(name, by, tmp_path):
    model = stirred(
        stack_levels(build(name, torch.bfloat16), [(f"l{p}", p, None, 0.5) for p in PERIODS], by=by, rest=8)
    )
    model.save_pretrained(tmp_path)
    again = load_stacked(MODELS[name][0], tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.parameter_periods() == model.parameter_periods()
    assert again.parameter_lr_scales() == model.parameter_lr_scales() and 0.5 in again.parameter_lr_scales().values()
    assert {n: p.dtype for n, p in again.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}


def test_loading_what_was_not_stacked_or_is_of_another_class_is_refused(tmp_path):
    build("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="has no nested_levels"):
        load_stacked(hf.LlamaForCausalLM, tmp_path / "plain")
    stack_levels(build("llama"), PERIODS).save_pretrained(tmp_path / "stacked")
    with pytest.raises(UserError, match="weights are not those of the model"):
        load_stacked(hf.LlamaForSequenceClassification, tmp_path / "stacked")


def test_models_without_known_mlps_and_bad_settings_are_refused():
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.layers = object(), nn.ModuleList([nn.Linear(2, 2)])

    with pytest.raises(UserError, match=r"no MLP blocks.*mlp, feed_forward.*intermediate \+ output.*\['Linear'\]"):
        stack_levels(Unknown())
    llama = build("llama")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"by": "deep"}, "did you mean 'depth'"),
        ({"periods": [1, 2, 3, 4, 5]}, "has 4 MLP blocks, fewer than the 5 levels"),
        ({"periods": [8, 4]}, "fastest"),
        ({"rest": 0}, "at least 1 token"),
        ({"periods": [4, 8], "shares": [1, 2]}, "sum to the model's 4 MLP blocks"),
        ({"periods": [4, 8], "shares": [4, 0]}, "at least 1"),
        ({"periods": [4, 8], "shares": [2, 2], "by": "chain"}, "every level in every block"),
    ]
    for arguments, message in refused:
        with pytest.raises(UserError, match=message):
            stack_levels(llama, **arguments)
    with pytest.raises(UserError, match="has no levels"):
        unstack(llama)
    with pytest.raises(UserError, match="has levels already"):
        stack_levels(stack_levels(llama))
    with pytest.raises(UserError, match="has levels already"):
        stack_levels(HopeForCausalLM(HopeConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1)))


def test_a_chain_that_cannot_be_leaves_the_model_as_it_was():
    with pytest.raises(UserError, match="cannot take"):
        stack_levels(build("opt"), PERIODS, by="chain")
    model, options = build("gpt2"), {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2}
    model.transformer.h[2].mlp.other = nn.Parameter(torch.zeros(2, dtype=torch.long), requires_grad=False)
    with pytest.raises(UserError, match="GPT2MLP.other is torch.int64"):
        stack_levels(model, PERIODS, by="chain")
    assert not any("deltas" in name for name in model.state_dict())
    assert all(p.requires_grad for p in model.parameters() if p.is_floating_point())
    with pytest.raises(UserError, match=r"BloomMLP reads \['hidden_states', 'residual'\]"):
        stack_levels(hf.BloomForCausalLM(hf.BloomConfig(**options)), PERIODS, by="chain")


def test_a_chain_drops_nothing_out_and_gives_dropout_back():
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**{**GPT2, "resid_pdrop": 0.1, "embd_pdrop": 0, "attn_pdrop": 0})).eval()
    before = logits(model)
    with pytest.warns(UserWarning, match="GPT2MLP.dropout drops out with p=0.1: in a chain it does not"):
        stack_levels(model, PERIODS, by="chain")
    assert torch.equal(logits(model), before)
    assert torch.equal(model.transformer.h[0].mlp.train()(IDS[..., None].float().expand(2, 12, 16)),
                       model.transformer.h[0].mlp.eval()(IDS[..., None].float().expand(2, 12, 16)))  # fmt: skip
    assert {block.mlp.dropout.p for block in unstack(model).transformer.h} == {0.1}


def test_bfloat16_weights_learn_from_steps_too_small_for_them():
    def run(dtype, **options):
        model = stack_levels(build("llama", torch.bfloat16).to(dtype), [16, math.inf])
        start = weights(model)
        train(model, optimizer(model, lr=5e-3, **options), 40)
        names = next(iter(stacked_levels(model).values()))
        return torch.cat([(weights(model)[own].float() - start[own].float()).flatten() for own in names])

    exact, kept, lost = run(torch.float32), run(torch.bfloat16, keep_rounding=True), run(torch.bfloat16)
    share = [float(way @ exact / (exact @ exact)) for way in (kept, lost)]  # of the exact way, what was gone
    assert share[0] > 0.9 and share[1] < 0.4
