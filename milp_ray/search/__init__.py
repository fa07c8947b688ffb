"""The layout search: surrogate and acquisition, Tune searcher, trial, journal, study, front and choice."""
