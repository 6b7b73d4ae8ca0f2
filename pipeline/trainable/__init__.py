"""What a training starts from, what of it trains, and how that is saved: whole models and adapters."""
