"""What stays of new facts and new languages when the text is gone: a model that was trained to keep it in its levels.

    python benchmarks/quality/lasting.py train --out runs/lasting
    python benchmarks/quality/lasting.py facts --out runs/lasting --json facts.json
    python benchmarks/quality/lasting.py train --out runs/lasting --text languages
    python benchmarks/quality/lasting.py languages --out runs/lasting --json languages.json

train      a small model learns the form: articles on made-up people, then questions and answers, all in its context
           ("base"). Three models go on from it with equal tokens, on sequences whose questions come when the articles
           are out of the context: "none", as ever; "first" and "exact", through the inner steps (continual/meta.py)
facts      each reads articles on people that it was never trained on, once, and is asked with its context emptied: at
           once, and after other text; a frozen model also with an article before each question. By model, number of
           levels and lowest period: the levels change every p, 2 p and 4 p tokens; the rates are the learned ones times
           the best of ``--rates`` on other articles
languages  the same for a lesson in a language, then a lesson in another one

With ``--top N`` the levels are MLPs of N units each in the last block alone, and the other MLPs learn in training only:
no memory lies above them, so that HOPE's own loop does for exact steps. ``--start`` goes on from any trained model;
``--spread s`` trains levels that change every p, s p and s² p tokens.

Measured: the share of right answers of 4 (fewest nats wins), and the margin, mean nats of the wrong answers minus nats
of the right one: finer, as it moves before the share does. What a frozen model scores is what can be guessed.
Every finished model and reader is saved; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.quality.common import about
from benchmarks.quality.lasting_text import (
    TESTED,
    TUNED,
    Asked,
    Sequences,
    asked,
    encode,
    other_text,
    own_words,
    tokenizer,
    translation,
)
from nestlearn import HopeConfig, HopeForCausalLM, MetaLearner, OnlineLearner, OnlineLevel, online_levels
from nestlearn.continual.facts import Entry, encyclopaedia
from nestlearn.continual.languages import invent, lesson, meanings
from nestlearn.train.build import build_optimizer
from nestlearn.train.config import TrainConfig
from nestlearn.train.step import learning_rate, set_learning_rate

Result = dict[str, Any]
Batches = Callable[[float], tuple[Tensor, Tensor]]  # of the share of the steps that are done: tokens, answers
ORDERS = ("none", "first", "exact")
LEVELS = ("fast", "middle", "slow")
CHOICES, SIZES = 4, (4, 8, 16)  # answers of a question; people of an encyclopaedia
MEMORY = {"retain_start": 0.998}  # names are repeated after dozens of tokens


def make_model(args: argparse.Namespace, words: int | None = None, **settings: Any) -> HopeForCausalLM:
    torch.manual_seed(args.seed)
    levels: list[Result] = [{"name": name, "period": n + 1} for n, name in enumerate(LEVELS)]  # step at every step
    if args.top:
        above = {"layers": 1 / args.layers, "hidden_size": args.top}
        levels = [*(level | above for level in levels), {"name": "still", "period": len(LEVELS) + 1}]
    once = bool(args.top)  # of levels in the last block alone, no memory is differentiated twice
    memory = MEMORY | {"hidden_width": args.memory, "recompute": once}
    told: dict[str, Any] = {
        "vocab_size": words or tokenizer().get_vocab_size(), "hidden_size": args.width,
        "num_hidden_layers": args.layers, "num_attention_heads": args.heads,
        "intermediate_size": 4 * args.width + len(LEVELS) * args.top, "mixer": args.mixer, "levels": levels,
        "initializer_range": args.width**-0.5, "memory": memory if args.mixer == "self_modifying" else None,
    }  # fmt: skip
    return HopeForCausalLM(HopeConfig(**told | settings))


def forbidden() -> frozenset[str]:
    """The made-up words of all articles that are tested or tuned on."""
    books = [encyclopaedia(seed, size, CHOICES) for seed in (*TESTED, *TUNED) for size in SIZES]
    return frozenset().union(*(own_words(entry) for book in books for entry in book))


def train(learner: MetaLearner, batches: Batches, steps: int, rate: float) -> Result:
    """AdamW. Returns the mean nats of the last tenth."""
    model = cast(nn.Module, learner.model).train()
    config = TrainConfig("lasting", tokens=steps * 1000, learning_rate=rate)
    optimizer, rates = build_optimizer(config, model), torch.optim.Adam([learner.log_rates], lr=0.03)
    begin, recent = time.process_time(), []
    for step in range(1, steps + 1):
        ids, answers = batches((step - 1) / steps)
        nats = learner.backward(ids, rate_scale=min(1.0, 50 * step / steps))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_learning_rate(optimizer, learning_rate(config, step * 1000))
        optimizer.step(tokens=1000)
        rates.step()
        optimizer.zero_grad()
        rates.zero_grad()
        recent = [*recent, (float(nats.mean()), float(nats[answers[:, 1:]].mean()))][-max(1, steps // 10) :]
        if step % max(1, steps // 10) == 0:
            every, own = (round(sum(part) / len(recent), 4) for part in zip(*recent, strict=True))
            print(f"  step {step}: {every} nats, {own} of answers, {time.process_time() - begin:.0f} s", flush=True)
    model.eval()
    every, own = (round(sum(part) / len(recent), 4) for part in zip(*recent, strict=True))
    return {"nats": every, "nats_of_answers": own, "processor_seconds": round(time.process_time() - begin)}


def train_all(args: argparse.Namespace) -> None:
    """The base, then what goes on from it."""
    if not (args.start or folder(args, "base").exists()):
        learner = MetaLearner(make_model(args), online_levels(make_model(args), lr=0.0))
        done = train(learner, base_batches(args), args.base_steps, args.base_rate)
        save(learner, folder(args, "base"), done, args)
    for order in args.orders:
        if not folder(args, order).exists():
            print(order, flush=True)
            learner = go_on(order, args)
            done = train(learner, later_batches(args), args.steps, args.rate)
            save(learner, folder(args, order), done, args)


def base_batches(args: argparse.Namespace) -> Batches:
    """All in one context: one article, or a dictionary and the first sentences, then questions."""
    if args.text == "languages":
        draw = Sequences(args.seed, args.base_length // 3, frozenset())
        return lambda _: draw.lessons(args.base_batch, 2)
    draw = Sequences(args.seed, args.base_length, forbidden())
    return lambda _: draw.batch(args.base_batch, 1, length=args.base_length)


def later_batches(args: argparse.Namespace) -> Batches:
    """Questions a period or more later; a lesson takes two periods more than the curriculum's number."""
    draw = Sequences(args.seed + 1, args.period, forbidden())

    def batches(share: float) -> tuple[Tensor, Tensor]:
        size, apart = args.curriculum[int(share * len(args.curriculum))]
        if args.text == "languages":
            return draw.lessons(args.batch, size + 2)
        return draw.batch(args.batch, size, apart)

    return batches


def go_on(order: str, args: argparse.Namespace) -> MetaLearner:
    """From the base, or what ``--start`` names, with the rates learned there. Of "none" no level is active, and the
    context is never emptied: ordinary training."""
    start = args.start or folder(args, "base")
    model = HopeForCausalLM.from_pretrained(start)
    if order == "none":
        return MetaLearner(model, online_levels(model, lr=0.0), context=math.inf)
    levels = in_context(online_levels(model, bound=math.inf))
    rates = [rate or args.inner_rate for rate in json.loads((start / "done.json").read_text())["rates"]]
    levels = [
        replace(level, period=args.period * args.spread**n, lr=rate)
        for n, (level, rate) in enumerate(zip(levels, rates, strict=True))
    ]
    return MetaLearner(model, levels, order=order, context=args.period)


def in_context(levels: Sequence[OnlineLevel]) -> list[OnlineLevel]:
    """Without the one that learns in training alone."""
    return [level for level in levels if level.name in LEVELS]


def folder(args: argparse.Namespace, order: str) -> Path:
    return args.out / f"{args.text}-{args.mixer}-{args.seed}" / order


def save(learner: MetaLearner, path: Path, done: Result, args: argparse.Namespace) -> None:
    learner.model.save_pretrained(path)  # pyright: ignore
    told = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    done |= {"rates": [round(level.lr, 4) for level in in_context(learner.levels)], "settings": told} | about()
    (path / "done.json").write_text(json.dumps(done) + "\n")


class Reader:
    """Streams that one trained model reads with ``count`` levels, the fastest changed every ``lowest`` tokens."""

    def __init__(self, path: Path, count: int, lowest: int, scale: float, args: argparse.Namespace) -> None:
        self.model = HopeForCausalLM.from_pretrained(path).eval()
        rates = json.loads((path / "done.json").read_text())["rates"]
        rates = rates if any(rates) else [args.inner_rate] * len(rates)
        levels = in_context(online_levels(self.model, bound=math.inf, spike=math.inf))
        made = [
            replace(level, period=lowest * 2**n, lr=rate * scale if n < count else 0.0)
            for n, (level, rate) in enumerate(zip(levels, rates, strict=True))
        ]
        self.learner = OnlineLearner(self.model, made, context=args.period)

    def read(self, rows: Sequence[Sequence[int]]) -> None:
        """Tokens of each stream, of equal lengths."""
        self.learner.read(torch.tensor([list(row) for row in rows]))

    def weights(self, row: int) -> dict[str, Tensor]:
        """W + Σ Δ of a stream, by the names of the model's parameters; nothing before the first token."""
        found: dict[str, Tensor] = {}
        if not self.learner.state.tokens:
            return found
        for level, state in zip(self.learner.levels, self.learner.state.levels, strict=True):
            for path, delta in zip(level.weights if level.active else (), state.deltas, strict=False):
                own = cast(Tensor, self.model.get_submodule(path).weight).detach()
                found[f"{path}.weight"] = found.get(f"{path}.weight", own) + delta.matrix()[row]
        return found

    def answers(self, questions: Sequence[Sequence[Asked]]) -> Result:
        """Share right and margin over all questions of each stream, by kind."""
        kinds: dict[str, list[tuple[bool, float]]] = {}
        for row, own in enumerate(questions):
            for question, nats in zip(own, choices_nats(self.model, self.weights(row), own), strict=True):
                right, others = nats[question.right], [n for i, n in enumerate(nats) if i != question.right]
                pair = (right < min(others), sum(others) / len(others) - right)
                kinds.setdefault(question.kind, []).append(pair)
        return {kind: {"right": mean(own, 0), "margin": mean(own, 1)} for kind, own in kinds.items()}


def mean(pairs: Sequence[tuple[float, float]], part: int) -> float:
    return round(sum(pair[part] for pair in pairs) / len(pairs), 4)


@torch.no_grad()
def choices_nats(model: nn.Module, weights: Mapping[str, Tensor], questions: Sequence[Asked]) -> list[list[float]]:
    """Nats of every answer of every question after its prompt, with no other context."""
    pairs = [(q.prompt, answer) for q in questions for answer in q.answers]
    flat: list[float] = []
    for at in range(0, len(pairs), 128):
        part = pairs[at : at + 128]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(a + b) for a, b in part], batch_first=True)
        logits = torch.func.functional_call(model, dict(weights), (ids,), {"use_cache": False}).logits
        nats = nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
        flat += [float(row[len(a) - 1 :][: len(b)].sum()) for row, (a, b) in zip(nats, part, strict=True)]
    found = iter(flat)
    return [[next(found) for _ in q.answers] for q in questions]


def read_facts(reader: Reader, seeds: Sequence[int], args: argparse.Namespace) -> Result:
    """Articles of an encyclopaedia for each seed, a stream each; then ``args.later`` tokens of other text."""
    books = [encyclopaedia(seed, max(args.people, CHOICES), CHOICES)[: args.people] for seed in seeds]
    questions = [[asked(q) for entry in book for q in entry.questions] for book in books]
    articles = [encode("".join(entry.article for entry in book)) for book in books]
    other = encode(other_text(random.Random(seeds[0]), 20))
    end = -(-max(map(len, articles)) // args.whole) * args.whole
    reader.read([own + other[: end - len(own)] for own in articles])
    found = {"after": reader.answers(questions)}
    if not any(level.active for level in reader.learner.levels):
        found["in_context"] = reader.answers([after_article(book[:4]) for book in books])
    reader.read([other[-args.later :]] * len(books))
    return found | {"later": reader.answers(questions), "tokens": max(map(len, articles))}


def after_article(entries: Sequence[Entry]) -> list[Asked]:
    """Their questions, each right after the article: what a model can read out of its context."""
    told = [(encode(entry.article), asked(q)) for entry in entries for q in entry.questions]
    return [replace(q, prompt=article + q.prompt) for article, q in told]


def read_languages(reader: Reader, seeds: Sequence[int], args: argparse.Namespace) -> Result:
    """Rows: before, after the first, after the second lesson; in each, the answers in both languages."""
    pairs = [invent(seed) for seed in seeds]
    taught, said = meanings(seeds[0], args.sentences), meanings(seeds[0] + 1, args.asked)
    found: Result = {}

    def ask(when: str) -> None:
        found[when] = [
            reader.answers([[translation(pair[i], said, at) for at in range(len(said))] for pair in pairs])
            for i in range(2)
        ]

    ask("before")
    for i, when in enumerate(("after the first", "after the second")):
        lessons = [encode(lesson(pair[i], taught)) for pair in pairs]
        length = min(map(len, lessons)) // args.whole * args.whole
        reader.read([own[:length] for own in lessons])
        ask(when)
    return found


BENCHMARKS: dict[str, Callable[[Reader, Sequence[int], argparse.Namespace], Result]] = {
    "facts": read_facts, "languages": read_languages,
}  # fmt: skip


def kinds(args: argparse.Namespace) -> list[tuple[str, int, int]]:
    """Model, number of levels, lowest period; without levels there is but one period."""
    return [
        (order, count, lowest)
        for order in args.orders
        for count in args.counts
        for lowest in (args.periods if count else args.periods[:1])
    ]


def tuned(order: str, count: int, lowest: int, args: argparse.Namespace) -> float:
    """The multiple of the learned rates whose margin is widest, on articles or lessons that are not tested on."""
    if not count or len(args.rates) == 1:
        return args.rates[0]
    margins = {}
    for scale in args.rates:
        found = BENCHMARKS[args.stage](Reader(folder(args, order), count, lowest, scale, args), TUNED, args)
        margins[scale] = sum(own["margin"] for own in _own(found))
    return max(margins, key=lambda scale: margins[scale])


def _own(found: Result) -> list[Result]:
    """What rates are chosen by: everything that is asked after reading, of languages that of the one just read."""
    if "later" in found:
        return [*found["after"].values(), *found["later"].values()]
    return [*found["after the first"][0].values(), *found["after the second"][1].values()]


def measure(args: argparse.Namespace) -> Result:
    """Every reader that the file does not hold yet, which grows by each."""
    path: Path = args.json
    found: Result = json.loads(path.read_text()) if path.exists() else {**about(), "models": {}, "results": {}}
    for order in args.orders:
        found["models"][f"{args.text}-{args.mixer}-{args.seed} {order}"] = json.loads(
            (folder(args, order) / "done.json").read_text()
        )
    for order, count, lowest in kinds(args):
        name = f"{args.text}-{args.mixer}-{args.seed} {order} levels-{count} {lowest}"
        name += f" people-{args.people}" if args.stage == "facts" else ""
        if name in found["results"]:
            continue
        begin, scale = time.process_time(), tuned(order, count, lowest, args)
        result = BENCHMARKS[args.stage](
            Reader(folder(args, order), count, lowest, scale, args), TESTED[: args.streams], args
        )
        found["results"][name] = {"rate_scale": scale, **result, "seconds": round(time.process_time() - begin)}
        path.write_text(json.dumps(found) + "\n")
        print(f"{name}: {json.dumps(found['results'][name])}", flush=True)
    return found


def stage(text: str) -> tuple[int, int]:
    """ "4+1" to (4, 1), "4" to (4, 0)."""
    people, _, apart = text.partition("+")
    return int(people), int(apart or 0)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", *BENCHMARKS])
    parser.add_argument("--out", type=Path, required=True, help="folder of the models")
    parser.add_argument("--json", type=Path, help="readers that it holds are not run again")
    parser.add_argument("--mixer", default="transformer", help="also self_modifying, which is HOPE")
    parser.add_argument(
        "--orders",
        nargs="+",
        choices=["base", *ORDERS],
        default=list(ORDERS),
        help="facts and languages also take base",
    )
    parser.add_argument("--text", choices=list(BENCHMARKS), help="that the models are trained on; the stage's own")
    whole = {"--seed": 0, "--width": 64, "--layers": 3, "--heads": 4, "--top": 0, "--memory": 16, "--spread": 1,
             "--base-steps": 1000, "--base-batch": 8, "--base-length": 384,
             "--steps": 260, "--batch": 8, "--period": 160, "--streams": len(TESTED),
             "--later": 1920, "--whole": 640, "--sentences": 80, "--asked": 24}  # fmt: skip
    for name, default in whole.items():
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--start", type=Path, help="folder of the model that training goes on from; None: the base")
    parser.add_argument("--people", type=int, choices=(1, 2, *SIZES), default=4, help="whose articles are read")
    parser.add_argument("--base-rate", type=float, default=3e-3)
    parser.add_argument("--rate", type=float, default=2e-3, help="of AdamW, when going on")
    parser.add_argument("--inner-rate", type=float, default=0.5, help="that the learned ones start from")
    parser.add_argument(
        "--curriculum", type=stage, nargs="+", default=[(1, 0), (1, 0), (2, 0), (2, 1), (4, 1)],
        help="people+periods of other text before they are asked, in equal shares of the steps",
    )  # fmt: skip
    parser.add_argument("--periods", type=int, nargs="+", default=[160, 640, 2560], help="lowest ones, tokens")
    parser.add_argument("--counts", type=int, nargs="+", default=list(range(len(LEVELS) + 1)), help="of levels")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 3.0], help="multiples of the learned rates")
    args = parser.parse_args(argv)
    args.text = args.text or (args.stage if args.stage in BENCHMARKS else "facts")
    return args


def main() -> None:
    torch.set_num_threads(1)
    args = arguments()
    if args.stage == "train":
        train_all(args)
    else:
        measure(args)


if __name__ == "__main__":
    main()
