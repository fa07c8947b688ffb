"""Evaluation: metrics (pure functions), per-user scores, intervals over users, and comparison tables."""
