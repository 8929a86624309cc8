"""What tests of pages share: a parser that checks them, and a name that nobody should run."""

from html.parser import HTMLParser

NASTY = '<script>alert("x")</script>\'"&'


class Parsed(HTMLParser):
    """Counts tags, and checks that they close in order."""

    VOID = frozenset({"meta", "link", "input", "circle", "rect", "line", "path", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag
