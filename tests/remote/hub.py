"""A server that answers as the Hugging Face hub does. Its folder has one folder per commit, which
holds the repositories OWNER/NAME of that time."""
import hashlib
import json
import os
import re

from tests.helpers.web import Handler, Server

API = re.compile(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
RESOLVE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.*)")


class HubServer(Server):
    def __init__(self, folder):
        super().__init__(folder)
        self.RequestHandlerClass = HubHandler
        self.newest = "1" * 40  # commit

    def commit_folder(self, revision: str | None) -> str:
        is_commit = re.fullmatch(r"\d{40}", revision or "")
        return os.path.join(self.folder, revision if is_commit else self.newest)


def entry(repo: str, name: str) -> dict:
    """What the hub says of a file or folder."""
    path = os.path.join(repo, name)
    if os.path.isdir(path):
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    with open(path, "rb") as file:
        content = file.read()
    return {"type": "file", "path": name, "oid": hashlib.sha1(content).hexdigest(),
            "size": len(content)}


class HubHandler(Handler):
    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := RESOLVE.fullmatch(path):
            repo, revision, name = match.groups()
            commit = os.path.basename(self.server.commit_folder(revision))
            self.path = f"{commit}/{repo}/{name}"
            return super().do_GET()
        name, kind, revision, below = API.fullmatch(path).groups()
        repo = os.path.join(self.server.commit_folder(revision), name)
        if name.startswith("closed/"):
            return self.answer({"error": "gated"}, 403, "GatedRepo")
        if not os.path.isdir(repo):
            return self.answer({"error": "not found"}, 404, "RepoNotFound")
        if kind != "tree":
            return self.answer({"id": name, "sha": self.server.newest})
        entries = []
        for folder, folders, files in os.walk(os.path.join(repo, below or "")):
            names = [os.path.relpath(os.path.join(folder, one), repo) for one in folders + files]
            entries += [entry(repo, one) for one in names]
            if "recursive=true" not in self.path.lower():
                break
        if not entries:
            return self.answer({"error": "not found"}, 404, "EntryNotFound")
        return self.answer(entries)

    def answer(self, content: object, status: int = 200, code: str = "") -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(data)
