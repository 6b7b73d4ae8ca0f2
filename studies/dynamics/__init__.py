"""What happens to chosen and rejected responses while objectives train."""
