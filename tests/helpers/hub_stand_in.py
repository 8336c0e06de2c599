"""A stand-in of the Hugging Face hub on a real socket: the requests that upload a folder."""

import base64
import hashlib
import http.server
import json
import re
import threading
import time
from contextlib import contextmanager
from pathlib import Path

TOKEN = "hf_token_of_the_test"


class Hub:
    """Contents and behaviour of the stand-in.

    Attributes:
      repos: Files of each repository, by path.
      blobs: Uploaded large files, by SHA-256.
      refuse_commits: Whether commits fail, as without the right to write.
      xet: Directory that ``hf_xet`` stores large files in, in place of the Xet server; None to upload large
        files as LFS blobs.
      pointers: SHA-256 and size of each large file of a commit that Xet stores, by path.
    """

    def __init__(self, xet: Path | None = None):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.refuse_commits = False
        self.xet = xet
        self.pointers: dict[str, tuple[str, int]] = {}
        self.address = ""

    def preupload(self, files):
        """Tells which files are sent with the commit and which are uploaded before it."""
        modes = ["lfs" if file["path"].startswith("state/") else "regular" for file in files]
        return {
            "files": [
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
                for file, mode in zip(files, modes, strict=True)
            ]
        }

    def batch(self, objects):
        """Tells where large files are uploaded to."""
        actions = [{"upload": {"href": f"{self.address}/blobs/{o['oid']}", "header": {}}} for o in objects]
        return {
            "transfer": "basic",
            "objects": [{**o, "actions": action} for o, action in zip(objects, actions, strict=True)],
        }

    def commit(self, repo, lines):
        """Adds the files of a commit."""
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and self.xet:
                self.pointers[value["path"]] = value["oid"], value["size"]
            elif line["key"] == "lfsFile":
                data = self.blobs[value["oid"]]
                assert len(data) == value["size"]
                self.repos[repo][value["path"]] = data
        return {"commitUrl": f"{self.address}/{repo}/commit/1", "commitOid": "1", "commitMessage": "m"}


def _handler(hub: Hub):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, value, status=200):
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                pieces = []
                while size := int(self.rfile.readline(), 16):
                    pieces.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(pieces)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_GET(self):
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer({"error": "Invalid username or password."}, 401)
            if self.path == "/api/whoami-v2":
                return self.answer({"name": "tester", "type": "user", "orgs": []})
            if hub.xet and re.fullmatch(r"/api/models/.+/xet-write-token/main", self.path):
                expires = int(time.time()) + 3600
                return self.answer({"casUrl": f"local://{hub.xet}", "accessToken": "t", "exp": expires})
            if match := re.match(r"/api/models/([^/]+/[^/]+)", self.path):
                repo = match[1]
                if repo in hub.repos:
                    return self.answer({"id": repo, "sha": "1", "siblings": []})
            return self.answer({"error": f"not found: {self.path}"}, 404)

        def do_PUT(self):
            data, name = self.body(), self.path.rpartition("/")[2]
            assert hashlib.sha256(data).hexdigest() == name
            hub.blobs[name] = data
            self.answer({})

        def do_POST(self):
            data = self.body()
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer({"error": "Invalid username or password."}, 401)
            if self.path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if self.path == "/api/repos/create":
                values = json.loads(data)
                repo = f"{values.get('organization') or 'tester'}/{values['name']}"
                if repo in hub.repos:
                    return self.answer({"error": "exists", "url": f"{hub.address}/{repo}"}, 409)
                hub.repos[repo] = {}
                return self.answer({"url": f"{hub.address}/{repo}", "id": "1"})
            if match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
                return self.answer(hub.preupload(json.loads(data)["files"]))
            if re.fullmatch(r"/.+\.git/info/lfs/objects/batch", self.path):
                return self.answer(hub.batch(json.loads(data)["objects"]))
            if match := re.fullmatch(r"/api/models/(.+)/commit/main(\?.*)?", self.path):
                if hub.refuse_commits:
                    return self.answer({"error": "You cannot write to this repository."}, 403)
                return self.answer(hub.commit(match[1], [json.loads(line) for line in data.splitlines()]))
            return self.answer({"error": f"not found: {self.path}"}, 404)

    return Handler


@contextmanager
def serving(hub: Hub):
    """Serves a hub on a free port and sets its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
