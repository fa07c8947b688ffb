"""PersonaWorld: embedded users on which ways of personalising can be told apart.

A user has 8 to 12 facts over twelve attributes (pet, allergy, diet, condition, medication, job, city, family,
hobby, budget, tool, manner of speech). One or two of the facts have changed over time. The history mentions
every present fact one to four times, in varied wording, among other people's facts and small talk: 20 to 60
turns, or 180 to 240 for a *long* user, whose history is several times the embedded base's context.

Examples ask about the facts and are tagged:

* ``kind``: *direct* (recall of a value), *implicit* (the answer follows from a value by a rule of the world:
  who keeps a dog leaves lilies out of the house; two rules an attribute), *changed* (direct or implicit,
  about a fact that changed: the latest value counts), *generic* (no fact is needed; it detects damage);
* ``exposure``: *seen* facts also stand in the user's training examples, *unseen* ones in the history only.
  Whole attributes are unseen, and of a seen attribute one rule is never trained on;
* ``order``: *fact_first* («Since you keep a dog, …») or *choice_first* («Leave lilies …, because …»), which
  the wording of the question asks for; *none* for direct questions;
* ``mentions``: how often the history states the present value.

``Example.answer`` is the word that a right response holds (the value, or what the rule makes of it); a guess
among an attribute's eight values is right in one of eight cases. ``User.profile`` lists all present facts:
it is the oracle, a ceiling, and no method that is compared may read it except the ceiling itself.

Every user wants responses in a form of their own, which the training examples show and nothing else tells.

In time order a user's examples are train (seen facts, first rule, generic), validation and test (both mostly
unseen facts). Test questions use wordings that neither pretraining nor the user's training examples have;
histories use some turns that pretraining never had. The pretraining population (seeds from
:data:`PRETRAINING_FIRST` up) is disjoint from every user that :func:`generate_users` can make.
"""

from milp_ray.users.persona_world.generator import (
    PRETRAINING_FIRST,
    evaluation_rng,
    generate_users,
    population_rng,
    pretraining_rng,
)

__all__ = ["PRETRAINING_FIRST", "evaluation_rng", "generate_users", "population_rng", "pretraining_rng"]
