"""HTML in which all text is escaped unless it was built here, so that no name can become markup."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Union

_VOID = {"img", "meta"}
_BLOCKS = {"title", "style", "head", "header", "section", "h1", "h2", "p", "li", "tr", "tbody", "figure", "svg", "g"}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Content = Union[str, int, Iterable["Content"]]  # noqa: UP007 - Python 3.10 knows no | with a name to come
"""Text, which is escaped, or `Markup`, which is not, or several of them."""


def element(tag: str, *children: Content, **attributes: str | float | None) -> Markup:
    """One element.

    Args:
        tag: its name.
        children: what it holds.
        attributes: ``class_`` stands for ``class``, ``aria_label`` for ``aria-label``; None: left out.

    >>> print(element("td", "a < b", element("b", 7), class_="wide"))
    <td class="wide">a &lt; b<b>7</b></td>
    """
    pairs = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value is not None)
    opening = "".join(f' {name}="{escape(str(value))}"' for name, value in pairs)
    end = "\n" if tag in _BLOCKS else ""
    if tag in _VOID:
        return Markup(f"<{tag}{opening}>{end}")
    return Markup(f"<{tag}{opening}>{_inner(children)}</{tag}>{end}")


def joined(separator: str, parts: Iterable[Content]) -> Markup:
    """Parts with escaped text between them.

    >>> print(joined(" & ", ["a", element("b", "<")]))
    a &amp; <b>&lt;</b>
    """
    return Markup(escape(separator).join(_inner(part) for part in parts))


def _inner(content: Content) -> str:
    if isinstance(content, Markup):
        return content
    if isinstance(content, str | int):
        return escape(str(content))
    return "".join(map(_inner, content))
