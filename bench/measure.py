"""What every section of the bench needs: times of commands, and what is made of many of them."""

import contextlib
import math
import statistics
import sys
import time
from pathlib import Path

from docker import run

PYTHON = "/usr/bin/python3"
MIB = 1 << 20


def say(text):
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{text} ...", end="", file=sys.stderr, flush=True)


def timed(command, **options):
    """Wall time of a command, ms."""
    begun = time.perf_counter()
    run(command, **options)
    return (time.perf_counter() - begun) * 1e3


def percentile(values, percent):
    """The least of the values that so many percent of them do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def summary(values):
    """What is said of many values."""
    shares = {f"p{percent}": percentile(values, percent) for percent in (95, 99)}
    return {"n": len(values), "least": min(values), "p50": statistics.median(values), **shares, "most": max(values)}


def smaps(process):
    """What a process takes of the memory, bytes by the kernel's names for it, without those of its parts; empty if it
    is gone."""
    sums = {}
    with contextlib.suppress(OSError, TypeError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            words = line.split()
            if words[-1] == "kB":
                sums[words[0].rstrip(":")] = int(words[1]) << 10
    return sums
