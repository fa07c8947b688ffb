"""Every way of personalising, behind one protocol, so that they can be compared.

A method is one module with a function ``fit(requests) -> list[Personalizer | None]``, one a user (``None``:
the method does not apply to that user), and a docstring that names its paper and where it departs from it.
One that trains something on all users together has a function ``share(requests) -> Shared``, too, and finds
what that returned in each request. Whoever has users and wants answers calls :func:`fit_users`:

    fitted = fit_users("retrieval_bm25", requests)
    fitted.respond([("u-17", "Where do I live?"), ("u-4", "What may I not eat?")])
    fitted.costs.stored_bytes

A method that does not come with the package goes by its module's full name. Modules are imported at first
use, since they need torch.
"""

from milp_ray.methods.catalogue import INFO, MethodInfo, in_order, label, short_label
from milp_ray.methods.fitting import Costs, Fitted, fit, fit_users, is_shared, share

__all__ = [
    "INFO",
    "Costs",
    "Fitted",
    "MethodInfo",
    "fit",
    "fit_users",
    "in_order",
    "is_shared",
    "label",
    "share",
    "short_label",
]
