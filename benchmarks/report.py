"""A report made in a budget of time: a row that fails or has no time left says so, the others go on."""

import signal
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import save, table


class OutOfTime(BaseException):
    """Not an Exception: what runs when the time is over may not catch it."""


class Report:
    """Rows by topic; the file is written again after each.

    Args:
        name, folder: where it is saved.
        minutes: of wall-clock time, from now on, for all rows.
        only: rows whose name does not contain it are left out.
    """

    def __init__(self, name, folder, minutes, only=""):
        self.end = time.monotonic() + 60 * minutes
        self.name, self.folder, self.only, self.rows = name, folder, only, {}

    def add(self, topic, labels, make, needs=20):
        """Add and return the row `labels | make()`, which takes about `needs` seconds."""
        name = ", ".join([topic, *map(str, labels.values())])
        if self.only not in name:
            return {}
        left = self.end - time.monotonic()
        row = {"skipped": f"it needs {needs} s, {left:.0f} s were left"}
        if left > needs:
            row = attempt(make, left)
        print(f"{name}: {row.get('skipped') or row.get('failed') or 'done'}", flush=True)
        self.rows.setdefault(topic, []).append(labels | row)
        save(self.name, self.rows, self.folder)
        return row

    def __str__(self):
        return "\n\n".join(f"{topic}:\n\n{markdown(rows)}" for topic, rows in self.rows.items())


def attempt(make, seconds):
    try:
        with deadline(seconds):
            return make()
    except OutOfTime:
        return {"skipped": f"stopped after {seconds:.0f} s, when the time was over"}
    except Exception as error:
        return {"failed": describe(error)}


@contextmanager
def deadline(seconds):
    """Raise `OutOfTime` after so many seconds, and every 10 s from there on."""

    def stop(*_):
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def describe(error):
    """The first line of an error and of the one it began with, and where that was raised."""
    root = error
    while root.__context__ is not None:
        root = root.__context__
    lines = [f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}" for e in (error, root)]
    frames = traceback.extract_tb(root.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return " <- ".join(dict.fromkeys(lines)) + place


def markdown(rows):
    """A table of rows with different keys; floats to three digits."""
    head = list(dict.fromkeys(key for row in rows for key in row))
    text = [{k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    return table([{key: row.get(key, "") for key in head} for row in text])
