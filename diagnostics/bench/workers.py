"""Contestants as processes: started once, asked for a few steps at a time, so that all are timed side by side."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diagnostics.bench.machine import ROOT

PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"


@dataclass
class Worker:
    """One contestant: a program that waits at a diagnostics.bench.gate.Gate."""

    name: str
    process: "subprocess.Popen[str]"
    log: Path
    losses: list[float] = field(default_factory=list)
    """Of every step so far, in nats per token."""

    @classmethod
    def start(cls, name: str, program: str, spec: dict[str, Any], *, is_peer: bool = False) -> "Worker":
        """Start `python -m diagnostics.bench.contestants.PROGRAM`, a peer in the peers' environment.

        Raises:
            FileNotFoundError: the peers' environment is missing.
        """
        if is_peer and not PEERS_PYTHON.exists():
            raise FileNotFoundError("the peers' environment .venv-peers must be there; make it with `make peers`")
        log = Path(tempfile.mkstemp(prefix=f"bench-{program}-", suffix=".log")[1])
        python = str(PEERS_PYTHON) if is_peer else sys.executable
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        process = subprocess.Popen(
            [python, "-m", f"diagnostics.bench.contestants.{program}", json.dumps(spec)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment,
        )
        return cls(name, process, log)

    def ask(self, **command: object) -> dict[str, Any]:
        """Send a command, wait for its answer.

        Raises:
            RuntimeError: the contestant has ended; the end of its log is in the message.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"contestant {self.name} must answer, but it ended:\n{self.log.read_text()[-2000:]}")
        answered: dict[str, Any] = json.loads(answer)
        self.losses += answered.get("losses", [])
        return answered

    def stop(self) -> None:
        """End it; a trainer ends by its own way out."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
