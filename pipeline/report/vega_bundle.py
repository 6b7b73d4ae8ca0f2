"""The JavaScript that draws Vega-Lite charts, as text to put into a page, so that the page needs no network."""

import re
from functools import cache


@cache  # building it takes seconds
def vega_bundle() -> str:
    """Vega, Vega-Lite and vega-embed (about 0.9 MB) as one script that sets window.vega, vegaLite and vegaEmbed.

    The newest versions that vl-convert carries; safe inside a script element.
    """
    import vl_convert

    return escape_script(vl_convert.javascript_bundle())


def escape_script(code: str) -> str:
    """`code` without what ends or confuses an HTML script element; it means the same in JS strings and regexes."""
    return re.sub(r"<(?=/script|script|!--)", r"\\x3C", code, flags=re.IGNORECASE)
