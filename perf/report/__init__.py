"""Tables of results: their columns, reading, comparing, plotting, reporting."""
