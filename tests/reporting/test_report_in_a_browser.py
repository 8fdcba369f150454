"""The report of a compression in a browser: in light and dark, on a telephone and a screen, without network."""

import html
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from browser import needs_browser, show
from test_compression_report import result

from hf_moebert.reporting.compression import write_compression_report


pytestmark = [pytest.mark.process, needs_browser]

WIDTHS = (400, 1200)
LONG = {
    "tried": "half of the layers, pruned to 50 %, experts, int8 " * 3,
    "steps": "20",
    "difference": "-0.0100",
    "speed-up": "2.00x",
}
MEASURE = """
<!doctype html><meta charset="utf-8"><body><script>
const look = frame => {
  const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
  const style = view.getComputedStyle(page.body), scrolls = e => e.closest(".wide") !== null;
  const outside = [...page.querySelectorAll("main *")].filter(e => !scrolls(e) || e.className === "wide")
    .filter(e => e.getBoundingClientRect().right > root.clientWidth + 1 || e.getBoundingClientRect().left < -1);
  return {width: root.clientWidth, inner: root.scrollWidth, outside: outside.map(e => e.outerHTML.slice(0, 80)),
          ink: style.color, page: style.backgroundColor, height: root.scrollHeight,
          asked: view.performance.getEntriesByType("resource").map(e => e.name),
          title: view.getComputedStyle(page.querySelector("h1")).color};
};
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(look);
  document.body.innerHTML = "<pre></pre>";
  document.querySelector("pre").textContent = JSON.stringify(found);
});
</script>
""" + "".join(
    f'<iframe src="/report.html" style="width: {width}px; height: 800px; border: 0"></iframe>' for width in WIDTHS
)


class Pages(BaseHTTPRequestHandler):
    """Server and proxy of the browser: whatever it asks for is noted."""

    def do_GET(self):
        self.server.asked.append(self.path)
        text = self.server.pages.get("/" + self.path.rpartition("/")[2])
        self.send_response(404 if text is None else 200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write((text or "").encode())

    do_POST = do_CONNECT = do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    _, page = write_compression_report(folder, result(candidates=[LONG]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.asked, server.pages = [], {"/": MEASURE, "/report.html": page.read_text()}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def luminance(color):
    """Relative luminance of `rgb(…)`, as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_all_can_be_read_and_no_request_leaves(pages, tmp_path, scheme):
    place = f"127.0.0.1:{pages.server_port}"
    pages.asked.clear()
    shown = show(f"http://{place}/", tmp_path, scheme=scheme, proxy=place)
    found = json.loads(html.unescape(re.search("<pre>(.*)</pre>", shown, re.DOTALL)[1]))
    assert [view["width"] for view in found] == pytest.approx(WIDTHS, abs=20)  # less a scroll bar
    for view in found:
        assert view["inner"] <= view["width"], view
        assert not view["outside"]
        assert not view["asked"]
        assert view["height"] > 800  # it was laid out
        assert (luminance(view["page"]) > 0.5) == (scheme == "light")
        assert contrast(view["ink"], view["page"]) > 7
        assert contrast(view["title"], view["page"]) > 4.5
    mine = {
        path.removeprefix(f"http://{place}") for path in pages.asked if "google.com" not in path
    }  # the browser's own
    assert mine <= {"/", "/report.html", "/favicon.ico"}
