"""Rows of files and of hub datasets, in whatever form they were published -> what is asked, chosen and rejected."""
