"""Generated text is data: what a terminal would obey is shown as an escape instead."""

import io
import re

from rich.console import Console
from rich.text import Text

# Controls but newline and tab, and what can hide or reorder text: bidirectional controls, line separators,
# lone surrogates (which no encoding takes) and the invisible tag characters.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)
_ASCII = str.maketrans(
    {"█": "#", "▌": "-", "─": "-", "│": "|", "·": "-", "…": "~"} | dict.fromkeys("▏▎▍▋▊▉", " ")
)

# Wrapping asks a console for nothing but its tab size.
_CONSOLE = Console(file=io.StringIO(), width=80)


def visible(text: str) -> str:
    """`text` with every control character but newline and tab as a visible escape such as `\\x1b`."""
    return _UNSAFE.sub(_escape, text)


def one_line(text: str) -> str:
    """`visible` text on one line, for titles and error messages: newlines and tabs are escapes too."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def fit(text: Text, width: int) -> Text:
    """`text` in exactly `width` terminal cells: padded, or cut with an ellipsis."""
    fitted = text.copy()
    fitted.truncate(width, overflow="ellipsis", pad=True)
    return fitted


def wrapped(text: Text, width: int) -> list[Text]:
    """`text` in lines of at most `width` cells, broken between words, and within words that are longer."""
    lines = list(text.wrap(_CONSOLE, max(width, 1), tab_size=4))
    for line in lines:
        line.rstrip()
    return lines


def for_encoding(line: Text, encoding: str) -> Text:
    """`line` with bars and rules in ASCII, of the same width, where the terminal's encoding has no others."""
    if encoding.lower().startswith("utf"):
        return line
    plain = line.copy()
    plain.plain = line.plain.translate(_ASCII)
    return plain


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
