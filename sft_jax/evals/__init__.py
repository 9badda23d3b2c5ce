"""What a model does and knows, measured before, during and after training.

In come parameters, held-out rows and sets of prompts with checks; out come
plain values: losses, shares with intervals, replies.
Reading order: suite (everything that is measured); behaviors and checks;
forgetting, memorization; and beside runs: row_scores (how hard rows are),
row_selection (which of them to keep), coverage (what these are far from),
synthesis (rows that a teacher writes).
"""
