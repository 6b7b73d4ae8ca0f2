"""What people ask of a reference cache: verify, repair, inspect, explain, clean up."""
