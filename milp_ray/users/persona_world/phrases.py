"""What is said around the facts: openings, small talk, frames of questions, and generic knowledge.

As in :mod:`attributes`, the last entries of ``FRAMES``, ``CHOICE_FIRST_FRAMES`` and of every list of generic
question cores are held out of pretraining.
"""

from __future__ import annotations

OPENINGS: tuple[str, ...] = (
    "By the way,",
    "Well,",
    "You know,",
    "Honestly,",
    "As I said,",
    "Today,",
    "To be fair,",
    "Just so you know,",
    "Oh,",
    "Anyway,",
    "In case it matters,",
    "Funny thing:",
)

OTHER_PEOPLE: tuple[str, ...] = (
    "my neighbour",
    "my colleague",
    "my cousin",
    "my landlord",
    "a friend of mine",
    "my old school friend",
    "the man next door",
    "the woman upstairs",
)

_WEATHER = ("sunny", "windy", "grey", "cold", "warm", "wet", "foggy", "mild")
_THINGS = ("train", "bus", "lift", "internet", "phone", "heating", "radio", "printer")
_FEELINGS = ("tired", "happy", "hungry", "busy", "calm", "curious", "sleepy", "proud")

SMALL_TALK: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("The weather was {w} again.", _WEATHER),
    ("It should be {w} tomorrow.", _WEATHER),
    ("The {w} was late this morning.", _THINGS[:2]),
    ("The {w} did not work today.", _THINGS),
    ("Somebody repaired the {w} at last.", _THINGS),
    ("I felt {w} after the long week.", _FEELINGS),
    ("Everybody seemed {w} at the meeting.", _FEELINGS),
    ("I slept for {w} hours.", ("five", "six", "seven", "eight", "nine")),
    ("I read the news for {w} minutes.", ("five", "ten", "fifteen")),
    ("The coffee tasted {w} today.", ("fine", "bitter", "weak", "great")),
    ("I watched a {w} film last night.", ("long", "funny", "sad", "boring", "new")),
    ("We talked about the {w} for an hour.", ("holidays", "elections", "match", "rent", "traffic")),
    ("Thanks for the help with the {w}.", ("letter", "form", "report", "speech")),
    ("I still have to answer {w} emails.", ("two", "three", "four", "seven")),
    ("The shop on the corner has {w} hours now.", ("new", "longer", "shorter")),
    ("I lost my {w} and found it again.", ("keys", "scarf", "ticket", "umbrella")),
)

# {core} is an indirect question without a question mark.
FRAMES: tuple[str, ...] = (
    "Do you remember {core}?",
    "Tell me {core}.",
    "Can you say {core}?",
    "I wonder {core}.",
    "Please remind me {core}.",
    "Do you know {core}?",
    "I forgot {core}.",
    "Somebody asked me {core}.",
    "Could you tell me {core}?",
    "Help me out: {core}?",
    "Let me know {core}.",
    "I cannot recall {core}.",
    "Would you tell me {core}, please?",
    "I would like to hear {core}.",
)
N_HELD_OUT_FRAMES = 2

CHOICE_FIRST_FRAMES: tuple[str, ...] = (
    "Answer first, then the reason: {core}?",
    "The answer first, please: {core}?",
    "In short and then why: {core}?",
    "First the answer, then the reason: {core}?",
)
N_HELD_OUT_CHOICE_FIRST_FRAMES = 1

# (question cores, response, the words that a right response holds)
GENERIC: tuple[tuple[tuple[str, ...], str, str], ...] = tuple(
    (tuple(core.format(*slots) for core in cores), response.format(*slots, answer), answer)
    for cores, response, entries in (
        (
            (
                "which {1} comes after {0}",
                "what {1} follows {0}",
                "which {1} is next after {0}",
                "what the next {1} after {0} is",
            ),
            "The {1} after {0} is {2}.",
            (
                (("Monday", "day"), "Tuesday"),
                (("Friday", "day"), "Saturday"),
                (("May", "month"), "June"),
                (("March", "month"), "April"),
            ),
        ),
        (
            (
                "what colour {0} has",
                "which colour is that of {0}",
                "what the colour of {0} is",
                "which colour {0} has",
            ),
            "The colour of {0} is {1}.",
            ((("snow",), "white"), (("grass",), "green"), (("blood",), "red"), (("coal",), "black")),
        ),
        (
            (
                "how many {1} {0} has",
                "what number of {1} {0} has",
                "how many {1} there are in {0}",
                "the number of {1} of {0}",
            ),
            "The number of {1} of {0} is {2}.",
            (
                (("a spider", "legs"), "eight"),
                (("a horse", "legs"), "four"),
                (("a week", "days"), "seven"),
                (("a year", "months"), "twelve"),
            ),
        ),
        (
            (
                "what the opposite of {0} is",
                "which word is the opposite of {0}",
                "what word means the opposite of {0}",
                "which word stands for the opposite of {0}",
            ),
            "The opposite of {0} is {1}.",
            ((("up",), "down"), (("left",), "right"), (("day",), "night"), (("old",), "young")),
        ),
        (
            (
                "what {0} grows into",
                "which animal {0} becomes",
                "what {0} turns into",
                "which animal {0} grows into",
            ),
            "You will see {0} grow into a {1}.",
            ((("a calf",), "cow"), (("a cub",), "bear"), (("a lamb",), "sheep"), (("a foal",), "horse")),
        ),
    )
    for slots, answer in entries
)
