"""One click command per DVC stage, and the inspection commands."""
