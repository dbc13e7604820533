"""Before renting: memory, time and the cheapest configuration of a run, from its configuration alone."""
