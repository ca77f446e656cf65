"""``nestlearn compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from nestlearn.commands.common import shown

DEFAULT_OUT = Path("runs") / "compare"


def compare(
    models: Annotated[tuple[str, ...], shown("NAME,…", "hope,transformer,retnet,deltanet,gated_deltanet,titans")] = (),
    params: Annotated[str, shown("N", "3M")] = "3M",
    tokens: Annotated[str, shown("N", "5M")] = "5M",
    text: Annotated[tuple[str, ...], shown("PATH …", "the Python standard library's source")] = (),
    held_out: Annotated[tuple[str, ...], shown("PATH …", "a part of the text")] = (),
    tokenizer: Annotated[str, shown("SPEC", "bytes")] = "bytes",
    seeds: Annotated[int, shown("N", "3")] = 3,
    rates: Annotated[tuple[str, ...], shown("RATE,…", "2e-3,4e-3,8e-3")] = (),
    tune_tokens: Annotated[str | None, shown("N", "a fifth of the tokens")] = None,
    online_rates: Annotated[tuple[str, ...], shown("RATE,…", "none: not measured")] = (),
    online_period: Annotated[int, shown("N", "128")] = 128,
    out: Annotated[Path, shown("DIR", "runs/compare")] = DEFAULT_OUT,
    overrides: Annotated[tuple[str, ...], shown("KEY=VALUE …", "none", name="set")] = (),
) -> None:
    """Train models of equal size on equal text, each at its best learning rate, and write a table and a page.

    The same command again goes on where it was stopped.

    Args:
        models: hope, hope_attention, transformer or any mixer; NAME:key=value,key=value changes a model's settings.
        params: Parameters of every model, within 2 %; the feed-forward width is solved for it.
        tokens: How many each is trained on, for example 20k or 5M.
        text: Files and folders of .txt .md .py .jsonl .parquet, also .gz and .xz.
        held_out: Files and folders to measure on; then all of --text is trained on.
        tokenizer: bytes, a tokenizers JSON file or a Hugging Face folder.
        seeds: How many times each is trained, with other initial weights and another order of the text.
        rates: Learning rates to choose from; one beyond is tried where the best is at the edge.
        tune_tokens: How many tokens a rate is tried on.
        online_rates: Also read every held-out document as one stream, as trained and while the model's levels learn
            from it in context, at the best of these rates.
        online_period: Tokens from one change of the levels to the next; slower levels keep their own period.
        out: A folder, new, empty, or of the same comparison.
        overrides: Any other setting, for all models, as key=value, for example batch_size=16 model.hidden_size=192.
    """
    from rich.console import Console

    from nestlearn.compare.contenders import split_labels
    from nestlearn.compare.plan import MODELS, RATES, make_plan, parse_rates
    from nestlearn.compare.run import run_comparison
    from nestlearn.train.config import parse_count

    given = {"text": text, "held_out": held_out, "tokenizer": tokenizer, "tokens": parse_count(tokens)}
    plan = make_plan(
        split_labels(models) if models else MODELS,
        parse_count(params, "parameters"),
        given,
        seeds=seeds,
        rates=parse_rates(rates) if rates else RATES,
        tune_tokens=parse_count(tune_tokens) if tune_tokens else None,
        online_rates=parse_rates(online_rates, "--online-rates"),
        online_period=online_period,
        overrides=overrides,
    )
    console = Console()
    run_comparison(plan, out, lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))
    console.print(f"page: {out / 'compare.html'}", markup=False, highlight=False, soft_wrap=True)
