"""Lessons: rows and prompts of their arms, figures of runs, verdicts."""
