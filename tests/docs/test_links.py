"""Links as a git host follows them: by the file beside the page, and by the headings of the page they lead to."""

import pytest

from tests import ROOT
from tests.docs import PAGES, anchors, links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_of_the_repository_and_to_a_heading_in_it(page):
    for link in links(page):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: {target.name} has {sorted(anchors(target))}"
