"""Data and runs in S3 and GCS, on servers of this machine. KILLS=10 kills more often."""
import os
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inputs import remote
from inputs.sources import open_source
from runtime import plots
from runtime.errors import DataError
from tests.helpers.paths import ROOT
from tests.helpers.runs import assert_equal_runs, start_training
from tests.helpers.samples import members, put, reader, sample

KILLS = int(os.environ.get("KILLS", "2"))
STEPS = 40
FLAGS = ["--encoder", "micro/8", "--stages", f"resolution=16 steps={STEPS} batch=8 lr=1e-3",
         "--val-samples", "8", "--log-every", "1", "--eval-every", "10", "--save-every", "2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for n in range(3):
        put(folder / f"{n}.tar", members(20, start=20 * n))
        rows = [{"image": {"bytes": sample(i)["jpg"], "path": ""}, "txt": f"a cat {i}"}
                for i in range(20 * n, 20 * n + 20)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{n}.parquet")
    return folder


def fill(bucket, folder):
    fs = remote.filesystem(remote.scheme(bucket))
    for name in os.listdir(folder):
        fs.put_file(os.path.join(folder, name), f"{bucket}/set/{name}")
    return fs


def batches(source):
    n = len(source)
    requests = [(range(k * n, k * n + n), 8) for k in range(2)]
    read = list(reader(source).prefetch_batches(requests, lambda batch: batch))
    assert not any(bad for _, bad in read)
    return [batch for batch, _ in read]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("names", ["*", "{0..2}", "{0,1,2}"])
def test_buckets_give_the_batches_of_local_files(bucket, files, kind, names):
    fill(bucket, files)
    source = open_source(f"{bucket}/set/{names}.{kind}")
    expected = open_source(f"{files}/*.{kind}")
    assert source.fingerprint() == expected.fingerprint()
    for a, b in zip(batches(source), batches(expected)):
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_what_is_missing_or_replaced_is_one_sentence(bucket, files, monkeypatch):
    fs = fill(bucket, files)
    for where, message in ((f"{bucket}/set/9.tar", "nothing of that name"),
                           (f"{bucket}/none/*.tar", "no file matches"),
                           (f"{bucket}/set/{{2..3}}.tar", "nothing of that name")):
        with pytest.raises(DataError, match=message):
            open_source(where)
    for kind in ("tar", "parquet"):
        source = open_source(f"{bucket}/set/0.{kind}")
        shutil.rmtree(os.environ["XDG_CACHE_HOME"])
        source.span_cache.spans.clear()
        fs.put_file(files / f"1.{kind}", f"{bucket}/set/0.{kind}")
        with pytest.raises(DataError, match="has changed since it was opened"):
            batches(source)


def test_a_server_that_is_gone_is_one_sentence(servers, tmp_path):
    """Also in a bounded time, and without credentials."""
    code = """
import sys, time
from inputs import remote
from inputs.sources import open_source
from runtime.errors import run_command
remote.WAITS, remote.REQUEST_SECONDS = (0.1,), 10
sys.exit(run_command(lambda where: open_source(where) and 0, sys.argv[1]))
"""
    gone = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "STORAGE_EMULATOR_HOST": "http://127.0.0.1:9"}
    for where in ("s3://bucket/a.tar", "gs://bucket/a.tar"):
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code, where], cwd=ROOT, text=True,
                              capture_output=True, env=os.environ | servers | gone)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1].startswith(f"error: {where} cannot be read")
        assert time.monotonic() - start < 60
    keyless = {name: value for name, value in (os.environ | servers).items()
               if not name.startswith("AWS_")}
    keyless |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code, "s3://bucket/a.tar"], cwd=ROOT, text=True,
                          capture_output=True, env=keyless)
    assert "no credentials were found" in done.stderr.splitlines()[-1], done.stderr


def test_runs_in_a_bucket_killed_at_random_moments(servers, bucket, cache, tmp_path):
    """Each start is on a machine without a local copy; the run ends as the undisturbed one."""
    env = cache | servers
    rng = random.Random(0)
    url = f"{bucket}/runs/a"
    fs = remote.filesystem(remote.scheme(bucket))

    def start(n):
        return start_training(env, *FLAGS, "--workdir", url, "--cache-dir", str(tmp_path / str(n)))

    def step_in_bucket():
        names = [os.path.basename(path) for path in fs.find(url)]
        return max((int(name[5:13]) for name in names if name.startswith("step-")), default=0)

    for n in range(KILLS):
        process = start(n)
        moment = (n + rng.random()) * STEPS / (KILLS + 1)
        while process.poll() is None and step_in_bucket() < moment:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
    process = start(KILLS)
    output, errors = process.communicate()
    assert process.returncode == 0 and "continuing" in output, errors
    undisturbed = start_training(env, *FLAGS, "--workdir", str(tmp_path / "plain"))
    undisturbed.communicate()
    fs.get(url, str(tmp_path / "copy"), recursive=True)
    assert_equal_runs(tmp_path / "copy", tmp_path / "plain")
    assert set(os.listdir(tmp_path / "copy")) == set(os.listdir(tmp_path / "plain"))
    assert len(plots.read_metrics(tmp_path / "copy" / "metrics.jsonl")) >= STEPS
