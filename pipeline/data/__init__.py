"""Published rows -> preferences -> token tables that every later stage reads."""
