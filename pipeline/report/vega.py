"""Write the page template of `dvc plots show`, with Vega inlined: DVC's own loads it from a CDN and is blank offline.

    python -m pipeline.report.vega .dvc/plots/offline.html

DVC fills the template with str.replace (dvc_render/html.py), so the braces of CSS and JavaScript need no doubling.
.dvc/config names it as plots.html_template, relative to .dvc/.
"""

import argparse
import re
from functools import cache
from pathlib import Path

from pipeline.files import write_text

# {refresh_tag} and {plot_divs} are DVC's; {scripts}, which would bring the CDN, is left out on purpose.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{refresh_tag}
<title>DVC plots</title>
<link rel="icon" href="data:,">
<style>
:root { font: 15px/1.5 system-ui, sans-serif; color: #1d2126; background: #f7f7f5; }
body { align-items: flex-start; margin: 0 auto; padding: 2rem 1.5rem; display: flex; flex-wrap: wrap; gap: 1rem; }
body > div { background: #fff; border: 1px solid #e2e3e0; border-radius: 10px; padding: 1rem; overflow-x: auto; }
table { border-spacing: 15px; }
</style>
<script>
@BUNDLE@
</script>
<script>
// DVC's templates declare Vega-Lite 5, which the newer one draws as well, but with a warning for each chart.
// SVG stays sharp when zoomed or printed.
const embed = window.vegaEmbed;
window.vegaEmbed = (place, { $schema, ...spec }) => embed(place, spec, { mode: "vega-lite", renderer: "svg" });
</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def write_plots_page(path: Path) -> Path:
    """Write the template (about 0.9 MB) to `path`, atomically; the folder is made."""
    write_text(path, PAGE.replace("@BUNDLE@", vega_bundle()))
    return path


@cache  # building it takes seconds
def vega_bundle() -> str:
    """Vega, Vega-Lite and vega-embed (about 0.9 MB) as one script that sets window.vega, vegaLite and vegaEmbed.

    The newest versions that vl-convert carries; safe inside a script element.
    """
    import vl_convert

    return escape_script(vl_convert.javascript_bundle())  # type: ignore[call-arg]  # its stub asks for a snippet


def escape_script(code: str) -> str:
    """`code` without what ends or confuses an HTML script element; it means the same in JS strings and regexes."""
    return re.sub(r"<(?=/script|script|!--)", r"\\x3C", code, flags=re.IGNORECASE)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.report.vega", description=__doc__.partition("\n")[0])
    parser.add_argument("path", type=Path, help="for example .dvc/plots/offline.html")
    write_plots_page(parser.parse_args().path)


if __name__ == "__main__":
    main()
