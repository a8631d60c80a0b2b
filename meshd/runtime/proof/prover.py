"""Proves the engine at the right times, and publishes what came of it at once.

A proof is made when an engine is found, every `engine.reprove_s`, and when a cheap look every
`GLANCE_S` shows a reason: another engine or driver, a device gone or back, changed files, a
suspend, another list of devices. What is not proved is `cpu` in the view, with the reason, before
anything slow begins; a proof that held stays up while it is repeated.

An engine for the CPU is never run for it: the first answer of any model is its last layer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

from meshd.config import Config
from meshd.errors import GpuRequired, MeshdError
from meshd.ids import ModelId
from meshd.kernel import Board, Clock, Pool, Service
from meshd.runtime.devices import EngineList, parse_list
from meshd.runtime.proof.backends import CPU, WITNESSED, devices_of, meant_for
from meshd.runtime.proof.evidence import BackendEvidence, Evidence, RuntimeEvidence
from meshd.runtime.proof.judge import Verdict, judge
from meshd.runtime.proof.looks import Looks, still_there
from meshd.runtime.proof.occasion import Glance, glance_at, occasion
from meshd.runtime.proof.running import FIRST_LIMIT_S, LIMIT_S, Trial
from meshd.runtime.record import RuntimeRecord
from meshd.view import Layer, ModelState, ProofView, RuntimeView, View

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger(__name__)

GLANCE_S: Final = 15.0
GLANCE_LIMIT_S: Final = 10.0
"""A driver that is asked what devices there are and does not answer for so long has failed: a GPU
that hangs can hold the call for ever."""
LOOK_LIMIT_S: Final = 60.0
"""The same for files and lists; hashing takes a second a gigabyte, a driver some to wake up."""
LISTED_EVERY: Final = 3
"""Glances from one that asks the engine for its list to the next: that wakes a driver, and still
tells of a device the engine lost within 45 s."""


class NoAnswer(MeshdError):
    """A look at the machine that did not come to its end in time."""

    code, status, retryable = "no_answer", 504, True


class Prover(Service):
    """`pool`: its own, since a call into a driver that hangs keeps its thread. `serving`: pids of
    the engines that answer now. `find`: the engine that will run; blocking, raises MeshdError. It
    is asked only by `require_gpu`, which cannot wait to be told."""

    name = "prover"

    def __init__(
        self,
        config: Config,
        board: Board[View],
        looks: Looks,
        *,
        pool: Pool,
        clock: Clock,
        find: Callable[[], RuntimeRecord],
        serving: Callable[[], frozenset[int]] = frozenset,
        glance_s: float = GLANCE_S,
        glance_limit_s: float = GLANCE_LIMIT_S,
    ) -> None:
        super().__init__()
        self._config = config
        self._board = board
        self._looks = looks
        self._pool = pool
        self._clock = clock
        self._find = find
        self._serving = serving
        self._glance_s = glance_s
        self._glance_limit_s = glance_limit_s
        self._wake = asyncio.Event()
        self._record: RuntimeRecord | None = None
        self._proved: RuntimeRecord | None = None
        """What the evidence is of."""
        self._evidence: Evidence | None = None
        self._proved_at = 0.0
        self._glance: Glance | None = None
        self._glances = 0
        self._answered: ModelId | None = None
        self._let_start = False
        self._ran: RuntimeEvidence | None = None
        """Of the last run that passed."""

    def engine_found(self, record: RuntimeRecord) -> RuntimeView:
        """What to show of an engine that is about to run models; proved soon if it is not yet."""
        self._record = record
        self._wake.set()
        return self._shown(record)

    def listing(self) -> EngineList | None:
        """What the engine listed when it was last proved; None if that is not known."""
        evidence = self._evidence
        backend = None if evidence is None else evidence.backend
        if evidence is None or backend is None or backend.listed is None:
            return None
        text = "".join(f"  {line}\n" for line in backend.listed)
        return parse_list(text, evidence.built_for)

    def _no_answer(self, problem: str) -> None:
        """What cannot be looked at is not proved any more."""
        evidence, record = self._evidence, self._proved
        if evidence is None or record is None or evidence.built_for == CPU:
            log.warning("the engine cannot be proved now: %s", problem)
            return
        lost = BackendEvidence(problem=problem)
        self._publish(
            record,
            replace(evidence, checked_at=self._clock.wall(), backend=lost, runtime=None),
        )

    async def _ask(
        self, limit_s: float, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """In the pool. Raises NoAnswer, and what `call` raises."""
        try:
            async with asyncio.timeout(limit_s):
                return await self._pool.run(call, *args, **kwargs)
        except TimeoutError:
            raise NoAnswer(f"drivers or disk have not answered for {limit_s:g} s") from None

    async def require_gpu(self) -> None:
        """For `--require-gpu`, before the service is started: prove now. Raises GpuRequired, with
        what failed. At most `FIRST_LIMIT_S` and the time of some questions."""
        try:
            record = self._record
            if record is None:
                record = self._record = await self._ask(LOOK_LIMIT_S, self._find)
            await self._why(record)
            verdict = await self._prove(record, "the node starts with --require-gpu")
        except MeshdError as error:
            raise GpuRequired(f"--require-gpu: {error.message}") from None
        if verdict.backend == CPU:
            problem = verdict.proof.problem or (
                f"engine {record.id} is built for the CPU; `meshd runtime build --backend cuda` "
                "builds one for an NVIDIA GPU"
            )
            raise GpuRequired(f"--require-gpu: {problem}", param="require_gpu")

    # -- service ----------------------------------------------------------------------------------

    async def main(self) -> None:
        unsubscribe = self._board.subscribe(self._view_changed)
        try:
            self.ready.set()
            self.spawn(self._watch(), name="watch")
            await self.stopping.wait()
        finally:
            unsubscribe()

    async def _watch(self) -> None:
        while True:
            await self._look()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._glance_s):
                    await self._wake.wait()

    async def _look(self) -> None:
        self._wake.clear()
        if self._record is None or self._let_it_start(self._record):
            return
        try:
            why = await self._why(self._record)
            if why is not None:
                await self._prove(self._record, why)
        except NoAnswer as error:
            self._no_answer(error.message)
        except MeshdError as error:  # a pool that is full, weights that cannot be made
            log.warning("the engine cannot be proved now: %s", error.message)

    def _let_it_start(self, record: RuntimeRecord) -> bool:
        """Whether a look would be in the way now: on the CPU, of the first model that loads. It
        wakes us when it is ready, or else a glance passes."""
        loading = record.backend == CPU and self._config.model and self._answered is None
        if not loading or self._evidence is not None or self._let_start:
            return False
        self._let_start = True
        return True

    # -- when -------------------------------------------------------------------------------------

    async def _why(self, record: RuntimeRecord) -> str | None:
        last = self._glance
        listed: tuple[str, ...] | None = None
        gpu = self._evidence is not None and self._evidence.built_for != CPU
        if gpu and self._glances % LISTED_EVERY == 0:
            listed = await self._listed(record)
        self._glances += 1
        devices = await self._ask(self._glance_limit_s, self._looks.devices)
        unchanged = await self._ask(self._glance_limit_s, record.unchanged)
        now = glance_at(record.id, unchanged, self._looks.asleep_s(), devices, listed)
        # What was not asked this time is what it was.
        kept = last.listed if last is not None and listed is None else listed
        self._glance = replace(now, listed=kept)
        if last is None or self._evidence is None:
            return "an engine was found"
        return occasion(
            last,
            now,
            age_s=self._clock.now() - self._proved_at,
            interval_s=self._config.engine.reprove_s,
            passed=judge(self._evidence).proof.passed,
        )

    async def _listed(self, record: RuntimeRecord) -> tuple[str, ...]:
        """Names of devices: free memory, which the lines tell too, moves all the time."""
        assert self._evidence is not None, "asked only about a proof"
        try:
            lines = await self._ask(LOOK_LIMIT_S, self._looks.listed, Path(record.server_path))
        except NoAnswer:
            raise
        except MeshdError:
            return ()
        return devices_of(self._evidence.built_for, lines)

    # -- how --------------------------------------------------------------------------------------

    async def _prove(self, record: RuntimeRecord, why: str) -> Verdict:
        """1. What the files are; 2. what the engine and the driver list; 3. a run on the device.

        What fails is published before the next step; what held stays up during the run.
        """
        log.info("proving engine %s: %s", record.id, why)
        held = self._proved is not None and self._proved.id == record.id
        binary = await self._ask(LOOK_LIMIT_S, self._looks.binary, record)  # 1
        server = Path(record.server_path)
        backend = await self._ask(LOOK_LIMIT_S, self._looks.backend, server, binary)  # 2
        built_for = meant_for(record.backend, binary)
        if self._glance is not None:  # later lists are compared with the one that is judged
            names = devices_of(built_for, backend.listed or ())
            self._glance = replace(self._glance, listed=names)
        evidence = Evidence(built_for, self._clock.wall(), binary, backend, None)
        if built_for == CPU:
            return self._publish(record, replace(evidence, runtime=self._answer()))
        verdict = judge(evidence)
        if not held or verdict.proof.level != Layer.BACKEND.value:
            self._publish(record, evidence)
        if verdict.proof.level != Layer.BACKEND.value:
            return verdict
        run = await self._run(record, built_for, backend, first=not held)  # 3
        verdict = self._publish(record, replace(evidence, runtime=run))
        self._ran = run if verdict.proof.passed else self._ran
        return verdict

    async def _run(
        self, record: RuntimeRecord, built_for: str, backend: BackendEvidence, *, first: bool
    ) -> RuntimeEvidence:
        device = devices_of(built_for, backend.listed or ())[0]
        trial = Trial(
            server=Path(record.server_path),
            weights=await self._ask(LOOK_LIMIT_S, self._looks.weights),
            device=device,
            run_dir=self._config.run_dir,
            limit_s=FIRST_LIMIT_S if first else LIMIT_S,
            witnessed=built_for in WITNESSED and backend.blind is None,
        )
        seen = await self._looks.run(trial)
        if seen.problem is None or self._ran is None:
            return seen
        return still_there(
            self._ran, seen, self._serving(), await self._ask(LOOK_LIMIT_S, self._looks.usage)
        )

    def _answer(self) -> RuntimeEvidence | None:
        """What ordinary work has shown."""
        if self._answered is None:
            return None
        note = f"{self._answered} is served: it is ready only since it answered"
        return RuntimeEvidence(CPU, generated=True, note=note)

    # -- what is shown ----------------------------------------------------------------------------

    def _publish(self, record: RuntimeRecord, evidence: Evidence) -> Verdict:
        before, verdict = self._board.current.runtime, judge(evidence)
        self._proved, self._evidence = record, evidence
        self._proved_at = self._clock.now()
        if before is None or _said(before.proof) != _said(verdict.proof):
            self._tell(record, before, verdict)
        self._board.publish(replace(self._board.current, runtime=self._shown(record)))
        return verdict

    def _tell(self, record: RuntimeRecord, before: RuntimeView | None, verdict: Verdict) -> None:
        """One line for each change; a proof that fails every minute the same way is none."""
        if before is not None and before.backend != CPU and verdict.backend == CPU:
            log.error("models no longer run on %s: %s", before.backend, verdict.proof.problem)
        elif verdict.proof.passed:
            log.info("proved (%s): models run on %s", verdict.proof.level, verdict.backend)
        else:
            log.warning("engine %s counts as CPU: %s", record.id, verdict.proof.problem)

    def _shown(self, record: RuntimeRecord) -> RuntimeView:
        view = record.to_view()
        if self._evidence is None or self._proved is None or self._proved.id != record.id:
            return view
        verdict, run = judge(self._evidence), self._evidence.runtime
        return replace(
            view,
            backend=verdict.backend,
            built_for=self._evidence.built_for,
            proof=verdict.proof,
            tokens_per_s=None if run is None or verdict.backend == CPU else run.tokens_per_s,
        )

    def _view_changed(self, view: View) -> None:
        """The first model that is ready has answered: that is the last layer of the CPU."""
        if self._answered is not None:
            return
        ready = next((m.id for m in view.local.values() if m.state is ModelState.READY), None)
        if ready is None:
            return
        self._answered = ready
        self._wake.set()
        evidence, record = self._evidence, self._proved
        if evidence is not None and record is not None and evidence.built_for == CPU:
            self._publish(record, replace(evidence, runtime=self._answer()))


def _said(proof: ProofView) -> tuple[str, bool, str | None]:
    return proof.level, proof.passed, proof.problem
