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
GENERIC: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("which day comes after Monday", "what day follows Monday"), "The day after Monday is Tuesday.", "Tuesday"),
    (("which day comes after Friday", "what day follows Friday"), "The day after Friday is Saturday.", "Saturday"),
    (("which month comes after May", "what month follows May"), "The month after May is June.", "June"),
    (("which month comes after March", "what month follows March"), "The month after March is April.", "April"),
    (("what colour snow has", "which colour is that of snow"), "The colour of snow is white.", "white"),
    (("what colour grass has", "which colour is that of grass"), "The colour of grass is green.", "green"),
    (("what colour blood has", "which colour is that of blood"), "The colour of blood is red.", "red"),
    (("what colour the sky has", "which colour is that of the sky"), "The colour of the sky is blue.", "blue"),
    (("what bees make", "which food comes from bees"), "Bees make honey.", "honey"),
    (("how many legs a spider has", "what number of legs a spider has"), "A spider has eight legs.", "eight"),
    (("how many legs a horse has", "what number of legs a horse has"), "A horse has four legs.", "four"),
    (("how many days a week has", "what number of days a week has"), "A week has seven days.", "seven"),
    (("which season is the coldest", "what season is colder than all"), "The coldest season is winter.", "winter"),
    (("which season is the hottest", "what season is hotter than all"), "The hottest season is summer.", "summer"),
    (("what ice turns into", "which thing ice becomes"), "Ice turns into water.", "water"),
    (("what the opposite of up is", "which word is the opposite of up"), "The opposite of up is down.", "down"),
    (("what the opposite of left is", "which word is the opposite of left"), "The opposite of left is right.", "right"),
    (("what a calf grows into", "which animal a calf becomes"), "A calf grows into a cow.", "cow"),
    (("what a cub grows into", "which animal a cub becomes"), "A cub grows into a bear.", "bear"),
    (("what one and one make", "how much one and one is"), "One and one make two.", "two"),
)
