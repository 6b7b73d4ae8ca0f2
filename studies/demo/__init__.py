"""Four objectives, four choices of what trains, five seeds, on the demo's known reward."""
