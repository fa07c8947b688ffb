"""New history: users' adapters continued with what is new, and the old version kept where that costs it."""

from milp_ray.personalize.update.stage import UpdateInterrupted, update
from milp_ray.personalize.update.summary import UpdateSummary, update_table

__all__ = ["UpdateInterrupted", "UpdateSummary", "update", "update_table"]
