"""Web pages in one file: no scripts, no fonts and no pictures from elsewhere."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: .9rem; display: block; overflow-x: auto; }
td, th { border-bottom: 1px solid #8884; padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
img { max-width: 100%; background: white; border-radius: 4px; }
.lead { font-size: 1.1rem; border-left: 4px solid #2a7; padding-left: 1rem; }
.warn { border-left-color: #c33; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page of a title and parts that are HTML already."""
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def lead(text: str, warning: bool = False) -> str:
    """The sentence that matters."""
    return f'<p class="lead{" warn" if warning else ""}">{html.escape(text)}</p>'


def section(title: str, *parts: str) -> str:
    """A heading and what belongs to it."""
    return f"<h2>{html.escape(title)}</h2>\n" + "\n".join(parts)


def paragraph(text: str) -> str:
    """Plain text."""
    return f"<p>{html.escape(text)}</p>"


def bullets(lines: Iterable[str]) -> str:
    """A list."""
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> str:
    """A table of text.

    Example:
        >>> table([["a", "<b>"]])
        '<table><tr><td>a</td><td>&lt;b&gt;</td></tr></table>'
    """
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = [f"<tr>{head}</tr>"] if header else []
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def picture(figure: Figure, text: str) -> str:
    """A figure inside the page, with a text for those who cannot see it."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    code = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{code}">'
