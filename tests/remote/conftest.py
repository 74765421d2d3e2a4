"""An S3 server and a GCS emulator on this machine, each with an empty bucket; and a hub."""
import os
import threading
import uuid

import pytest

from inputs import remote
from tests.remote.hub import HubServer

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}  # which would ask a server outside


@pytest.fixture(scope="session")
def servers():
    """The environment that leads to both servers."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    from gcp_storage_emulator.server import create_server
    from moto.server import ThreadedMotoServer
    s3 = ThreadedMotoServer(port=0, verbose=False)
    s3.start()
    host, port = s3.get_host_and_port()
    gcs = create_server("127.0.0.1", 0, in_memory=True)
    gcs.start()
    gcs_port = gcs._api._httpd.server_port
    environment = ENVIRONMENT | {"AWS_ENDPOINT_URL": f"http://{host}:{port}",
                                 "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{gcs_port}"}
    os.environ.update(environment)
    yield environment
    gcs.stop()
    s3.stop()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """An imitation of the Hugging Face hub. The library reads its address once, when imported."""
    server = HubServer(tmp_path_factory.mktemp("hub"))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    before = dict(os.environ)
    os.environ |= {"HF_ENDPOINT": server.url, "HF_HOME": os.path.join(server.folder, "home")}
    remote.filesystem("hf")
    yield server
    server.shutdown()
    server.server_close()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(params=["s3", "gs"])
def bucket(request, servers, tmp_path, monkeypatch):
    """The address of an empty bucket."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote.filesystem.cache_clear()
    name = f"b{uuid.uuid4().hex[:12]}"
    fs = remote.filesystem(request.param)
    fs.mkdir(name)
    return f"{request.param}://{name}"
