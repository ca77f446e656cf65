"""What a run shows while it trains: a progress bar on a terminal, a line per tenth elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from nestlearn.levels import fires


class Display:
    """Shows, decides nothing."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._total = self._shown = 0

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def training(self, name: str, done: int, total: int) -> Iterator[None]:
        """A bar from ``done`` to ``total`` tokens, for as long as the context lasts."""
        self._total, self._shown = total, done
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
            TextColumn("[bold]{task.fields[loss]}[/bold] bits/byte"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns, console=self.console, refresh_per_second=4, disable=not self.console.is_terminal
        ) as bar:
            self._bar = bar
            self._task = bar.add_task(name, completed=done, total=total, loss="  …  ", speed="…")
            yield

    def advance(self, tokens: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=min(tokens, self._total))

    def logged(self, line: Mapping[str, float]) -> None:
        """A line of metrics.jsonl."""
        loss, speed, tokens = line["loss_bits_per_byte"], line["tokens_per_second"], int(line["tokens"])
        if self._bar is not None:
            self._bar.update(self._task, loss=f"{loss:.3f}", speed=f"{speed:,.0f}")
        if not self.console.is_terminal and (
            tokens >= self._total or fires(max(1, self._total // 10), self._shown, tokens)
        ):
            self._shown = tokens
            self.say(f"{tokens:>12,} tokens  {loss:.3f} bits/byte  {speed:,.0f} tokens/s")
