"""The report of a compression: one page without network, that shows texts as they are."""

from html.parser import HTMLParser

import pytest

from hf_moebert.reporting.compression import HEADLINES, write_compression_report


EVIL = "<script>alert(1)</script> | `x`"


def model(speed_up, **difference):
    return {
        "source": "m",
        "optimized": None,
        "footprint": {"total": 10, "active": 5, "nonzero": 10, "pruned": 0, "pruned_nonzero": 0, "bytes_on_disk": 40},
        "scores": {"accuracy": {"value": 0.9, "low": 0.8, "high": 1.0}},
        "differences": {"accuracy": difference} if difference else None,
        "speed_up": speed_up and {"median": speed_up, "low": speed_up, "high": speed_up},
    }


def result(outcome="met", **more):
    return {
        "verdict": {"outcome": outcome, "reasons": [EVIL], "metric": "accuracy", "speedup": 2.0, "size": 20},
        "labelled": False,
        "layers": {"given": [5, 5], "chosen": [2, 3]},
        "experts": [[0.25, 0.75], [0.5, 0.5]],
        "chosen": "compressed",
        "stages": [
            {"stage": "1-prune", "options": {"method": EVIL, "speed_up": None}, "parameters": 5, "seconds": 1.2},
            {"stage": "2-distil", "options": {}, "parameters": 5, "seconds": 1.2, "losses": [[1, 2.0], [2, 1.5]]},
        ],
        "measurement": {
            "baseline": "given",
            "models": {"given": model(None), "compressed": model(2.0, value=-0.01, low=-0.02, high=0.0)},
            "command": EVIL,
            "seed": 0,
            "settings": {"examples": 100},
            "environment": {"cpu": EVIL},
        },
        **more,
    }


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("outcome", HEADLINES)
def test_the_page_stands_alone_and_shows_texts_as_they_are(tmp_path, outcome):
    candidates = [{"tried": EVIL, "steps": "20", "difference": "-0.0100", "speed-up": "1.50x"}]
    markdown, page = write_compression_report(tmp_path, result(outcome, candidates=candidates))
    text = page.read_text()
    parsed = Tags(text)
    assert not parsed.open
    assert "script" not in parsed.tags
    assert not {"src", "href"} & {name for name, _ in parsed.attributes}
    assert HEADLINES[outcome] in text
    assert text.count("&lt;script&gt;") == 6  # a reason, an option, a candidate twice, the command, the processor
    assert parsed.tags.count("svg") == 3  # the front, the layers, a loss
    assert (parsed.tags.count("circle"), parsed.tags.count("rect"), parsed.tags.count("polyline")) == (3, 4, 1)
    assert "50% compressed" in text
    assert "no labels" in text
    assert "<td>25%</td><td>75%</td>" in text
    assert markdown.read_text().startswith(f"# {HEADLINES[outcome]}")
    assert "<script>" not in markdown.read_text()
