"""A run that is killed again and again: what to kill when, by seed, and the same command started anew each time."""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.helpers import ROOT, environment

OBSERVER = Path(__file__).parent / "observer"
PHASES = ("start", "train", "evaluate", "sample", "save")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1, signal.SIGKILL, signal.SIGINT)
MODULE = "rwkv_accel.train"
# What a process that was killed, or lost its partner, may never say: the disk holds half a thing, or the recipe is
# taken for another one.
FORBIDDEN = ("is damaged", "error: ", "contradicts", "dropped")


@dataclass(frozen=True)
class Kill:
    """One blow: in which phase, how long after its beginning, to whom."""

    phase: str
    occurrence: int
    """The phase's turn in this start at which the blow falls."""
    delay_seconds: float
    signal: signal.Signals
    victims: str
    """`one` rank, `all` ranks, the `launcher`, or `everything` at once (a power cut)."""
    follow_up_seconds: float | None
    """A SIGKILL to all ranks so long after the signal: while they save because of it."""


def plan(seed: int, number: int, start_seconds: float) -> list[Kill]:
    """Kills at random moments; phases, signals and victims take turns, so that none is left out."""
    rng = random.Random(seed)
    phases = itertools.cycle(rng.sample(PHASES, len(PHASES)))
    signals = itertools.cycle(rng.sample(SIGNALS, len(SIGNALS)))
    kills = []
    for phase, number_ in itertools.islice(zip(phases, signals), number):
        victims = rng.choice(("one", "one", "all", "launcher", "everything" if number_ == signal.SIGKILL else "all"))
        delay = rng.uniform(0, start_seconds) if phase == "start" else rng.choice((0, rng.uniform(0, 0.02)))
        follow_up = rng.uniform(0, 0.05) if number_ != signal.SIGKILL and rng.random() < 0.4 else None
        kills.append(Kill(phase, rng.randint(1, 2), delay, number_, victims, follow_up))
    return kills


class ChaosRun:
    """One run under a plan. `finish` returns what was hit."""

    def __init__(self, config: str, processes: int, recipe: Path, folder: Path, seed: int) -> None:
        self.command = [
            sys.executable, "-m", "accelerate.commands.launch",
            "--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml"),
            "--num_processes", str(processes), "--main_process_port", "0", "-m", MODULE, str(recipe),
        ]  # fmt: skip
        self.recipe, self.folder, self.rng = recipe, folder, random.Random(seed)
        self.hits: Counter[tuple[str, str, str]] = Counter()
        self.num_starts = 0

    def suffer(self, kills: list[Kill]) -> None:
        """Start the command once for each kill, and strike."""
        for kill in kills:
            launcher, board = self._start()
            try:
                self._strike(kill, launcher, board)
                launcher.wait(timeout=120)
            finally:
                launcher.kill()
            self._check_output()

    def finish(self) -> None:
        """Start the command once more and leave it alone."""
        launcher, _ = self._start()
        try:
            code = launcher.wait(timeout=300)
        finally:
            launcher.kill()
        assert code == 0, self._log()
        self._check_output()
        assert self.processes() == [], "trainers of a killed launcher live on"

    def processes(self) -> list[psutil.Process]:
        """Everything that still runs this recipe."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if str(self.recipe) in (process.info["cmdline"] or ()):
                found.append(process)
        return found

    def summary(self) -> str:
        """One line: blows by signal, by victim and by the phase that they hit."""
        parts = []
        for index in range(3):
            counts: Counter[str] = Counter()
            for hit, count in self.hits.items():
                counts[hit[index]] += count
            parts.append(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
        return f"{sum(self.hits.values())} blows in {self.num_starts} starts: {'; '.join(parts)}"

    def phases_hit(self) -> set[str]:
        return {phase for _, _, phase in self.hits}

    def _start(self) -> tuple[subprocess.Popen[bytes], Path]:
        self.num_starts += 1
        # A background job of a script ignores SIGINT, and so would everything that is started from it.
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        board = self.folder / f"board-{self.num_starts}"
        board.write_bytes(bytes(16))
        env = environment(CHAOS_BOARD=str(board))
        env["PYTHONPATH"] = f"{OBSERVER}:{env['PYTHONPATH']}"
        with self._log_path().open("w") as log:
            popen = subprocess.Popen(
                self.command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        return popen, board

    def _strike(self, kill: Kill, launcher: subprocess.Popen[bytes], board: Path) -> None:
        if kill.phase == "start":
            time.sleep(kill.delay_seconds)
        else:
            self._wait_for(kill, launcher, board)
            time.sleep(kill.delay_seconds)
        ranks = self._ranks(launcher)
        if kill.victims == "one" and ranks:
            victims = [self.rng.choice(ranks)]
        elif kill.victims == "all" and ranks:
            victims = ranks
        elif kill.victims == "everything":
            victims = [*ranks, psutil.Process(launcher.pid)]
        else:
            victims = [psutil.Process(launcher.pid)]
        self._send(kill.signal, victims, kill.victims if ranks else "launcher", board)
        if kill.follow_up_seconds is not None:
            time.sleep(kill.follow_up_seconds)
            self._send(signal.SIGKILL, ranks, "all after a signal", board)

    def _wait_for(self, kill: Kill, launcher: subprocess.Popen[bytes], board: Path) -> None:
        turn, before = 0, ""
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            phase = self._phase(board)
            turn += phase == kill.phase and before != kill.phase
            if turn == kill.occurrence:
                return
            before = phase
            if launcher.poll() is not None:
                raise AssertionError(f"ended with {launcher.returncode} before {kill}:\n{self._log()}")
            time.sleep(0.0005)
        raise AssertionError(f"never came: {kill}\n{self._log()}")

    def _send(self, number: signal.Signals, victims: list[psutil.Process], kind: str, board: Path) -> None:
        phase = self._phase(board)
        sent = 0
        for victim in victims:
            try:
                victim.send_signal(number)
                sent += 1
            except psutil.NoSuchProcess:
                continue
        if sent:
            self.hits[number.name, kind, phase] += 1

    def _phase(self, board: Path) -> str:
        with board.open("rb") as file:
            phases = file.read()
        return PHASES[max(0, max(phases) - 1)]

    def _ranks(self, launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
        ranks = []
        try:
            for child in psutil.Process(launcher.pid).children():
                if MODULE in child.cmdline():
                    ranks.append(child)
        except psutil.Error:
            pass
        return ranks

    def _log_path(self) -> Path:
        return self.folder / f"start-{self.num_starts}.log"

    def _log(self) -> str:
        return self._log_path().read_text(errors="replace")[-6000:]

    def _check_output(self) -> None:
        text = self._log_path().read_text(errors="replace")
        found = [line for line in text.splitlines() if any(word in line for word in FORBIDDEN)]
        assert not found, "\n".join(found)
