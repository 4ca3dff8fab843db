"""What mkdocs does to every page: formulas become MathML, and drawings part of the page.

MathML needs no script: browsers show it by themselves. A drawing that is part of the
page takes its colours, in light and in dark mode; as an image it would not know them.
"""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert

# What the extension arithmatex leaves: <span class="arithmatex">\(...\)</span>, <div ...>\[...\]</div>.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
# Its converter does not tell the left bar of a norm from the right one, nor keeps them from growing.
BAR = "<mo>&#x02016;</mo>"
BARS = re.compile(r"\\[lr]Vert")
DRAWING = re.compile(r'<img alt="([^"]*)" src="((?:\.\./)*)(pictures/[^"]+\.svg)" ?/?>')


def on_page_content(content, page, config, files):
    """Replace formulas and drawings in the page's HTML."""
    content = FORMULA.sub(_mathml, content)
    return DRAWING.sub(lambda found: _inline(found, Path(config["docs_dir"])), content)


def _mathml(found):
    tag, tex = found[1], html.unescape(found[2]).strip()
    display = "block" if tag == "div" else "inline"
    try:
        formula = convert(tex, display=display)
    except Exception as error:
        raise ValueError(f"cannot convert the formula {tex!r}: {error!r}") from error
    formula = formula.replace("<mi>&#x0007E;</mi>", "<mo>&#x223C;</mo>")  # \sim is a relation
    for side in BARS.findall(tex):
        form = "prefix" if side == r"\lVert" else "postfix"
        bar = f'<mo stretchy="false" form="{form}" lspace="0" rspace="0">&#x2016;</mo>'
        formula = formula.replace(BAR, bar, 1)
    # Letters out of a formula are no words: the search does without them.
    return f'<{tag} class="formula" data-search-exclude>{formula}</{tag}>'


def _inline(found, docs):
    drawing = (docs / found[3]).read_text(encoding="utf-8")
    return f'<div class="drawing" role="img" aria-label="{found[1]}">{drawing}</div>'
