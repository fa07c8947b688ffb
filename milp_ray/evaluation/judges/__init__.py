"""Judges: which of two answers to the same query is the better one.

Each module is one judge behind :class:`~milp_ray.evaluation.judges.protocol.Judge`. A judge sees texts and
keeps none: only scores leave it.
"""
