"""An HTML page as a tree, and the curves and pictures that it shows, as others read them."""

import base64
import io
from html.parser import HTMLParser

import torch
from PIL import Image

VOID = {"meta", "img"}


class Node:
    def __init__(self, tag, attrs, parent):
        self.tag, self.attrs, self.parent, self.children = tag, attrs, parent, []

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag, class_=None):
        """Elements below, in the order of the page."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                fits = child.tag == tag and (class_ is None or class_ in child.attrs.get("class", "").split())
                found += [child] * fits + child.all(tag, class_)
        return found

    def everything(self):
        return [self] + [node for child in self.children if isinstance(child, Node) for node in child.everything()]


class Tree(HTMLParser):
    """The page as a tree; a tag that is not closed in order is an error."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.root = self.here = Node("", {}, None)
        self.feed(page)
        self.close()
        assert self.here is self.root

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        node = Node(tag, dict(attrs), self.here)
        self.here.children.append(node)
        if tag not in VOID:
            self.here = node

    def handle_startendtag(self, tag, attrs):
        raise AssertionError(f"<{tag}/> means nothing in HTML")

    def handle_endtag(self, tag):
        assert tag == self.here.tag
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.children.append(data)


def curves(figure):
    """(class, name) -> points of each curve."""
    found = {}
    for group in figure.all("g"):
        title, line = group.all("title"), group.all("polyline")
        if title and group.all("text") == []:
            points = [tuple(map(float, point.split(","))) for point in line[0].attrs["points"].split()]
            key = group.attrs["class"], title[0].text
            assert key not in found
            found[key] = points
    return found


def levels(image):
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def decoded(uri):
    """The pixels ``(C, H, W)`` of a data URI, as another library reads them."""
    kind, _, code = uri.partition(",")
    assert kind == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(code, validate=True)))
    assert image.format == "PNG"
    channels = {"L": 1, "RGB": 3}[image.mode]
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(image.height, image.width, channels).permute(2, 0, 1)
