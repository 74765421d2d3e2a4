"""Good samples around a broken one, and what a source makes of them."""
import os
import re

from inputs.sources import open_source
from tests.helpers.samples import encoded, photo, reader, sample

KEYS = (0, 1, 3, 4)  # of the good samples; 2 is the broken one
GOOD = {f"a cat {i}" for i in KEYS}
JPG, TXT = sample(2)["jpg"], b"a cat 2"
PNG = encoded(photo(), "PNG")


def read(where, field="txt"):
    """(captions that are used, {reason: count}) of all samples of a source."""
    source = open_source(str(where), field)
    batch = reader(source, augment=None).batch(range(len(source)), 16)
    counts = dict(source.skipped)
    for why in batch["bad"].values():
        counts[why] = counts.get(why, 0) + 1
    return {source.caption(int(i)) for i in batch["sample"]}, counts


def check(result, reason, usable=False):
    """Of what `read` returns: the good samples were used, the other one too if it is usable, and if
    there is a reason it was counted."""
    used, counts = result
    expected = GOOD | {"a cat 2"} if usable else GOOD
    assert used == expected, (used - GOOD, GOOD - used, counts)
    if reason:
        assert any(re.search(reason, why) for why in counts), counts
    else:
        assert not counts
    for why, count in counts.items():
        assert count > 0
        assert "\n" not in why and len(why) < 300


def good_files(field="txt"):
    for i in KEYS:
        yield f"{i}.jpg", sample(i)["jpg"]
        if field == "txt":
            yield f"{i}.txt", b"a cat %d" % i
        else:
            yield f"{i}.json", b'{"c": "a cat %d"}' % i


def link(target):
    return lambda path: os.symlink(target, path)


UNREADABLE = {
    "a folder": os.mkdir,
    "a dangling link": link("nowhere"),
    "a pipe": os.mkfifo,
    "a device without end": link("/dev/zero"),
    "a link to itself": lambda path: os.symlink(os.path.basename(path), path),
}
