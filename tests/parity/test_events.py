"""TensorBoard event files, read by tensorboardX, hold the rows and images that were logged."""
import glob
import json
import struct

import numpy as np
from PIL import Image
from tensorboardX.proto import event_pb2

from runtime import monitoring


def read_events(path):
    with open(path, "rb") as f:
        data = f.read()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        yield event_pb2.Event.FromString(data[12:12 + size])
        data = data[12 + size + 4:]


def test_numbers_and_images_are_logged_from_step_0_on(tmp_path):
    (tmp_path / "events.out.tfevents.1.old").write_bytes(b"old")
    row = {"step": 4, "loss": 2.5, "seconds": 10.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "curve.png")
    board = monitoring.TensorBoardWriter(str(tmp_path), 1.7e9)
    board.add_row({"step": 8, "val_loss": 1.25, "seconds": 20.0})
    board.add_image(str(tmp_path / "curve.png"), 8)
    board.close()
    (path,) = glob.glob(str(tmp_path / "events*"))
    events = list(read_events(path))
    values, times = {}, {}
    for event in events:
        for value in event.summary.value:
            values[value.tag, event.step] = value
            times[value.tag, event.step] = event.wall_time
    assert values.keys() == {("loss", 4), ("val_loss", 8), ("curve", 8)}
    assert values["loss", 4].simple_value == 2.5 and times["loss", 4] == 1.7e9 + 10
    assert values["val_loss", 8].simple_value == 1.25 and times["val_loss", 8] == 1.7e9 + 20
    image = values["curve", 8].image
    assert (image.height, image.width) == (5, 7)
    assert [event.step for event in events if event.HasField("session_log")] == [0]
