"""Read a report as a browser's parser would: elements with their texts, and whether every tag is closed."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parent: Element | None = None
    parts: list[str | Element] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)

    @property
    def children(self) -> list[Element]:
        return [part for part in self.parts if isinstance(part, Element)]

    def all(self, tag: str, css: str | None = None) -> list[Element]:
        """Return the elements below this one by tag and class, in order."""
        found: list[Element] = []
        for child in self.children:
            if child.tag == tag and (css is None or css in child.attributes.get("class", "").split()):
                found.append(child)
            found += child.all(tag, css)
        return found

    def figure(self, title: str) -> Element:
        """Return the first figure of that title."""
        return next(item for item in self.all("figure") if item.all("figcaption")[0].parts[0] == title)

    def marks(self, title: str) -> list[str]:
        """Return what a plot says about each of its marks."""
        return [item.text for item in self.figure(title).all("title")]


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.at = self.root

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, self.at)
        self.at.parts.append(element)
        if tag not in VOID:
            self.at = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.at.parts.append(Element(tag, {name: value or "" for name, value in attrs}, self.at))

    def handle_endtag(self, tag: str) -> None:
        assert self.at.tag == tag, f"</{tag}> closes <{self.at.tag}>"
        assert self.at.parent is not None
        self.at = self.at.parent

    def handle_data(self, data: str) -> None:
        self.at.parts.append(data)


def parse(html: str) -> Element:
    """Parse a page; a tag that is not closed, or closed out of order, fails."""
    parser = _Parser()
    parser.feed(html)
    parser.close()
    assert parser.at is parser.root, f"<{parser.at.tag}> is not closed"
    return parser.root
