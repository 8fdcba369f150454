"""The page on which a person tries a text, in a browser that reaches this machine alone."""

from urllib.parse import quote

import pytest
from browser import needs_browser, show
from echo_server import running

from hf_moebert.serving import build_app


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
@needs_browser
def test_a_browser_shows_tagged_words(tmp_path):
    with running(build_app({"names": Names()})) as url:
        shown = show(f"{url}/#model=names&text={quote(TEXT)}", tmp_path)
    answer = shown.partition('<section id="answer"')[2].partition("</section>")[0]
    assert ">Ann<small>PER</small></mark> &lt;b&gt;Lee&lt;/b&gt;</p>" in answer
    assert '<p class="text">é𝄞 <mark title="0.900"' in answer
    assert '<option value="names">names (tagging)</option>' in shown
