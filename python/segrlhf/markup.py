"""Text for pages and pictures."""

from __future__ import annotations

import html
import re

# What XML 1.0 has no character for; a page or picture with one does not parse.
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def representable(text: object) -> str:
    """``text`` with U+FFFD for every character that HTML and XML cannot hold."""
    return _ILLEGAL.sub("\ufffd", str(text))


def escape(text: object) -> str:
    """``text`` as HTML and XML show it."""
    return html.escape(representable(text))
