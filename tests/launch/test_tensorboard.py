"""What a person sees: TensorBoard over a real run and a grid, in a real browser, on loopback."""

import html
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from dsdistill.compare.grid import make_grid, read_grid
from dsdistill.compare.hparams import write_hparams
from tests.compare.fake import KINDS, results_of
from tests.workers import ROOT, run_workers

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.multiprocess,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]
SEEN = """<script>
setInterval(() => {
  const found = [];
  const walk = node => {
    if (node.nodeType === 3) found.push(node.textContent);
    if (["STYLE", "SCRIPT", "TEMPLATE"].includes(node.tagName)) return;
    for (const child of [...(node.shadowRoot ? node.shadowRoot.childNodes : []), ...node.childNodes]) walk(child);
  };
  walk(document.body);
  document.title = "seen: " + found.map(text => text.trim()).filter(text => text).join(" | ");
}, 200);
</script></head>"""
"""TensorBoard's pages are made of shadow trees, which Chromium does not print: their texts go to the title."""


def write_grid(directory) -> None:
    content = {"name": "g", "source": "s", "output": str(directory), "axes": {"objective": ["att_kl", "kd"]}}
    content["axes"] |= {"task": ["cola", "rte"], "seed": [0]}
    (directory.parent / "grid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    grid = make_grid(read_grid(directory.parent / "grid.yaml"), (), KINDS)
    lines = [{"cell": c.id, "axes": dict(c.axes), "status": "done", **results_of(c.recipe)} for c in grid.cells]
    write_hparams(directory, grid.settings, lines)


class Proxy(BaseHTTPRequestHandler):
    """Passes everything on, and puts `SEEN` into the page."""

    target = ""

    def do_GET(self):
        self.answer(None)

    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def answer(self, body):
        kept = {k: v for k, v in self.headers.items() if k.lower() in ("content-type", "x-xsrf-protected")}
        request = urllib.request.Request(self.target + self.path, body, kept)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                status, kind, content = reply.status, reply.headers["Content-Type"], reply.read()
        except urllib.error.HTTPError as error:
            status, kind, content = error.code, "text/plain", error.read()
        if self.path in ("/", "/index.html"):
            content = content.replace(b"</head>", SEEN.encode(), 1)
        self.send_response(status)
        self.send_header("Content-Type", kind or "text/plain")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def url(tmp_path, recipe_content):
    """Address of a TensorBoard that has read a real run and a grid."""
    recipe_content["logging"] = {"every_steps": 1, "pictures": 3, "sentences": ["the film never begins"]}
    run_workers("tests.training.engine_workers:one_run", 1, content=recipe_content)
    write_grid(tmp_path / "grid")
    logs = tmp_path / "logs"
    logs.mkdir()
    (tmp_path / "run" / "tensorboard").rename(logs / "run")
    (tmp_path / "grid" / "hparams").rename(logs / "hparams")
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen([*command, "--load_fast=false"], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        for line in process.stderr:
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            if found:
                break
        else:
            raise AssertionError("TensorBoard did not start")
        Proxy.target = found[0]
        deadline = time.monotonic() + 120
        while "run" not in urllib.request.urlopen(f"{Proxy.target}/data/runs").read().decode():
            assert time.monotonic() < deadline, "TensorBoard read nothing"
            time.sleep(0.5)
        server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
    finally:
        process.terminate()
        process.wait(30)


def browse(address: str, *options: str) -> str:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1800"]
    command += ["--virtual-time-budget=20000", *options, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=280).stdout


EXPECTED = {
    "custom_scalars": ["training: every term beside the total", "gradient norm by layer", "likeness of layers (CKA)"],
    "images": ["pictures/attention_1", "pictures/layers"],
    "hparams": ["objective", "att_kl", "kd", "cola", "rte", "primary"],
}


@pytest.mark.timeout(900)
def test_a_browser_shows_curves_pictures_and_grids(url, tmp_path):
    for tab, expected in EXPECTED.items():
        (title,) = re.findall(r"<title[^>]*>(seen: .*?)</title>", browse(f"{url}/#{tab}", "--dump-dom"), re.DOTALL)
        seen = html.unescape(title)
        assert [text for text in expected if text not in seen] == [], f"{tab}: {seen[:2000]}"
        file = tmp_path / f"{tab}.png"
        browse(f"{url}/#{tab}", f"--screenshot={file}")
        content = imread(file)[120:, 450:, :3]  # without the bar above and the settings at the left
        colours = np.unique((content * 31).round().astype(np.uint8).reshape(-1, 3), axis=0)
        assert len(colours) > 20, f"{tab} is nearly blank: {len(colours)} colours"
