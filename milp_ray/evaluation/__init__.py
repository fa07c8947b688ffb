"""Evaluation: metrics (pure functions), per-user scores, judges, intervals over users, comparison tables."""
