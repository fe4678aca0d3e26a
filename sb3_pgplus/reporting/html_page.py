"""The shell of every HTML page of the package: one file, light and dark, readable on a phone, nothing from outside."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

STYLE = """
:root { color-scheme: light dark; --text: #1d2430; --soft: #5a6472; --page: #ffffff; --card: #f5f7f9; --line: #dce1e7;
  --accent: #1f6fb2; --second: #c2571a; --good: #1a7f37; --note: #5a6472; --warning: #9a6700; --problem: #c62828 }
@media (prefers-color-scheme: dark) { :root { --text: #e3e7ec; --soft: #9aa4b1; --page: #14181d; --card: #1d232a;
  --line: #38414c; --accent: #6cb6ff; --second: #f0883e; --good: #57c769; --note: #9aa4b1; --warning: #e0b341;
  --problem: #ff7b72 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75em; margin: 0 auto; padding: 1em; color: var(--text);
  background: var(--page) }
h1 { font-size: 1.6em; margin: .6em 0 .2em } h2 { font-size: 1.25em; margin: 1.8em 0 .6em }
h3 { font-size: 1em; margin: 0 0 .3em } p { margin: .4em 0 } .soft { color: var(--soft) } small { color: var(--soft) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .3em .8em; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
td:first-child, th:first-child { text-align: left; padding-left: 0 } th { font-weight: 600; white-space: nowrap }
pre { background: var(--card); padding: 1em; overflow: auto; border-radius: .5em; font-size: .85em }
code { font-size: .92em; overflow-wrap: anywhere } summary { cursor: pointer; margin: .8em 0 }
svg { width: 100%; height: auto; display: block } svg text { font-family: system-ui, sans-serif !important }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20em), 1fr)); gap: 1em }
.card { background: var(--card); border-radius: .5em; padding: .9em 1em; border-left: .3em solid var(--line) }
.curve { max-width: 46em } video { max-width: 100%; border-radius: .5em }
.good { border-left-color: var(--good) } .note { border-left-color: var(--note) }
.warning { border-left-color: var(--warning) } .problem { border-left-color: var(--problem) }
.mark { font-weight: 700 } .good .mark { color: var(--good) } .note .mark { color: var(--note) }
.warning .mark { color: var(--warning) } .problem .mark { color: var(--problem) }
p.warning .mark { color: var(--warning) }
.bar { display: flex; height: 1.4em; border-radius: .4em; overflow: hidden; margin: .6em 0 }
.plotly-graph-div { background: white }
"""


def document(title: str, parts: Iterable[str], head: str = "") -> str:
    """
    :param title: of the page, plain text
    :param parts: HTML, one after the other
    :param head: more HTML for the head
    :return: the page
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>{head}</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """
    :param head: names of the columns, plain text
    :param rows: cells, plain text
    :return: HTML
    """
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'
