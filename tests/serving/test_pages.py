"""The page on which a person tries a text, in a browser that reaches this machine alone."""

import shutil
import subprocess
from urllib.parse import quote

import pytest
from echo_server import running

from hf_moebert.serving import build_app


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
TEXT = "é𝄞 Ann <b>Lee</b>"  # offsets count characters, not units of UTF-16


class Names:
    """Predictor that finds one name."""

    def describe(self):
        return {"kind": "tagging", "labels": ["O", "PER"]}

    def check(self, inputs, options):
        pass

    def answer(self, requests):
        return [self.find(text) for text, _ in requests]

    def find(self, text):
        start = text.find("Ann")
        return [{"entity_group": "PER", "score": 0.9, "word": "Ann", "start": start, "end": start + 3}]


@pytest.mark.process
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_shows_tagged_words(tmp_path):
    with running(build_app({"names": Names()})) as url:
        alone = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", alone]
        page = f"{url}/#model=names&text={quote(TEXT)}"
        command = [BROWSER, *options, "--virtual-time-budget=20000", "--dump-dom", page]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    answer = shown.partition('<section id="answer"')[2].partition("</section>")[0]
    assert ">Ann<small>PER</small></mark> &lt;b&gt;Lee&lt;/b&gt;</p>" in answer
    assert '<p class="text">é𝄞 <mark title="0.900"' in answer
    assert '<option value="names">names (tagging)</option>' in shown
