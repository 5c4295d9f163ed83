"""Measure one case or many: workers, clocks, memory, the check against float64, the sweep."""
