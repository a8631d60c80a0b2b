"""How lists, plans and events of the cache look to people. Imported late: tables and bars cost."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from meshd.cli.options import duration
from meshd.sizes import format_size

TENTHS = 10

_HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")


def print_listing(out: Console, answer: dict[str, Any]) -> None:
    """The answer to `ls`."""
    if answer["sets"]:
        table = _table("MODEL", "STATE", "SIZE", "FREES", "LAST USED", "REF")
        for row in answer["sets"]:
            notes = [word for word in ("in_use", "pinned") if row[word]]
            state = ", ".join([row["state"], *(note.replace("_", " ") for note in notes)])
            table.add_row(
                escape(row["model"]),
                state,
                _part(row["disk_bytes"], row["size_bytes"]),
                format_size(row["own_bytes"]),
                _ago(row["last_used_at"]),
                escape(row["refs"][0] if row["refs"] else "-"),
            )
        out.print(table)
        for row in answer["sets"]:
            if row["problem"]:
                _line(out, f"{row['model']}: {row['problem']}")
    else:
        out.print("no models; `meshd cache pull owner/repo:QUANT` fetches one")
    leftovers = answer["leftovers"]
    if leftovers:
        taken = format_size(sum(row["size_bytes"] for row in leftovers))
        kinds = ", ".join(
            f"{sum(row['kind'] == kind for row in leftovers)} {kind}"
            for kind in dict.fromkeys(row["kind"] for row in leftovers)
        )
        out.print(f"leftovers {taken} ({kinds}); `meshd cache prune --dry-run` shows them")
    budget = answer["budget_bytes"]
    limit = "no budget" if budget is None else f"budget {format_size(budget)}"
    _line(
        out,
        f"{answer['path']}: {format_size(answer['used_bytes'])} used, {limit}, "
        f"{format_size(answer['free_bytes'])} free on disk",
    )


def print_plan(out: Console, answer: dict[str, Any]) -> None:
    """The answer to `prune`."""
    remove, keep = answer["remove"], answer["keep"]
    if remove or keep:
        verb = "remove" if answer["dry_run"] else "removed"
        table = _table("", "WHAT", "SIZE", "LAST USED", "WHY")
        for word, rows in ((verb, remove), ("keep", keep)):
            for row in rows:
                table.add_row(
                    word,
                    escape(row["what"]),
                    format_size(row["size_bytes"]),
                    _ago(row["last_used_at"]),
                    escape(row["reason"]),
                )
        out.print(table)
    would = "would free" if answer["dry_run"] else "freed"
    out.print(f"{would} {format_size(answer['freed_bytes'])}")
    for path in answer["busy"]:
        _line(out, f"stays: {path}, another program is downloading it")
    if answer["still_over_bytes"]:
        out.print(
            f"still {format_size(answer['still_over_bytes'])} over the budget; "
            "raise cache.budget, unload or unpin a model, or use --force"
        )


class EventView:
    """Shows the progress of long work: a bar on a terminal, a line each tenth elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._said: tuple[str, int] | None = None

    def __enter__(self) -> EventView:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:.0f} %"),
                TextColumn("{task.fields[figures]}", markup=False),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=None, figures="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, event: dict[str, Any]) -> None:
        """Take an event; those that are not known are passed over."""
        match event["t"]:
            case "progress":
                self._progress(event)
            case "said":
                self._say(event["message"])

    def _progress(self, event: dict[str, Any]) -> None:
        done, total = event["done_bytes"], event["total_bytes"]
        words = event["reason"] or event["stage"]
        if self._bar is not None:
            self._bar.update(
                self._task,
                description=words,
                completed=done,
                total=total or None,
                figures=_figures(event),
            )
            return
        tenth = (words, done * TENTHS // total if total else 0)
        if tenth != self._said:
            self._said = tenth
            self._say(f"{words}: {_figures(event)}" if total else words)

    def _say(self, words: str) -> None:
        if self._bar is not None:
            self._bar.console.print(words, markup=False)
        else:
            click.echo(words, err=True)


class FetchView(EventView):
    """Shows a pull or a repair."""

    def show(self, event: dict[str, Any]) -> None:
        if event["t"] == "resolved":
            manifest = event["manifest"]
            files = [*manifest["shards"], *filter(None, [manifest.get("mmproj")])]
            self._say(
                f"{manifest['repo']} at {manifest['revision'][:8]}: {len(files)} "
                f"file{'s' if len(files) > 1 else ''}, "
                f"{format_size(sum(file['size'] for file in files))}"
            )
            return
        super().show(event)

    def words(self, ref: str, done: dict[str, Any]) -> str:
        """What came of it."""
        if not done["fetched_bytes"]:
            return f"{ref} is here, whole and verified; nothing had to be fetched"
        sources = ", ".join(f"{format_size(n)} from {name}" for name, n in done["sources"].items())
        fetched = format_size(done["fetched_bytes"])
        return f"{ref} is here, whole and verified; fetched {sources or fetched}"


class VerifyView(EventView):
    """Shows a verification and gathers what was found."""

    def __init__(self, *, everything: bool) -> None:
        super().__init__()
        self._everything = everything
        self._files: list[dict[str, Any]] = []

    def show(self, event: dict[str, Any]) -> None:
        if event["t"] == "file":
            self._files.append(event)
        super().show(event)

    def print_result(self, out: Console, verified: dict[str, Any]) -> None:
        """A table of the files, of everything only those that are wrong, and a sum."""
        rows = [row for row in self._files if not self._everything or row["fault"] != "ok"]
        if rows:
            table = _table("FILE", "STATE", "EXPECTED", "FOUND")
            for row in rows:
                table.add_row(
                    escape(Path(row["path"]).name),
                    row["fault"],
                    escape(_short(row["expected"])),
                    escape(_short(row["found"])),
                )
            out.print(table)
        wrong = [row for row in self._files if row["fault"] != "ok"]
        for row in wrong:
            _line(out, f"{row['path']} {row['problem']}")
        for advice in dict.fromkeys(row["advice"] for row in wrong if row["advice"]):
            _line(out, f"to do: {advice}")
        if not verified["files"]:
            out.print("there is nothing to verify")
        elif verified["wrong"]:
            out.print(f"{verified['wrong']} of {verified['files']} files are not as they should be")
        else:
            hashed = format_size(verified["hashed_bytes"])
            out.print(f"{verified['files']} files are as they should be, {hashed} hashed")


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _line(out: Console, text: str) -> None:
    """Paths are there to be copied: they are not broken into lines."""
    out.print(text, markup=False, soft_wrap=True)


def _short(fact: str | None) -> str:
    """A size, or as much of a hash as tells it from others."""
    return "-" if fact is None else _HASH.sub(r"\1…", fact)


def _figures(event: dict[str, Any]) -> str:
    figures = _part(event["done_bytes"], event["total_bytes"])
    if event["bytes_per_s"]:
        figures += f", {format_size(event['bytes_per_s'])}/s"
    if event["eta_s"] is not None:
        figures += f", {duration(event['eta_s'])} to go"
    return figures


def _part(some: int, whole: int) -> str:
    return format_size(whole) if some == whole else f"{format_size(some)} of {format_size(whole)}"


def _ago(at: float | None) -> str:
    if at is None:
        return "-"
    passed = time.time() - at
    return f"{duration(passed)} ago" if passed >= 60 else "now"
