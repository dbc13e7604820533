"""Pictures of runs, of results and of attention patterns; never imports torch."""
