"""The page builder: what is given is shown as it is, and nothing is taken for markup."""

from html.parser import HTMLParser

from sdfast import report


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_is_whole_and_escapes_what_it_shows(tmp_path):
    parts = [
        report.section("α < 1 & more", report.text("<b>"), report.picture(b"png", 'say "hi"')),
        report.section("Table", report.table(["method", "%"], [["a<b", 1.5]])),
    ]
    report.write_page(tmp_path / "index.html", "1 < 2", parts, "sdfast")
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    for shown in ("1 &lt; 2", "α &lt; 1 &amp; more", "&lt;b&gt;", "a&lt;b", "say &quot;hi&quot;", "base64,cG5n"):
        assert shown in page


def test_the_plain_table_lines_up():
    table = report.plain_table(["method", "accuracy (%)"], [["cross entropy", "7.5"], ["own", "97.5 ± 0.3"]])
    assert table.splitlines() == [
        "method         accuracy (%)",
        "─────────────  ────────────",
        "cross entropy           7.5",
        "own              97.5 ± 0.3",
    ]
