"""A matplotlib figure as an `<svg>` element for a page without inline styles, in the page's own colours."""

import io
import re
import warnings
from collections.abc import Iterator
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

INK = "#010203"
"""A colour nobody else uses; replaced by the page's own text colour."""

STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, read aloud, in the page's font
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": INK,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
"""matplotlib's settings for figures that become `inline_svg`."""

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_FONT = re.compile(r"(?:.*\s)?([\d.]+px)\s")
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _XLINK)


def inline_svg(figure: Figure, name: str, description: str) -> Markup:
    """The figure as an `<svg>` element, with ids that begin with `name`.

    Every `style` attribute becomes presentation attributes: the page's policy forbids inline styles.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        # The page's font draws the text, not the one that matplotlib measures it with.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in {f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"}:
                parent.remove(child)
    for element in root.iter():
        for key, value in [*_presentation(element.attrib.pop("style", ""))]:
            element.set(key, value)
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == f"{{{_XLINK}}}href":
                element.set(key, value.replace("#", f"#{name}-", 1))
            else:
                element.set(key, value.replace("url(#", f"url(#{name}-").replace(INK, "currentColor"))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    # What matplotlib's style sheet said.
    root.attrib |= {
        "role": "img",
        "aria-label": description,
        "stroke-linejoin": "round",
        "stroke-linecap": "butt",
    }
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _presentation(style: str) -> Iterator[tuple[str, str]]:
    """The declarations of a `style` attribute as attributes; of `font`, the size: the family is the page's."""
    for declaration in filter(None, map(str.strip, style.split(";"))):
        key, value = (part.strip() for part in declaration.split(":", 1))
        if key != "font":
            yield key, value
        elif size := _FONT.match(value):
            yield "font-size", size[1]
            if "bold" in value or re.search(r"\b[6-9]00\b", value):
                yield "font-weight", "bold"
