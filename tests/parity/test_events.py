"""Event files by tensorboardX itself: read back record by record, they hold the rows and pictures that went in, and restart at step 0."""
import glob
import json
import struct

import numpy as np
from PIL import Image
from tensorboardX.proto import event_pb2

from runtime import monitoring


def events(path):
    with open(path, "rb") as f:
        data = f.read()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        yield event_pb2.Event.FromString(data[12:12 + size])
        data = data[12 + size + 4:]


def test_points_and_pictures(tmp_path):
    (tmp_path / "events.out.tfevents.1.old").write_bytes(b"old")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 4, "loss": 2.5, "seconds": 10.0}) + "\n")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "curve.png")
    board = monitoring.Board(str(tmp_path), 1.7e9)
    board.row({"step": 8, "val_loss": 1.25, "seconds": 20.0})
    board.picture(str(tmp_path / "curve.png"), 8)
    board.close()
    (path,) = glob.glob(str(tmp_path / "events*"))
    found = list(events(path))
    values = {(v.tag, e.step): (v, e.wall_time) for e in found for v in e.summary.value}
    assert values.keys() == {("loss", 4), ("val_loss", 8), ("curve", 8)}
    assert [(v.simple_value, t) for v, t in (values["loss", 4], values["val_loss", 8])] == [(2.5, 1.7e9 + 10), (1.25, 1.7e9 + 20)]
    assert (values["curve", 8][0].image.height, values["curve", 8][0].image.width) == (5, 7)
    assert [e.step for e in found if e.HasField("session_log")] == [0]
