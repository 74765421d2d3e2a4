"""Signals that ask a run to end: saved first, by all processes, at the same step.

A signal only sets a number here. The training loop, and what is long beside it (evaluations, captions at the end), ask the devices what
the largest such number of all processes is (Place.vote), so that all of them learn of it at the same point and none waits for one that has left.
"""
import signal
from typing import Any

from devices import Place


class Interrupted(Exception):
    """A signal asked for an end, and all processes know."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number


class Interrupt:
    """SIGTERM (which is also a cloud's notice of preemption) and SIGINT ask for a save at the next step, whichever process they reach;
    a second one ends that process at once."""

    def __init__(self, place: Place):
        self.place, self.signal = place, 0

    def __enter__(self) -> "Interrupt":
        # All of the table first, and then the handlers: a signal may come between the two.
        self.before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        for s in self.before:
            signal.signal(s, self.note)
        if self.signal:  # it came before the last handler was installed
            self.let_go()
        return self

    def note(self, number: int, frame: Any) -> None:
        self.signal = number
        self.let_go()

    def let_go(self) -> None:
        """The next signal ends the process."""
        for s in self.before:
            signal.signal(s, signal.SIG_DFL)

    def check(self) -> None:
        """Interrupted in all processes if one was signalled: for what is long, and not made of training steps."""
        most, _ = self.place.get(self.place.vote(self.signal, 0))
        if most:
            raise Interrupted(int(most))

    def __exit__(self, *problem: Any) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)
