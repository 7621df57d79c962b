"""One HTML page a run, in one file: sections of text, tables and pictures."""

import base64
import html
import os
from collections.abc import Sequence

from sdfast import _files

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #202124; max-width: 1080px;
  margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1.2rem 0; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .4rem 1.1rem .4rem 0; border-bottom: 1px solid #e4e6e9; text-align: right; }
th:first-child, td:first-child { text-align: left; } th { color: #5f6368; font-weight: 600; }
img { max-width: 100%; } code { background: #f1f3f4; padding: .1rem .3rem; border-radius: 3px; }
footer { margin-top: 3rem; color: #5f6368; font-size: .85rem; }
"""


def text(paragraph: str) -> str:
    """A paragraph; everything in it is shown as it is."""
    return f"<p>{html.escape(paragraph)}</p>"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> str:
    """A table whose first column names the row."""

    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    words = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{words}<thead>{line(headers, 'th')}</thead><tbody>{body}</tbody></table>"


def picture(png: bytes, description: str) -> str:
    """A PNG inside the page, with the words for who cannot see it."""
    data = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(description)}">'


def section(title: str, *parts: str) -> str:
    """Parts under a heading; a later panel is one more section."""
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def write_page(path: str | os.PathLike, title: str, parts: Sequence[str], footer: str) -> None:
    """Writes the page, whole or not at all."""
    _files.write_text(
        path,
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>\n"
        + "\n".join(parts)
        + f"\n<footer>{html.escape(footer)}</footer></body></html>\n",
    )


def plain_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The same table for a terminal: the first column to the left, all others to the right."""
    lines = [[str(cell) for cell in row] for row in [headers, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *others]).rstrip()

    return "\n".join([line(lines[0]), "  ".join("─" * width for width in widths), *map(line, lines[1:])])
