"""Runs on a cluster: what is looked at before they begin, and how they are submitted, watched and stopped."""
