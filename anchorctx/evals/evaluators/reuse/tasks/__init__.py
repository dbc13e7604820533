"""Tasks for agents: their prompts, their problems, and exact scorers."""
