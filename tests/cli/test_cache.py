"""`meshd cache …` as a person or a script calls it: with a daemon, and without one."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from meshd.api.admin import AdminServer
from meshd.cache.commands import (
    CacheCommands,
    Event,
    FileChecked,
    LeftoverRow,
    Listing,
    PlanRow,
    PruneReport,
    RemovalReport,
    SetRow,
    Verified,
)
from meshd.cache.manifest import Manifest, Shard
from meshd.cache.transfer.words import Done, FetchFailed, Progress, Resolved, Said
from meshd.cli.main import main
from meshd.config import Config
from meshd.errors import HubUnavailable, MeshdError, NotInCache, WeightsInUse
from meshd.kernel import FlightRecorder

REF = "owner/some-GGUF:Q4_K_M"
MANIFEST = Manifest(
    repo="owner/some-GGUF",
    revision="ab" * 20,
    shards=(Shard(path="some-Q4_K_M.gguf", size=2_000_000_000, sha256="cd" * 32),),
)
ROW = SetRow(
    model="some-Q4_K_M",
    refs=(REF,),
    digest=MANIFEST.digest,
    state="ok",
    problem=None,
    files=1,
    size_bytes=2_000_000_000,
    disk_bytes=2_000_000_000,
    own_bytes=2_000_000_000,
    last_used_at=0.0,
    pinned=True,
    in_use=False,
    elsewhere=None,
)
LISTING = Listing(
    path="/cache/hub",
    used_bytes=3_000_000_000,
    budget_bytes=5_000_000_000,
    free_bytes=9_000_000_000,
    sets=(ROW,),
    leftovers=(
        LeftoverRow(path="/cache/x", kind="partial", size_bytes=7, useless=True, reason="old"),
    ),
)
CHECKED = FileChecked(
    model="some-Q4_K_M",
    ref=REF,
    path="/cache/some-Q4_K_M.gguf",
    number=1,
    total=1,
    fault="ok",
    problem="",
    expected=None,
    found=None,
    advice=None,
)


def progress(done: int, reason: str = "fetching from the hub") -> Event:
    return Progress(
        stage="fetching", reason=reason, done_bytes=done, total_bytes=2_000_000_000,
        bytes_per_s=1e8, eta_s=61.0,
    ).model_dump()  # fmt: skip


@dataclass
class Scripted:
    """Answers as it is told to, and says what it was asked."""

    answers: dict[str, Any] = field(default_factory=dict)
    """By command: an answer, a list of events, or an error to raise; in a list too."""
    asked: list[tuple[Any, ...]] = field(default_factory=list)
    interrupt: bool = False
    """Press Ctrl-C after the events, and never end by itself."""
    cancelled: threading.Event = field(default_factory=threading.Event)

    async def ls(self) -> dict[str, Any]:
        return self._answer("ls")

    async def rm(self, ref: str, *, force: bool) -> dict[str, Any]:
        return self._answer("rm", ref, force)

    async def prune(self, *, dry_run: bool, force: bool) -> dict[str, Any]:
        return self._answer("prune", dry_run, force)

    def pull(self, ref: str) -> AsyncGenerator[Event, None]:
        return self._events("pull", ref)

    def verify(self, ref: str | None) -> AsyncGenerator[Event, None]:
        return self._events("verify", ref)

    def repair(self, ref: str) -> AsyncGenerator[Event, None]:
        return self._events("repair", ref)

    def _answer(self, *asked: Any) -> dict[str, Any]:
        self.asked.append(asked)
        answer = self.answers[asked[0]]
        if isinstance(answer, MeshdError):
            raise answer
        found: dict[str, Any] = answer.model_dump()
        return found

    async def _events(self, *asked: Any) -> AsyncGenerator[Event, None]:
        self.asked.append(asked)
        for event in self.answers[asked[0]]:
            if isinstance(event, MeshdError):
                raise event
            yield event
        if self.interrupt:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()


@dataclass(frozen=True)
class Result:
    exit_code: object
    stdout: str
    stderr: str


Cli = Callable[..., Result]


@pytest.fixture
def scripted() -> Scripted:
    return Scripted()


@pytest.fixture
def data_dir() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="meshd-"))  # short: it will hold a socket
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(params=["daemon", "own"])
def route(
    request: pytest.FixtureRequest,
    scripted: Scripted,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    """Who carries the commands out."""
    with contextlib.ExitStack() as stack:
        if request.param == "daemon":
            stack.enter_context(_daemon(data_dir, scripted))
        else:

            @contextlib.asynccontextmanager
            async def own(config: Config) -> AsyncIterator[CacheCommands]:
                assert config.data_dir == data_dir
                yield scripted

            monkeypatch.setattr("meshd.cli.cache_access.own_commands", own)
        yield request.param


@pytest.fixture
def cli(
    route: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Cli:
    """Calls `meshd cache WORDS…` as the console script does."""
    monkeypatch.setenv("MESHD_DATA_DIR", str(data_dir))

    def call(*words: str) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as leave:
            main(["cache", *words])
        said = capsys.readouterr()
        return Result(leave.value.code, said.out, said.err)

    return call


@contextlib.contextmanager
def _daemon(data_dir: Path, scripted: Scripted) -> Iterator[None]:
    """The admin side of a daemon, in a thread."""
    server = AdminServer(
        data_dir / "admin.sock",
        load=lambda _: pytest.fail("not asked for"),
        unload=lambda _: pytest.fail("not asked for"),
        status=dict,
        recorder=FlightRecorder(),
        cache=scripted,
    )
    started = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        task = asyncio.create_task(server.run())
        await server.ready.wait()
        started.set()
        await task

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(10)
    yield
    loops[0].call_soon_threadsafe(server.stopping.set)
    thread.join(10)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# -- ls, rm, prune --------------------------------------------------------------------------------


def test_ls(cli: Cli, scripted: Scripted) -> None:
    scripted.answers["ls"] = LISTING
    assert json.loads(cli("ls", "--json").stdout) == LISTING.model_dump(mode="json")
    result = cli("ls")
    assert result.exit_code == 0
    head, row, leftovers, foot = result.stdout.splitlines()
    assert head.split() == ["MODEL", "STATE", "SIZE", "FREES", "LAST", "USED", "REF"]
    assert row.split()[:3] == ["some-Q4_K_M", "ok,", "pinned"]
    assert "2.0 GB" in row
    assert row.rstrip().endswith(REF)
    assert leftovers.startswith("leftovers 7 B (1 partial)")
    assert foot == "/cache/hub: 3.0 GB used, budget 5.0 GB, 9.0 GB free on disk"


def test_ls_says_what_is_wrong_and_how_much_is_there(cli: Cli, scripted: Scripted) -> None:
    row = ROW.model_copy(
        update={"state": "missing", "problem": "shard [3] is missing", "disk_bytes": 1_500_000_000}
    )
    scripted.answers["ls"] = LISTING.model_copy(update={"sets": (row,), "budget_bytes": None})
    said = cli("ls").stdout
    assert "1.5 GB of 2.0 GB" in said
    assert "some-Q4_K_M: shard [3] is missing" in said
    assert "no budget" in said


def test_ls_of_nothing_says_what_to_do(cli: Cli, scripted: Scripted) -> None:
    scripted.answers["ls"] = LISTING.model_copy(update={"sets": (), "leftovers": ()})
    assert "`meshd cache pull owner/repo:QUANT` fetches one" in cli("ls").stdout


def test_rm(cli: Cli, scripted: Scripted) -> None:
    report = RemovalReport(model="some-Q4_K_M", refs=(REF,), freed_bytes=2_000_000_000)
    scripted.answers["rm"] = report
    result = cli("rm", REF)
    assert (result.exit_code, result.stdout) == (0, "some-Q4_K_M is removed: 2.0 GB freed\n")
    assert json.loads(cli("rm", REF, "--force", "--json").stdout) == report.model_dump(mode="json")
    assert scripted.asked == [("rm", REF, False), ("rm", REF, True)]


def test_rm_of_what_is_needed_is_refused(cli: Cli, scripted: Scripted) -> None:
    scripted.answers["rm"] = WeightsInUse("an engine runs on it; `meshd unload` first")
    result = cli("rm", REF)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: an engine runs on it; `meshd unload` first\n"


def test_prune(cli: Cli, scripted: Scripted) -> None:
    gone = PlanRow(what="old", ref=REF, size_bytes=10**9, last_used_at=0.0, reason="too [old]")
    kept = PlanRow(what="new", ref=REF, size_bytes=10**9, last_used_at=None, reason="pinned")
    report = PruneReport(
        dry_run=True, remove=(gone,), keep=(kept,), freed_bytes=10**9, still_over_bytes=5
    )
    scripted.answers["prune"] = report
    dry = cli("prune", "--dry-run")
    assert dry.exit_code == 0
    assert [line.split()[:2] for line in dry.stdout.splitlines()[1:3]] == [
        ["remove", "old"],
        ["keep", "new"],
    ]
    assert "too [old]" in dry.stdout
    assert "would free 1.0 GB" in dry.stdout
    assert json.loads(cli("prune", "--dry-run", "--json").stdout) == report.model_dump(mode="json")

    scripted.answers["prune"] = report.model_copy(update={"dry_run": False, "busy": ("/cache/y",)})
    done = cli("prune", "--force")
    assert done.exit_code == 1, "still over the budget"
    assert "freed 1.0 GB" in done.stdout
    assert "stays: /cache/y, another program is downloading it" in done.stdout
    assert "still 5 B over the budget" in done.stdout
    assert [asked[1:] for asked in scripted.asked] == [(True, False), (True, False), (False, True)]

    scripted.answers["prune"] = report.model_copy(update={"dry_run": False, "still_over_bytes": 0})
    assert cli("prune").exit_code == 0


# -- pull, repair ---------------------------------------------------------------------------------

DONE = Done(fetched_bytes=2_000_000_000, sources={"hub": 5 * 10**8, "attic": 15 * 10**8})


@pytest.mark.parametrize("command", ["pull", "repair"])
def test_fetching_in_words(cli: Cli, scripted: Scripted, command: str) -> None:
    scripted.answers[command] = [
        Resolved(manifest=MANIFEST).model_dump(),
        *(progress(done) for done in (0, 100, 10**9, 10**9 + 100)),
        Said(message="attic is left out: it sent a wrong byte").model_dump(),
        progress(2_000_000_000, "hashing"),
        DONE.model_dump(),
    ]
    result = cli(command, REF)
    assert result.exit_code == 0
    assert result.stdout == (
        f"{REF} is here, whole and verified; fetched 500 MB from hub, 1.5 GB from attic\n"
    )
    assert result.stderr.splitlines() == [
        "owner/some-GGUF at abababab: 1 file, 2.0 GB",
        "fetching from the hub: 0 B of 2.0 GB, 100 MB/s, 1m 1s to go",
        "fetching from the hub: 1.0 GB of 2.0 GB, 100 MB/s, 1m 1s to go",
        "attic is left out: it sent a wrong byte",
        "hashing: 2.0 GB, 100 MB/s, 1m 1s to go",
    ]
    assert scripted.asked == [(command, REF)]


def test_what_is_whole_is_not_fetched(cli: Cli, scripted: Scripted) -> None:
    scripted.answers["pull"] = [Done(fetched_bytes=0).model_dump()]
    assert cli("pull", REF).stdout == (
        f"{REF} is here, whole and verified; nothing had to be fetched\n"
    )


def test_json_is_every_event_and_the_result_last(cli: Cli, scripted: Scripted) -> None:
    events = [Resolved(manifest=MANIFEST), Said(message="x"), DONE]
    scripted.answers["pull"] = [event.model_dump() for event in events]
    result = cli("pull", REF, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert lines(result.stdout) == [event.model_dump(mode="json") for event in events]


FAILED = FetchFailed(
    code="hub_refused", message="accept the licence at https://x/y", permanent=True
)


def test_a_failed_fetch(cli: Cli, scripted: Scripted) -> None:
    scripted.answers["pull"] = [progress(0), FAILED.model_dump()]
    result = cli("pull", REF)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1] == "error: accept the licence at https://x/y"
    told = cli("pull", REF, "--json")
    assert told.exit_code == 1
    assert lines(told.stdout)[-1] == FAILED.model_dump(mode="json")


@pytest.mark.parametrize("after", [0, 1])
def test_an_error_is_the_last_line_of_json(cli: Cli, scripted: Scripted, after: int) -> None:
    error = HubUnavailable("the hub is ill")
    scripted.answers["pull"] = [*[progress(0)] * after, error]
    result = cli("pull", REF)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "error: the hub is ill"
    told = cli("pull", REF, "--json")
    assert told.exit_code == 1
    *before, last = lines(told.stdout)
    assert len(before) == after
    assert (last["t"], last["code"], last["message"]) == (
        "failed",
        "hub_unavailable",
        error.message,
    )


def test_work_without_a_result_failed(cli: Cli, scripted: Scripted) -> None:
    scripted.answers["pull"] = [progress(0)]
    result = cli("pull", REF)
    assert result.exit_code == 1
    assert "ended without a result" in result.stderr


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_ctrl_c_cancels_and_says_that_it_goes_on(
    cli: Cli, scripted: Scripted, words: tuple[str, ...]
) -> None:
    scripted.answers["pull"] = [progress(0)]
    scripted.interrupt = True
    result = cli("pull", REF, *words)
    assert result.exit_code == 130
    assert f"`meshd cache pull {REF}` goes on from here" in result.stderr
    assert scripted.cancelled.wait(10), "the work goes on although nobody waits for it"


def test_a_reader_that_has_seen_enough(
    cli: Cli, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(_: object) -> None:
        raise BrokenPipeError

    scripted.answers["pull"] = [progress(0), DONE.model_dump()]
    monkeypatch.setattr("meshd.cli.cache.click.echo", gone)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert cli("pull", REF, "--json").exit_code == 0


# -- verify ---------------------------------------------------------------------------------------


def test_verify_of_what_is_right(cli: Cli, scripted: Scripted) -> None:
    verified = Verified(files=1, wrong=0, hashed_bytes=2_000_000_000)
    scripted.answers["verify"] = [CHECKED.model_dump(), verified.model_dump()]
    one = cli("verify", REF)
    assert one.exit_code == 0
    assert one.stdout.splitlines()[1].split() == ["some-Q4_K_M.gguf", "ok", "-", "-"]
    assert one.stdout.splitlines()[-1] == "1 files are as they should be, 2.0 GB hashed"
    everything = cli("verify")
    assert everything.stdout == "1 files are as they should be, 2.0 GB hashed\n"
    assert scripted.asked == [("verify", REF), ("verify", None)]


def test_verify_of_what_is_wrong(cli: Cli, scripted: Scripted) -> None:
    wrong = CHECKED.model_copy(
        update={
            "fault": "corrupt", "problem": "has another sha256", "expected": f"sha256 {'aa' * 32}",
            "found": f"sha256 {'bb' * 32}", "advice": f"`meshd cache repair {REF}`",
        }
    )  # fmt: skip
    verified = Verified(files=2, wrong=1, hashed_bytes=1)
    scripted.answers["verify"] = [e.model_dump() for e in (CHECKED, wrong, verified)]
    result = cli("verify")
    assert result.exit_code == 1
    rows = [line for line in result.stdout.splitlines() if line.startswith("some-Q4_K_M.gguf")]
    assert len(rows) == 1
    assert "corrupt" in rows[0]
    assert f"sha256 {'a' * 12}… " in rows[0]
    assert f"sha256 {'b' * 12}…" in rows[0]
    assert "/cache/some-Q4_K_M.gguf has another sha256" in result.stdout
    assert f"to do: `meshd cache repair {REF}`" in result.stdout
    assert "1 of 2 files are not as they should be" in result.stdout
    told = cli("verify", "--json")
    assert told.exit_code == 1
    assert lines(told.stdout)[-1] == verified.model_dump(mode="json")


def test_verify_of_nothing(cli: Cli, scripted: Scripted) -> None:
    scripted.answers["verify"] = [Verified(files=0, wrong=0, hashed_bytes=0).model_dump()]
    result = cli("verify")
    assert (result.exit_code, result.stdout) == (0, "there is nothing to verify\n")


def test_verify_of_what_is_not_here(cli: Cli, scripted: Scripted) -> None:
    scripted.answers["verify"] = [NotInCache(f"nothing of {REF} is here")]
    assert cli("verify", REF).exit_code == 1
    told = cli("verify", REF, "--json")
    assert told.exit_code == 1
    assert lines(told.stdout)[0]["code"] == "not_in_cache"


def test_a_path_is_made_absolute(
    cli: Cli, scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.gguf").touch()
    monkeypatch.chdir(tmp_path)
    scripted.answers["verify"] = [Verified(files=0, wrong=0, hashed_bytes=0).model_dump()]
    cli("verify", "x.gguf")
    assert scripted.asked == [("verify", str(tmp_path / "x.gguf"))]


# -- usage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [("pull",), ("repair",), ("rm",), ("ls", "x"), ("prune", "x"), ("verify", "a", "b"), ("burn",)],
)
@pytest.mark.parametrize("route", ["own"], indirect=True)
def test_usage(cli: Cli, scripted: Scripted, words: tuple[str, ...]) -> None:
    result = cli(*words)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
    assert scripted.asked == []


@pytest.mark.parametrize("route", ["own"], indirect=True)
def test_bad_configuration(cli: Cli, data_dir: Path) -> None:
    (data_dir / "config.toml").write_text('cache.budget = "much"\n')
    result = cli("ls")
    assert result.exit_code == 78
    assert "cache.budget" in result.stderr
