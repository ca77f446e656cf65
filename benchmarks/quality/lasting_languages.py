"""Two small languages, read one after the other, by a model that was trained to keep what it reads in its levels.

    python benchmarks/quality/lasting_languages.py train --out runs/lasting
    python benchmarks/quality/lasting_languages.py measure --out runs/lasting --json languages.json

A language has words for ``--nouns`` of 32 nouns and ``--verbs`` of 16 verbs, and an order of subject, verb and object.
Each is one token, of a stock of 64 that all languages share. What a word means is drawn anew for each language, so that
only the lesson can tell: a dictionary, then its lines again and sentences with their English, mixed.

train    a model first learns to learn a language in its context ("base": a lesson, then other sentences, every sequence
         in a language of its own; loss of English nouns and verbs, 0.02 of it of all else). From it go on, as ever
         ("none") and through the inner steps ("first", "exact"; continual/meta.py): lessons in one or two languages,
         the context emptied every period, then sentences of both, other than in the lessons
measure  lesson A, then lesson B, each read once; both languages are asked before, after A and after B, with an empty
         context. Beside the levels: "levels-0" is frozen; "in context" has what was read last in front of each
         question; "tuned-n" is a copy of the model for each stream, all its weights changed by AdamW at every period,
         n times over each lesson

Measured, on sentences that no lesson had: the share of right translations of 4; nats of the right English, which cost
who knows what can be said, but not the language, log(nouns · (nouns − 1) · verbs); nats of the sentence
itself; nats of the English of a word (at most log(nouns + verbs) for the same). Rates are chosen on other languages,
by the nats of words and of English in the language that was just read.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.quality import lasting
from benchmarks.quality.common import about
from benchmarks.quality.lasting_text import TESTED, TRAINED, TUNED
from nestlearn import HopeForCausalLM, online_levels
from nestlearn.continual.invented import words
from nestlearn.continual.languages import Language, Material, Meaning, english, invent, meanings

Result = dict[str, Any]
NOUNS = (
    "farmer", "dog", "king", "bird", "child", "boat", "tree", "wolf", "sister", "horse", "stone", "fish", "baker",
    "cat", "queen", "bear", "uncle", "ship", "flower", "fox", "brother", "cow", "rock", "frog", "miller", "hen",
    "tailor", "goat", "wagon", "sheep", "judge", "crow",
)  # fmt: skip
VERBS = (
    "hit", "cut", "put", "hurt", "shut", "cast", "let", "set", "split", "spread", "burst", "beat", "bid", "shed",
    "quit", "upset",
)  # fmt: skip
STOCK = words(random.Random(0), 64)
TOKEN = r"\n|\w+|[.:]"
FORM = ("\n", ".", ":", "In", "English", "the")
_KNOWN = [*FORM, *NOUNS, *VERBS, *STOCK, *(word.capitalize() for word in STOCK)]
VOCABULARY = {word: i for i, word in enumerate(_KNOWN)}
Answers = list[tuple[list[int], list[list[int]]]]  # prompt, and the answers to choose from, the right one first


@dataclass(frozen=True)
class Text:
    """Lessons and questions in tokens."""

    nouns: int
    verbs: int
    period: int

    def encode(self, text: str) -> list[int]:
        return [VOCABULARY[word] for word in re.findall(TOKEN, text)]

    def languages(self, seed: int, count: int) -> tuple[list[Language], list[Meaning]]:
        """Languages that say the same things, and all these things, in random order."""
        draw = random.Random(seed)
        nouns = tuple(draw.sample(NOUNS, self.nouns))
        material = Material(nouns, tuple((verb, verb) for verb in draw.sample(VERBS, self.verbs)), plain=True)
        return invent(seed, count, material, STOCK), meanings(seed, self.count, material)

    @property
    def count(self) -> int:
        """How many different things can be said."""
        return self.nouns * (self.nouns - 1) * self.verbs

    def lesson(
        self, draw: random.Random, language: Language, said: Sequence[Meaning], periods: int, words: float = 0.5
    ) -> list[int]:
        """The dictionary, then its lines again and sentences with their English, mixed: so many tokens."""
        words_first = "".join(f"{own} {known}.\n" for known, own in language.lexicon.items())
        ids, end = self.encode(words_first), periods * self.period
        while len(ids) < end:
            prompt, answer = self.line(draw, language, said, words)
            ids += prompt + answer
        return ids[:end]

    def line(
        self, draw: random.Random, language: Language, said: Sequence[Meaning], words: float
    ) -> tuple[list[int], list[int]]:
        """A word or, of the share 1 − ``words``, a sentence, and its English."""
        if draw.random() < words:
            known, own = draw.choice([*language.lexicon.items()])
            return self.encode(own), self.encode(f"{known}.\n")
        prompt, choices = self.translations(language, [draw.choice(said)])[0]
        return prompt, choices[0]

    def translations(self, language: Language, said: Sequence[Meaning]) -> Answers:
        found = []
        for at, meaning in enumerate(said):
            others = [said[(at + step) % len(said)] for step in range(4)]
            prompt = f"In {language.name}: {language.say(meaning)}. In English:"
            found.append((self.encode(prompt), [self.encode(f"{english(m)}.\n") for m in others]))
        return found

    def words(self, language: Language) -> Answers:
        return [(self.encode(f"\n{own}"), [self.encode(f"{known}.")]) for known, own in language.lexicon.items()]

    def sentences(self, language: Language, said: Sequence[Meaning]) -> Answers:
        return [(self.encode(f"In {language.name}:"), [self.encode(f"{language.say(m)}.")]) for m in said]

    def batch(
        self, draw: random.Random, rows: int, count: int, periods: int, words: float = 0.5
    ) -> tuple[Tensor, Tensor]:
        """Lessons in ``count`` languages, then a period of questions in all of them: tokens (rows, N + 1), answers."""
        made, told = [], []
        for _ in range(rows):
            languages, said = self.languages(TRAINED + draw.randrange(2**30), count)
            taught, new = said[: 2 * self.count // 3], said[2 * self.count // 3 :]
            ids = [token for own in languages for token in self.lesson(draw, own, taught, periods, words)]
            answers, end = [False] * len(ids), len(ids) + self.period + 1
            while len(ids) < end:
                prompt, answer = self.line(draw, draw.choice(languages), new, words)
                ids += prompt + answer
                answers += [False] * len(prompt) + [True] * (len(answer) - 1) + [False]
            made.append(ids[:end])
            told.append(answers[:end])
        return torch.tensor(made), torch.tensor(told)


class InOneContext:
    """What ``lasting.train`` asks of a MetaLearner, for the base: no levels, and a loss of English words above all."""

    def __init__(self, model: HopeForCausalLM) -> None:
        self.model, self.levels = model, online_levels(model, lr=0.0)
        self.log_rates = nn.Parameter(torch.zeros(0))
        self._weight = torch.tensor([1.0 if word in {*NOUNS, *VERBS} else 0.02 for word in VOCABULARY])

    def backward(self, tokens: Tensor, rate_scale: float = 1.0) -> Tensor:
        logits, targets = self.model(input_ids=tokens[:, :-1], use_cache=False).logits, tokens[:, 1:]
        F.cross_entropy(logits.mT, targets, weight=self._weight).backward()
        return F.cross_entropy(logits.detach().mT, targets, reduction="none")


def train_all(args: argparse.Namespace) -> None:
    """The base, then what goes on from it."""
    text, base = text_of(args), lasting.folder(args, "base")
    if not (args.start or base.exists()):
        draw, learner = (
            random.Random(args.seed),
            InOneContext(lasting.make_model(args, len(VOCABULARY), initializer_range=0.08)),
        )
        done = lasting.train(
            cast(Any, learner),
            lambda share: (
                text.batch(draw, 2 * args.base_batch, 1, 0, 1.0)
                if share < args.alone
                else text.batch(draw, args.base_batch, 1, args.each)
            ),
            args.base_steps,
            args.base_rate,
        )
        lasting.save(cast(Any, learner), base, done, args)
    for order in args.orders:
        if order != "base" and not lasting.folder(args, order).exists():
            print(order, flush=True)
            learner = lasting.go_on(order, args)
            done = lasting.train(learner, later_batches(text, args), args.steps, args.rate)
            lasting.save(learner, lasting.folder(args, order), done, args)


def later_batches(text: Text, args: argparse.Namespace) -> lasting.Batches:
    """Words alone at first, then sentences with them, more and more of both kinds over ``args.alone_later``."""
    draw, counts = random.Random(args.seed + 1), args.curriculum

    def batches(share: float) -> tuple[Tensor, Tensor]:
        words = max(0.5, 1 - share / (2 * args.alone_later)) if args.alone_later else 0.5
        return text.batch(draw, args.batch, counts[int(share * len(counts))], args.each, words)

    return batches


def text_of(args: argparse.Namespace) -> Text:
    return Text(args.nouns, args.verbs, args.period)


class Levels:
    """Streams that a trained model reads with ``count`` levels; 0: frozen."""

    def __init__(self, order: str, count: int, scale: float, args: argparse.Namespace) -> None:
        self.reader = lasting.Reader(lasting.folder(args, order), count, args.period, scale, args)

    def read(self, rows: Sequence[list[int]]) -> None:
        self.reader.read(rows)

    def nats(self, row: int, asked: Answers) -> list[list[float]]:
        return _nats(self.reader.model, self.reader.weights(row), asked)


class InContext:
    """The base, with what was read last in front of each question: the end of it that the base's context takes."""

    def __init__(self, order: str, args: argparse.Namespace) -> None:
        self.model = HopeForCausalLM.from_pretrained(lasting.folder(args, order)).eval()
        self.length, self.rows = args.each * args.period, [[] for _ in range(args.streams)]

    def read(self, rows: Sequence[list[int]]) -> None:
        self.rows = [row[-self.length :] for row in rows]

    def nats(self, row: int, asked: Answers) -> list[list[float]]:
        return _nats(self.model, {}, [(self.rows[row] + prompt, answers) for prompt, answers in asked])


class Tuned:
    """A copy of the base for each stream, changed by AdamW at every period, ``passes`` times over what is read."""

    def __init__(self, order: str, passes: int, rate: float, args: argparse.Namespace) -> None:
        self.start = HopeForCausalLM.from_pretrained(lasting.folder(args, order)).eval()
        self.models: list[HopeForCausalLM] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.passes, self.period, self.rate = passes, args.period, rate

    def read(self, rows: Sequence[list[int]]) -> None:
        if not self.models:
            self.models = [copy.deepcopy(self.start) for _ in rows]
            self.optimizers = [torch.optim.AdamW(m.parameters(), self.rate, weight_decay=0.0) for m in self.models]
        for model, optimizer, row in zip(self.models, self.optimizers, rows, strict=True):
            for piece in torch.tensor(row).split(self.period) * self.passes:
                loss = model(input_ids=piece[None], labels=piece[None]).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def nats(self, row: int, asked: Answers) -> list[list[float]]:
        return _nats(self.models[row] if self.models else self.start, {}, asked)


Reader = Levels | InContext | Tuned


def _nats(model: Any, weights: dict[str, Tensor], asked: Answers) -> list[list[float]]:
    questions = [lasting.Asked("", prompt, answers, 0) for prompt, answers in asked]
    return lasting.choices_nats(model, weights, questions)


def in_sequence(reader: Reader, seeds: Sequence[int], args: argparse.Namespace) -> Result:
    """Before, after the first, after the second lesson: what both languages cost, a stream for each seed."""
    text, found = text_of(args), {}
    pairs, said = zip(*(text.languages(seed, 2) for seed in seeds), strict=True)
    split = text.count - args.asked
    length = args.lesson or args.each
    found["before"] = [_asked(reader, text, [p[i] for p in pairs], [s[split:] for s in said]) for i in range(2)]
    for i, when in enumerate(("after the first", "after the second")):
        draws = [random.Random(seed + i) for seed in seeds]
        reader.read([text.lesson(d, p[i], s[:split], length) for d, p, s in zip(draws, pairs, said, strict=True)])
        found[when] = [_asked(reader, text, [p[j] for p in pairs], [s[split:] for s in said]) for j in range(2)]
    return found


def _asked(reader: Reader, text: Text, languages: Sequence[Language], said: Sequence[list[Meaning]]) -> Result:
    found: dict[str, list[float]] = {"right": [], "english": [], "sentence": [], "word": []}
    for row, (language, new) in enumerate(zip(languages, said, strict=True)):
        for nats in reader.nats(row, text.translations(language, new)):
            found["right"].append(float(nats[0] < min(nats[1:])))
            found["english"].append(nats[0])
        found["sentence"] += [nats[0] for nats in reader.nats(row, text.sentences(language, new))]
        found["word"] += [nats[0] for nats in reader.nats(row, text.words(language))]
    return {kind: round(sum(own) / len(own), 4) for kind, own in found.items()}


def readers(args: argparse.Namespace) -> dict[str, tuple[Callable[[float], Reader], Sequence[float]]]:
    """How to make each, and the rates to choose from."""
    found: dict[str, tuple[Callable[[float], Reader], Sequence[float]]] = {}
    for order in args.orders:
        for count in args.counts:
            rates = args.rates if count else (1.0,)
            found[f"{order} levels-{count}"] = (lambda rate, o=order, c=count: Levels(o, c, rate, args), rates)
        if order in ("base", "none"):
            found[f"{order} in context"] = (lambda _, o=order: InContext(o, args), (1.0,))
            for passes in args.passes:
                name = f"{order} tuned-{passes}"
                found[name] = (lambda rate, o=order, p=passes: Tuned(o, p, rate, args), args.tuned_rates)
    return found


def measure(args: argparse.Namespace) -> Result:
    """Every reader that the file does not hold yet, which grows by each."""
    path: Path = args.json
    found: Result = json.loads(path.read_text()) if path.exists() else {**about(), "models": {}, "results": {}}
    run = lasting.folder(args, "").name
    for order in args.orders:
        found["models"][f"{run} {order}"] = json.loads((lasting.folder(args, order) / "done.json").read_text())
    for kind, (make, rates) in readers(args).items():
        name = f"{run} {kind} lesson-{args.lesson or args.each}"
        if name in found["results"]:
            continue
        begin, costs = time.process_time(), {}
        for rate in rates if len(rates) > 1 else ():
            tried = in_sequence(make(rate), TUNED, argparse.Namespace(**vars(args) | {"streams": len(TUNED)}))
            last = (tried["after the first"][0], tried["after the second"][1])
            costs[rate] = sum(own["english"] + own["word"] for own in last)
        rate = min(costs, key=lambda rate: costs[rate]) if costs else rates[0]
        own = in_sequence(make(rate), TESTED[: args.streams], args)
        found["results"][name] = {"rate": rate, **own, "seconds": round(time.process_time() - begin)}
        path.write_text(json.dumps(found) + "\n")
        print(f"{name}: {json.dumps(found['results'][name])}", flush=True)
    return found


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "measure"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the models")
    parser.add_argument("--json", type=Path, help="readers that it holds are not run again")
    parser.add_argument("--mixer", default="gated_delta", help="also transformer, and self_modifying, which is HOPE")
    parser.add_argument("--orders", nargs="+", choices=["base", *lasting.ORDERS], default=["base", "none", "exact"])
    parser.add_argument("--text", default="languages", help="the folder's name begins with it")
    whole = {"--seed": 0, "--width": 64, "--layers": 3, "--heads": 1, "--top": 0, "--memory": 16, "--spread": 1,
             "--base-steps": 1500, "--base-batch": 8, "--steps": 600, "--batch": 4, "--period": 96, "--each": 2,
             "--lesson": 0, "--nouns": 6, "--verbs": 3, "--streams": len(TESTED), "--asked": 24}  # fmt: skip
    for name, default in whole.items():
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--base-rate", type=float, default=3e-3)
    parser.add_argument("--alone", type=float, default=0.4, help="share of the base's steps on words without sentences")
    parser.add_argument("--alone-later", type=float, default=0.0, help="the same of what goes on from it")
    parser.add_argument("--start", type=Path, help="folder of the model that training goes on from; None: the base")
    parser.add_argument("--rate", type=float, default=2e-3, help="of AdamW, when going on")
    parser.add_argument("--inner-rate", type=float, default=1.0, help="that the learned ones start from")
    parser.add_argument("--curriculum", type=int, nargs="+", default=[1, 1, 2], help="languages, in equal shares")
    parser.add_argument("--counts", type=int, nargs="+", default=[0, 1, 2, 3], help="of levels")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.3, 1.0, 3.0], help="multiples of learned rates")
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 10], help="of fine-tuning over each lesson")
    parser.add_argument("--tuned-rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3])
    return parser.parse_args(argv)


def main() -> None:
    torch.set_num_threads(1)
    args = arguments()
    if args.stage == "train":
        train_all(args)
    else:
        measure(args)


if __name__ == "__main__":
    main()
