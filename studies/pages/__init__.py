"""What study pages are made of: Markdown tables and claims, SVG charts, intervals, tables of runs."""
