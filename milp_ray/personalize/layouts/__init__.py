"""Which layout each user's adapter has: one for all, a race, or a portfolio.

rule.py       what a user's layout is, or which ones race for it, and why
evidence.py   the rule of a run, from its study
portfolio.py  predictions from similar probe users (pure NumPy)
rungs.py      where a race cuts, and what it costs (pure)
race.py       training several layouts for some users, and stopping the worse ones
tally.py      what a batch has taken and paid
"""
