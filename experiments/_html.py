"""One self-contained HTML page of groups: no network, style and script inside, data as JSON.

The page is `_inspect_page.css` and `_inspect_page.js` around the data of `_inspect`; its content security
policy forbids it to load anything.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

__all__ = ["page"]

HERE = Path(__file__).parent

BODY = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<div class="wrap">
<h1>{title}</h1>
<p class="about">{about}</p>
<noscript><p>This page needs JavaScript.</p></noscript>
<div class="controls">
<label>layer <select id="layers"></select></label>
<label>window <button id="before" title="previous window">‹</button><select id="windows"></select><button
  id="after" title="next window">›</button></label>
<span class="segments" id="names" role="group" aria-label="grouping"></span>
</div>
<div class="columns">
<main class="main">
<section class="panel" id="reading">
<div class="chips" id="chips"></div><div class="text" id="text"></div>
</section>
<section class="panel map"><h2>Group of each position</h2><div id="map"></div></section>
</main>
<div class="side">
<section class="panel card" id="card" aria-live="polite"></section>
<section class="panel metrics">
<div class="head"><h2>How good the groups are</h2>
<select id="scope" aria-label="metrics of"><option value="one">this window</option><option
  value="all">mean</option></select></div>
<table id="table"></table>
<p class="note">{note}</p>
</section>
</div>
</div>
</div>
<script type="application/json" id="data">{data}</script>
<script>
{script}
</script>
</body>
</html>
"""

NOTE = (
    "Coherence: mean cosine of a token’s content to the mean of its own group, and to those of the other "
    "groups; a token is part of its own group’s mean, so read it beside random groups. AMI: adjusted mutual "
    "information of groups and labels, 0 at chance, 1 when equal. Purity: homogeneity, how far a group holds "
    "one label only. Bold: the highest of the row."
)


def page(data: dict[str, Any], title: str, facts: list[tuple[str, str]]) -> str:
    """The page as text. `facts` are shown under the title as (name, value)."""
    about = " · ".join(f"{html.escape(name)} <b>{html.escape(value)}</b>" for name, value in facts)
    # Nothing in the data may end the script element it stands in.
    packed = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    return BODY.format(
        title=html.escape(title),
        about=about,
        note=html.escape(NOTE),
        style=(HERE / "_inspect_page.css").read_text(encoding="utf-8"),
        script=(HERE / "_inspect_page.js").read_text(encoding="utf-8"),
        data=packed,
    )
