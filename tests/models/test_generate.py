"""generate() with the state as its cache: the same sequences as without one, whatever the mode of decoding."""

import pytest
import torch
from transformers import DynamicCache

from nestlearn import HopeConfig
from nestlearn.errors import UserError
from nestlearn.models.hf import HopeCache
from tests.contracts.model import gap, large, read, tokens
from tests.models.test_contract import SMALL


@pytest.fixture(scope="module", params=["self_modifying", "attention"])
def model(request):
    memory = {"chunk": 8, "memory_chunk": 4}
    return large(HopeConfig(**{**SMALL, "mixer": request.param, "memory": memory}))


@pytest.fixture(scope="module")
def ids(model):
    return tokens(model.config, 2, 21)


def left_padded(ids):
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :6], mask[1, :6] = 0, 0
    return padded, mask


def both(model, ids, **how):
    """The sequences with and without a cache."""
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(model.generate(ids, max_new_tokens=9, use_cache=use_cache, **how))
    return results


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.3},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 4, "do_sample": False},
        {"num_beams": 4, "num_return_sequences": 3, "do_sample": False},
        {"num_beams": 3, "do_sample": True},
        {"do_sample": False, "eos_token_id": list(range(20)), "pad_token_id": 0},
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_with_and_without_a_cache(model, ids, how, padded):
    if padded:
        ids, mask = left_padded(ids)
        how = how | {"attention_mask": mask}
    with_cache, without = both(model, ids, **how)
    assert torch.equal(with_cache, without)
    assert with_cache.shape[0] == len(ids) * how.get("num_return_sequences", 1)


def test_left_padding_equals_no_padding(model, ids):
    padded, mask = left_padded(ids)
    for how in ({}, {"num_beams": 3}):
        together = model.generate(padded, attention_mask=mask, max_new_tokens=9, do_sample=False, **how)
        alone = model.generate(ids[1:, 6:], max_new_tokens=9, do_sample=False, **how)
        assert torch.equal(together[1, 6:], alone[0])


def test_beams_are_better_than_greed(model, ids):
    """Beams really follow their own states: the best beam is at least as probable as the greedy sequence."""

    def score(sequence):
        logits = model(sequence).logits[:, ids.shape[1] - 1 : -1].log_softmax(-1)
        return logits.gather(-1, sequence[:, ids.shape[1] :, None]).sum()

    with torch.no_grad():
        greedy, beam = (model.generate(ids[:1], max_new_tokens=6, do_sample=False, num_beams=n) for n in (1, 8))
        assert score(beam) >= score(greedy)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_goes_on_from_a_given_state_without_changing_it(model, ids, how):
    expected = model.generate(ids, max_new_tokens=7, do_sample=False, **how)
    with torch.no_grad():
        _, cache = read(model, ids[:, :15])
    before = cache.state.clone()
    everything = torch.ones_like(ids)
    for given, mask in ((ids, None), (ids[:, 15:], everything)):
        for _ in range(2):
            got = model.generate(
                given, attention_mask=mask, past_key_values=cache, max_new_tokens=7, do_sample=False, **how
            )
            assert torch.equal(got[:, -7:], expected[:, -7:])
    assert cache.get_seq_length() == 15
    assert all(torch.equal(a, b) for a, b in zip(before.tensors(), cache.state.tensors(), strict=True))


def test_returns_the_state_after_all_tokens_but_the_last(model, ids):
    out = model.generate(
        ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_hidden_states=True
    )
    cache = out.past_key_values
    assert isinstance(cache, HopeCache) and cache.get_seq_length() == ids.shape[1] + 4
    with torch.no_grad():
        logits, _ = read(model, out.sequences[:, -1:], cache)
        assert gap(logits[:, 0], model(out.sequences).logits[:, -1]) <= 1e-10
    assert len(out.hidden_states[0]) == model.config.num_hidden_layers + 1


def test_generates_from_embeddings(model, ids):
    embedded = model.get_input_embeddings()(ids)
    got = model.generate(inputs_embeds=embedded, max_new_tokens=6, do_sample=False)
    assert torch.equal(got, model.generate(ids, max_new_tokens=6, do_sample=False)[:, ids.shape[1] :])


def test_refuses_what_would_be_silently_wrong(model, ids):
    with torch.no_grad():
        _, cache = read(model, ids[:, :15])
    right = torch.ones_like(ids)
    right[0, -2:] = 0
    wrong = [
        ({"attention_mask": right}, "pad on the left"),
        ({"past_key_values": cache, "use_cache": False}, "use_cache=True"),
        ({"past_key_values": DynamicCache()}, "HopeCache"),
        ({"past_key_values": HopeCache(cache.state[0], 15)}, "1 streams"),
    ]
    for how, message in wrong:
        with pytest.raises(UserError, match=message):
            model.generate(ids, max_new_tokens=2, do_sample=False, **how)
    with pytest.raises(UserError, match="all token ids so far"):
        model.generate(ids[:, 15:], past_key_values=cache, max_new_tokens=2, do_sample=False)
    with pytest.raises(UserError, match="does not roll back"):
        cache.crop(3)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids[:1], prompt_lookup_num_tokens=2, max_new_tokens=4)
