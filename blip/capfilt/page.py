"""The look of the report: one HTML file that opens anywhere, with nothing to fetch and nothing that runs.

Whatever comes from the data goes through `said`, which escapes it; the page's own policy forbids scripts and requests besides.
Charts are inline SVG in the page's colours, so that they follow its light and dark.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

CUT = 240  # characters of a text that are shown
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]")

STYLE = """
:root{color-scheme:light dark;--paper:#fbfbf9;--card:#fff;--ink:#20262c;--soft:#66707a;--line:#dfe2e0;--fill:#eef0ee;
--kept:#17795a;--dropped:#bf3f2b;--keptwash:#e5f2ec;--droppedwash:#fbeae6;--mark:#31518f}
@media(prefers-color-scheme:dark){:root{--paper:#15181b;--card:#1d2125;--ink:#e3e6e8;--soft:#98a2ab;--line:#343a40;--fill:#272c31;
--kept:#58c79c;--dropped:#f08a76;--keptwash:#18352b;--droppedwash:#402520;--mark:#93b0ee}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
main{max-width:1140px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:20px;margin:52px 0 6px;padding-top:14px;border-top:1px solid var(--line)}
h3{font-size:15px;margin:22px 0 6px}
p{margin:6px 0 12px;max-width:78ch}
.soft,.lead,figcaption,caption{color:var(--soft)}
.lead{font-size:17px}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:18px 0 0;font-size:14px}
a{color:var(--mark)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:22px 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 16px}
.tile b{display:block;font-size:26px;line-height:1.25;font-weight:600;font-variant-numeric:tabular-nums}
.tile span{font-size:13px;color:var(--soft)}
.wide{overflow-x:auto;margin:10px 0 16px}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums;min-width:min(100%,420px)}
th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--line);vertical-align:middle}
th{font-weight:600;color:var(--soft);font-size:13px;vertical-align:bottom}
th.n,td.n{text-align:right;white-space:nowrap}
td:last-child,th:last-child{padding-right:4px}
tr.total td{font-weight:600}
tr.part td:first-child{padding-left:18px;color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:16px;margin:14px 0}
figure{margin:0}
.chart{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px 6px}
.chart figcaption{font-size:13px;margin-bottom:4px}
svg{display:block;width:100%;height:auto}
svg text{font-size:10.5px;fill:var(--soft);font-family:inherit}
.k{fill:var(--kept);stroke:var(--kept)}.d{fill:var(--dropped);stroke:var(--dropped)}.m{fill:var(--mark);stroke:var(--mark)}
.area{fill-opacity:.28;stroke-width:1.2;stroke-linejoin:round}
.axis{stroke:var(--line);fill:none}
.cut{stroke:var(--ink);stroke-dasharray:3 3;fill:none}
.key{font-size:13px;color:var(--soft);display:flex;flex-wrap:wrap;gap:4px 18px;margin:6px 0}
.key i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:6px;vertical-align:-1px;opacity:.75}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,255px),1fr));gap:16px;margin:14px 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;overflow:hidden;display:flex;flex-direction:column}
.card img{display:block;width:100%;height:190px;object-fit:contain;background:var(--fill)}
.card img.tiny{image-rendering:pixelated}
.card .name{font-size:11.5px;color:var(--soft);padding:4px 12px 0;overflow-wrap:anywhere}
.text{margin:0;padding:7px 12px;border-top:1px solid var(--line);font-size:14px;line-height:1.4;max-width:none;overflow:hidden}
.card .name+.text{border-top:0}
.card .text:last-child{flex:1}
.text q{quotes:none;overflow-wrap:anywhere}
.text small{display:block;color:var(--soft);font-size:12px;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.text.k2{background:var(--keptwash)}.text.d2{background:var(--droppedwash)}
.text.k2 q,.text.k2 b{color:var(--kept)}.text.d2 q,.text.d2 b{color:var(--dropped)}
.bar{display:block;width:170px;height:12px}
.words{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:10px 40px}
details{margin:12px 0}summary{cursor:pointer}
pre{font-size:12px;white-space:pre-wrap;overflow-wrap:anywhere;background:var(--fill);padding:12px;border-radius:8px}
ul{padding-left:20px;font-size:14px}li{overflow-wrap:anywhere}
@media print{body{background:#fff}.card,.chart{break-inside:avoid}}
"""


def said(text: str, limit: int = CUT) -> str:
    """A stranger's text as HTML shows it: escaped, what steers the display made visible, cut after `limit` characters."""
    shown = _HIDDEN.sub("\ufffd", " ".join(text[: 4 * limit].split()))
    return html.escape(shown if len(text) <= limit else f"{shown[:limit]}…")


def verbatim(text: str) -> str:
    """Text of several lines, escaped and whole."""
    return "\n".join(html.escape(_HIDDEN.sub("\ufffd", line)) for line in text.split("\n"))


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole file; `lead` and the sections' (heading, body) are HTML, an empty body is left out."""
    sections = [(heading, body) for heading, body in sections if body]
    links = "".join(f'<a href="#{_anchor(heading)}">{heading}</a>' for heading, _ in sections)
    told = "\n".join(f'<section id="{_anchor(h)}"><h2>{h}</h2>\n{body}</section>' for h, body in sections)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{said(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><main><h1>{said(title)}</h1>\n{lead}\n<nav>{links}</nav>\n{told}\n</main></body></html>\n"
    )


def _anchor(heading: str) -> str:
    return re.sub(r"\W+", "-", heading.lower())


def tiles(values: Iterable[tuple[str, str]]) -> str:
    """Large numbers with what they are: (number, words)."""
    return f'<div class="tiles">{"".join(f"<div class=tile><b>{n}</b><span>{w}</span></div>" for n, w in values)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], styles: Sequence[str] = ()) -> str:
    """Cells are HTML; a heading that begins with `#` is of a column of numbers, to the right. `styles`: a class for each row."""
    kinds = [" class=n" if name.startswith("#") else "" for name in head]
    names = "".join(f"<th{kind}>{name.lstrip('#')}</th>" for kind, name in zip(kinds, head, strict=True))
    body = []
    for number, row in enumerate(rows):
        style = f' class="{styles[number]}"' if number < len(styles) and styles[number] else ""
        body.append(f"<tr{style}>{''.join(f'<td{k}>{c}</td>' for k, c in zip(kinds, row, strict=True))}</tr>")
    return f"<div class=wide><table><thead><tr>{names}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def key(**names: str) -> str:
    """What the colours mean: kept=, dropped=, mark=."""
    return f"<div class=key>{''.join(f'<span><i style=background:var(--{c})></i>{n}</span>' for c, n in names.items())}</div>"


def number(value: float | None, digits: int = 0) -> str:
    """`1,234.5`; a dash for what is unknown."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"  # noqa: RUF001


def percent(value: float | None, digits: int = 1) -> str:
    """A value in percent."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f} %"  # noqa: RUF001


def bar(value: float, interval: tuple[float, float] | None = None, style: str = "m") -> str:
    """A share (0 to 1) as a bar, with the ends of its interval."""
    if not math.isfinite(value):
        return ""

    def x(share: float) -> float:
        return 2 + 166 * min(max(share, 0.0), 1.0)

    ends = ""
    if interval is not None and all(map(math.isfinite, interval)):
        a, b = map(x, interval)
        ends = f'<path class="{style}" d="M{a:.1f} 6H{b:.1f}M{a:.1f} 3V9M{b:.1f} 3V9"/>'
    filled = (
        f'<rect class="{style}" x="2" y="2" width="{x(value) - 2:.1f}" height="8" fill-opacity=".35" stroke="none"/>'
    )
    return f'<svg class=bar viewBox="0 0 170 12"><path class=axis d="M2 .5V11.5M168 .5V11.5"/>{filled}{ends}</svg>'


WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 300, 150, 34, 20, 8


def histogram(
    title: str, edges: NDArray[Any], layers: Mapping[str, NDArray[Any]], cut: float | None = None, digits: int = 1
) -> str:
    """Counts between `edges` [K+1], one outline a layer (class k, d or m -> [K]); heights by the square root, so that few are seen.

    `title` is HTML without tags; `cut` is marked by a dashed line.
    """
    top = max([1, *(int(layer.max(initial=0)) for layer in layers.values())])
    low, high = float(edges[0]), float(edges[-1])

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - 8) * (value - low) / (high - low)

    def y(count: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * math.sqrt(count / top)

    drawn = []
    for tick in _ticks(top):
        drawn.append(f'<path class=axis d="M{LEFT} {y(tick):.1f}H{WIDTH - 8}"/>')
        drawn.append(f"<text x={LEFT - 5} y={y(tick) + 3.5:.1f} text-anchor=end>{_short(tick)}</text>")
    for value in (low, (low + high) / 2, high):
        drawn.append(f"<text x={x(value):.1f} y={HEIGHT - 5} text-anchor=middle>{value:.{digits}f}</text>")
    for style, counts in layers.items():
        steps = [f"M{x(low):.1f} {y(0):.1f}"]
        for count, right in zip(counts.tolist(), edges[1:].tolist(), strict=True):
            steps.append(f"V{y(count):.1f}H{x(right):.1f}")
        drawn.append(f'<path class="area {style}" d="{"".join(steps)}V{y(0):.1f}Z"/>')
    if cut is not None and low <= cut <= high:
        drawn.append(f'<path class=cut d="M{x(cut):.1f} {TOP - 4}V{y(0):.1f}"/>')
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{title}">{"".join(drawn)}</svg>'
    return f"<figure class=chart><figcaption>{title}</figcaption>{picture}</figure>"


def _ticks(top: int) -> list[int]:
    """0 and up to three round counts, not too near each other on a scale of square roots."""
    found = [0]
    for power in range(len(str(top)), -1, -1):
        for lead in (5, 2, 1):
            tick = lead * 10**power
            if tick <= top and all(abs(math.sqrt(tick / top) - math.sqrt(each / top)) > 0.2 for each in found):
                found.append(tick)
    return found


def _short(count: int) -> str:
    for unit, name in ((10**9, "G"), (10**6, "M"), (1000, "k")):
        if count >= unit:
            return f"{count / unit:g}{name}"
    return str(count)


def card(picture: str, tiny: bool, name: str, texts: Sequence[tuple[str, str, bool, str]]) -> str:
    """A picture (data URI or nothing) with its texts: (who says it, text, whether it is kept, scores as HTML)."""
    shown = f'<img loading=lazy alt="" class="{"tiny" if tiny else ""}" src="{picture}">' if picture else ""
    lines = "".join(
        f'<p class="text {"k2" if kept else "d2"}"><b>{who}</b> <q dir=auto>{said(text) or "(no text)"}</q>'
        f"<small>{'✓ kept' if kept else '✗ dropped'}{scores}</small></p>"
        for who, text, kept, scores in texts
    )
    return f"<figure class=card>{shown}<div class=name>{said(name, 80)}</div>{lines}</figure>"
