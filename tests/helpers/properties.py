"""What tests of properties share: strategies for damaged bytes, and a bound on memory."""
import contextlib
import os
import resource
import tempfile

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EVERY = settings(derandomize=True, database=None, deadline=None, max_examples=150,
                 suppress_health_check=list(HealthCheck))
MORE, FEW = settings(EVERY, max_examples=400), settings(EVERY, max_examples=40)


@pytest.fixture
def at_most_a_gigabyte():
    """An allocation beyond that fails, and so does the test unless it is a documented error."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@st.composite
def mutated(draw, content, first=0, last=None):
    """The content with some bytes changed, removed or inserted, all within first..last."""
    last = len(content) if last is None else last
    for _ in range(draw(st.integers(1, 4))):
        if last <= first:  # all of it has been removed
            break
        start = draw(st.integers(first, last - 1))
        new = draw(st.binary(min_size=1, max_size=40))
        kind = draw(st.sampled_from(["change", "change", "remove", "insert"]))
        count = {"change": len(new), "remove": draw(st.integers(1, 2000)), "insert": 0}[kind]
        count = min(count, last - start)
        if kind == "remove":
            new = b""
        elif kind == "change":
            new = new[:count]
        content = content[:start] + new + content[start + count:]
        last += len(new) - count
    return content


@contextlib.contextmanager
def file(content, suffix=".tar"):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x" + suffix)
        with open(path, "wb") as f:
            f.write(content)
        yield path
