"""The web page: complete in one file, and its script works against the server."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DOM = """
const elements = {};
function element(id) {
  return elements[id] ||= {
    id, style: {}, value: "", textContent: "", hidden: true, disabled: false, children: [], listeners: {},
    addEventListener(kind, run) { this.listeners[kind] = run; },
    append(child) { this.children.push(child); },
    replaceChildren() { this.children = []; },
  };
}
globalThis.document = {
  getElementById: element, body: { scrollHeight: 0 },
  createElement: () => element("made" + Object.keys(elements).length),
};
globalThis.window = { scrollTo() {} };
const plain = globalThis.fetch;
const turned = [];
globalThis.fetch = async (path, options) => {
  const response = await plain(process.argv[2] + path, options);
  if (path.endsWith("/bits")) turned.push([path, JSON.parse(options.body).bits, response.status]);
  return response;
};
element("temperature").value = "0";
"""
RUN = """
(async () => {
  await load();
  at("bits").value = "2";
  const sent = send("The cat");  // at 2 bits
  for (const bits of ["4", "6"]) {
    at("bits").value = bits;
    at("bits").listeners.input();
  }
  await sent;
  at("clear").listeners.click();
  await send("And <b>then</b>?");
  console.log(JSON.stringify({
    model: at("model").textContent, least: at("bits").min, figures: at("figures").textContent, turns, turned,
    layers: at("layers").children.map((row) => row.children.map((cell) => cell.title || cell.textContent)),
    shown: at("turns").children.map((turn) => [turn.className, turn.textContent]),
  }));
})();
"""


def page(server) -> tuple[bytes, str]:
    with server.connect() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        received = b""
        while part := sock.recv(1 << 16):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    return head, body.decode()


def test_the_page_has_nothing_from_elsewhere(server):
    head, html = page(server)
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"default-src 'none'" in head
    assert not re.search(r"(src|href)=|https?://|@import|url\(|innerHTML|eval\(", html)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node, which runs the page's script")
def test_the_script_chats_with_the_server(server, tmp_path):
    script = re.search(r"<script>(.*)</script>", page(server)[1], re.S)[1]
    file = tmp_path / "page.js"
    file.write_text(DOM + script + RUN)
    run = subprocess.run(
        ["node", str(file), server.url], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert (seen["model"], seen["least"]) == ("tiny", 1)
    (asked, question), *answers = seen["shown"]
    assert (asked, question) == ("turn user", "And <b>then</b>?")
    assert all(kind == "turn answer" and text for kind, text in answers)
    ((path, bits, status),) = seen["turned"]  # once the id is known, to the last bits
    assert re.fullmatch("/v1/answers/chatcmpl-[0-9a-f]{32}/bits", path)
    assert (bits, status in (200, 404)) == (6, True)  # 404 if the answer has ended meanwhile
    assert seen["turns"] == [] or seen["turns"][0] == {"role": "user", "content": question}
    assert [row[0] for row in seen["layers"]] == ["qkv", "o", "gate_up", "down", "lm_head.blocks"]
    assert re.fullmatch(r"layers\.0\.qkv: \d\.\d\d bits", seen["layers"][0][1])
    assert re.fullmatch(r"\d+ tokens( · [\d.]+ tokens/s)?( · [\d.]+ bits read)?", seen["figures"])


BROWSE = """
const get = (id) => document.getElementById(id);
const until = async (done) => {
  for (let i = 0; i < 400 && !done(); i++) await new Promise((go) => setTimeout(go, 50));
  if (!done()) throw new Error("timeout: " + done);
};
await until(() => get("model").textContent === "tiny");
get("temperature").value = "0";
get("bits").value = "2";
get("bits").dispatchEvent(new Event("input"));
get("text").value = "The cat <img src=x onerror=alert(1)>";
const turned = [], plain = window.fetch;
window.fetch = async (path, options) => {
  const response = await plain(path, options);
  if (path.endsWith("/bits")) turned.push([JSON.parse(options.body).bits, response.status]);
  return response;
};
get("send").click();
get("bits").value = "6";
get("bits").dispatchEvent(new Event("input"));
await until(() => get("stop").disabled && get("turns").children.length >= 2 && get("layers").rows.length);
await until(() => turned.length);
const turns = [...get("turns").children].map((turn) => [turn.className, turn.textContent]);
const seen = {
  turns, turned, shown: get("shown").textContent, figures: get("figures").textContent,
  layers: [...get("layers").rows].map((row) => row.cells[0].textContent),
  colours: new Set([...get("layers").querySelectorAll("td")].map(
    (cell) => getComputedStyle(cell).backgroundColor
  )).size,
  images: document.images.length, height: get("turns").getBoundingClientRect().height,
};
get("clear").click();
seen.left = get("turns").children.length;
try { await fetch("https://example.com/"); seen.elsewhere = "allowed"; } catch { seen.elsewhere = "refused"; }
return seen;
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("PyQt6") is None or importlib.util.find_spec("PyQt6.QtWebEngineCore") is None,
    reason="needs a browser: pip install PyQt6 PyQt6-WebEngine",
)
def test_the_page_chats_in_a_real_browser(server):
    browser = Path(__file__).parents[1] / "helpers" / "browser.py"
    run = subprocess.run(
        [sys.executable, browser, server.url, BROWSE], capture_output=True, text=True, timeout=90, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    page = json.loads(run.stdout.splitlines()[-1])
    seen = page["result"]
    (kind, asked), (answered, answer), *_ = seen["turns"]
    assert (kind, asked) == ("turn user", "The cat <img src=x onerror=alert(1)>")
    assert answered == "turn answer"
    assert answer
    assert seen["images"] == seen["left"] == 0  # text is shown as text
    assert seen["layers"] == ["qkv", "o", "gate_up", "down", "lm_head.blocks"]
    assert seen["colours"] > 1
    assert seen["height"] > 0
    assert "6" in seen["shown"]
    ((bits, status),) = seen["turned"]
    assert (bits, status in (200, 404)) == (6, True)  # 404 if the answer has ended meanwhile
    assert re.search(r"\d+ tokens", seen["figures"])
    assert seen["elsewhere"] == "refused"
    errors = [message for message in page["console"] if not message.startswith("[DOM]")]
    assert all("example.com" in message for message in errors), errors
