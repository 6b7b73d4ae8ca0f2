"""Every trained cell in one page that opens offline."""
