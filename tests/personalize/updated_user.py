"""A user whose file has grown since the adapter was made."""

from __future__ import annotations

from dataclasses import replace

from milp_ray.users.records import Example, Turn, UserSplit


def more(split: UserSplit, *texts: str) -> UserSplit:
    """The same user, who has said more, and whose examples have moved on by one."""
    texts = texts or ("Now my dog is green.", "My oven is new.")
    example = Example("What is the colour of my house?", "Your house is grey.")
    return replace(
        split,
        history=(*split.history, *map(Turn, texts)),
        train=(*split.train, split.validation[0], example),
        validation=(*split.validation[1:], split.test[0]),
        test=split.test[1:],
    )
