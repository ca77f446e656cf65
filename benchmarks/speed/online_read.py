"""Cost of reading with levels that learn in context, beside the forward pass alone of the same model, taking turns.

    python benchmarks/speed/online_read.py --out benchmarks/results/online-read.json

Models: HOPE, the same with ``memory={"recompute": False}`` (it keeps what its backward pass needs), and a
Llama whose MLPs are stacked into levels; random weights, one stream. Four levels, of the periods given. The forward
alone reads the same tokens in the same segments with the same cache, without gradients. A turn reads as many tokens as
the slowest period, so that every level changes in it. Generation is greedy, from the same context, by
the model as it is and by the adapted one. Every figure is the median over the turns, a ratio the median of the ratios
within a turn. On one thread it is the core's time that counts, so that other processes do not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nestlearn import HopeConfig, HopeForCausalLM, OnlineLearner, online_levels, stack_levels
from nestlearn.continual.context import read_cache, write_cache

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.quality.common import about

VOCABULARY = 1024


def hope(periods: list[int], width: int, **memory: Any) -> nn.Module:
    config = HopeConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=4 * width, levels=periods, memory=memory,
    )  # fmt: skip
    return HopeForCausalLM(config).eval()


def llama(periods: list[int], width: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=8, num_attention_heads=4,
        intermediate_size=3 * width, max_position_embeddings=max(periods),
    )  # fmt: skip
    return stack_levels(LlamaForCausalLM(config).eval(), periods, by="depth")


MODELS: dict[str, Callable[[list[int], int], nn.Module]] = {
    "hope": hope,
    "hope-recompute-off": lambda periods, width: hope(periods, width, recompute=False),
    "llama": llama,
}


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@torch.no_grad()
def forward_alone(model: Any, tokens: Tensor, segment: int) -> float:
    """Seconds of reading in segments, the cache going on."""
    begin, context = clock(), None
    for start in range(0, tokens.shape[1], segment):
        cache = write_cache(context, model)
        out = model(input_ids=tokens[:, start : start + segment], past_key_values=cache, use_cache=True)
        context = read_cache(out.past_key_values)
    return clock() - begin


def seconds(act: Callable[[], Any]) -> float:
    begin = clock()
    act()
    return clock() - begin


def measure(name: str, periods: list[int], width: int, turns: int, **settings: Any) -> dict[str, Any]:
    """Medians over the turns; the first turn warms up and does not count."""
    torch.manual_seed(0)
    model: Any = MODELS[name](periods, width)
    levels = online_levels(model, lr=0.01, **settings)
    tokens = torch.randint(VOCABULARY, (1, max(periods)))
    options = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone, reading, frozen, adapted = [], [], [], []
    for _ in range(turns + 1):
        learner = OnlineLearner(model, levels)
        alone.append(forward_alone(model, tokens, periods[0]))
        reading.append(seconds(lambda learner=learner: learner.read(tokens)))
        learner.drop_context()
        still = OnlineLearner(model, [type(level)(**{**level.__dict__, "lr": 0.0}) for level in levels])
        still.read(tokens[:, :64])
        learner.read(tokens[:, :64])
        learner.generate(**options | {"max_new_tokens": 2})  # what is open is brought up to date before the clock runs
        frozen.append(seconds(lambda still=still: still.generate(**options)))
        adapted.append(seconds(lambda learner=learner: learner.generate(**options)))
    state, width_of = learner.state, {p: w.out * w.into * 4 for p, w in learner._plan.weights.items()}
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "adapting": sum(width_of.values()) // 4,
        "forward_us_per_token": 1e6 * statistics.median(alone[1:]) / tokens.shape[1],
        "read_us_per_token": 1e6 * statistics.median(reading[1:]) / tokens.shape[1],
        "read_over_forward": statistics.median(r / a for r, a in zip(reading[1:], alone[1:], strict=True)),
        "generate_over_frozen": statistics.median(a / f for a, f in zip(adapted[1:], frozen[1:], strict=True)),
        "state_bytes": state.sizes(),
        "adapting_bytes": sum(width_of.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--periods", nargs="+", type=int, default=[256, 512, 1024, 2048])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rule", default="sgd")
    parser.add_argument("--spike", type=float, default=6.0, help="inf: no copy of the last good state")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.models:
        rows.append(measure(name, args.periods, args.width, args.turns, rule=args.rule, spike=args.spike))
        print(json.dumps(rows[-1]), flush=True)
    if args.out:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"}
        args.out.write_text(json.dumps({"about": about(), "settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
