"""The page's style sheet. Colours are variables, set for light and for dark once."""

from __future__ import annotations

_RUNS = {
    "light": ("#1f6fd6", "#c2410c", "#15803d", "#9333ea", "#a16207", "#0e7490", "#be185d", "#57534e"),
    "dark": ("#6cb0ff", "#ff9e64", "#5fd38d", "#c99bff", "#e5c454", "#4fd0e0", "#ff8ab8", "#b8b2ac"),
}
_PHASES = {
    "forward": "#5b8fb9",
    "backward": "#3b6a94",
    "optimizer": "#b39a5b",
    "rest": "#9a9a9a",
    "dispatch": "#d9594c",
    "combine": "#e8998d",
}
_PAPER = {
    "light": "--paper:#fff;--ink:#1c1917;--soft:#57534e;--rule:#d6d3d1;--mark:#fef3c7;--bad:#b91c1c;--ok:#15803d;",
    "dark": "--paper:#171717;--ink:#ededed;--soft:#a8a29e;--rule:#404040;--mark:#4a3b12;--bad:#ff8a80;--ok:#5fd38d;",
}


def _variables(mode: str) -> str:
    return _PAPER[mode] + "".join(f"--run{i}:{colour};" for i, colour in enumerate(_RUNS[mode]))


STYLE = (
    f":root{{color-scheme:light dark;{_variables('light')}}}\n"
    f"@media (prefers-color-scheme:dark){{:root{{{_variables('dark')}}}}}\n"
    + "".join(f".run{i}{{--own:var(--run{i})}}\n" for i in range(len(_RUNS["light"])))
    + "".join(f".{name}{{--own:{colour}}}\n" for name, colour in _PHASES.items())
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
header,main,footer{max-width:1320px;margin:0 auto;padding:0 24px}
h1{font-size:26px;margin:24px 0 4px}
h2{font-size:20px;margin:40px 0 12px;padding-top:10px;border-top:1px solid var(--rule)}
h3{font-size:16px;margin:20px 0 8px}
nav{display:flex;flex-wrap:wrap;gap:4px 16px}
a{color:inherit}
footer{margin:40px auto 24px;color:var(--soft);font-size:13px}
.legend{display:flex;flex-wrap:wrap;align-items:center;gap:4px 18px;margin:6px 0 10px}
.key::before,.swatch{content:"";display:inline-block;width:12px;height:12px;margin-right:6px;border-radius:3px;
 vertical-align:-1px}
.key::before{background:var(--own)}
.key.coming::before{opacity:.35}
.key.fault{--own:var(--bad)}
.swatch{border:1px solid var(--rule)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:8px 0}
th,td{padding:4px 14px 4px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
tbody th{font-weight:400;color:var(--soft);white-space:nowrap}
td{overflow-wrap:anywhere;min-width:90px}
table.faults td{min-width:44px;white-space:nowrap}
table.faults td:last-child{min-width:340px;white-space:normal}
.differs{background:var(--mark)}
.mark{color:var(--bad);font-weight:600}
.ok{color:var(--ok)}.bad{color:var(--bad)}
.empty,.note,.notes{color:var(--soft)}
.note{font-size:13px}
pre{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid var(--rule);border-radius:6px;padding:12px;margin:0}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr));gap:20px 28px}
.charts.small{grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr))}
.charts>figure{max-width:760px}
figure{margin:0}
svg{display:block;width:100%;height:auto}
svg.wide{max-width:1272px}
svg text{fill:var(--soft);font:12px system-ui,sans-serif}
svg text.lane{fill:var(--own);font-weight:600;font-size:13px}
svg .label{fill:var(--ink)}
.grid{stroke:var(--rule);stroke-width:1;opacity:.6}
.axis{stroke:var(--soft);stroke-width:1}
.line{fill:none;stroke:var(--own);stroke-width:1.8;stroke-linejoin:round}
.over{stroke-dasharray:10 5}
.faint{opacity:.35;stroke-width:1}
.dashed{stroke-dasharray:4 4;stroke-width:1.2}
.dashed.over{stroke-dasharray:4 4 1 7}
.dot{fill:var(--own)}
.part,rect.training{fill:var(--own)}
rect.coming{fill:var(--own);opacity:.35}
line.fault{stroke:var(--bad);stroke-width:2.5}
svg text.fault{fill:var(--bad);font-weight:600}
.pixels{image-rendering:pixelated}
.border{fill:none;stroke:var(--rule)}
@media print{nav{display:none}section{break-inside:avoid-page}}
"""
)
