"""Timing contestants in turn, a segment each, between two measurements of what the machine gives at that moment."""

from dataclasses import dataclass, field

from diagnostics.bench.machine import Watch, told, wait_until_quiet
from diagnostics.bench.workers import Worker

N_SEGMENTS = 5
MAX_DRIFT = 0.05
"""A segment counts only if the GEMM rates before and after it differ by no more than this."""
MAX_BELOW_BEST = 0.1
"""Nor does it where they lie further below the best rate of this benchmark: then both were taken beside other work."""
MAX_EXTRA_ROUNDS = 5
"""Rounds that contestants whose segments were thrown away get beyond N_SEGMENTS."""


@dataclass
class Segments:
    """What counts of one contestant."""

    seconds: list[float] = field(default_factory=list)
    """Of each segment."""
    peaks_gflops: list[float] = field(default_factory=list)
    """Mean of the best GEMM rates before and after it."""

    @property
    def are_enough(self) -> bool:
        """Whether a median of them is a figure."""
        return len(self.seconds) >= N_SEGMENTS


def time_in_turn(contestants: list[Worker], n_steps: int) -> dict[str, Segments]:
    """N_SEGMENTS segments of n_steps each for every contestant, by name, in turn; fewer where the machine never rested.

    Raises:
        BusyError: others use the processor.
    """
    segments = {worker.name: Segments() for worker in contestants}
    n_thrown_away, best = 0, 0.0
    for _ in range(N_SEGMENTS + MAX_EXTRA_ROUNDS):
        for worker in contestants:
            if segments[worker.name].are_enough:
                continue
            wait_until_quiet()
            watch = Watch.start()
            before = max(worker.ask(do="calibrate")["gflops"])
            seconds = worker.ask(do="steps", n=n_steps)["seconds"]
            after = max(worker.ask(do="calibrate")["gflops"])
            busy = watch.busy()
            best = max(best, before, after)
            is_steady = abs(before - after) <= MAX_DRIFT * max(before, after)
            if is_steady and min(before, after) >= (1 - MAX_BELOW_BEST) * best and not busy:
                segments[worker.name].seconds.append(seconds)
                segments[worker.name].peaks_gflops.append((before + after) / 2)
            else:
                n_thrown_away += 1
                seen = f"{before:.0f} GFLOP/s before, {after:.0f} after, {best:.0f} at best"
                seen += f"; beside {told(busy)}" if busy else ""
                print(f"thrown away: {worker.name}, GEMM {seen}")
    print(
        f"{n_thrown_away} segments were thrown away: GEMM rates around them differed by more than {MAX_DRIFT:.0%}, "
        f"or lay more than {MAX_BELOW_BEST:.0%} below the best, or others were at work"
    )
    return segments
