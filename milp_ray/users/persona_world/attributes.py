"""The vocabulary of PersonaWorld: twelve attributes, eight values each, two world rules an attribute.

Templates use ``{v}`` for the value, ``{a}`` for the value with its article, ``{c}`` for what a rule makes of
it. The last entry of ``statements`` and of every list of question cores is held out of pretraining: it occurs
only in the histories and queries of users outside the pretraining population.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rule:
    """What follows from a value: ``choices[i]`` belongs to ``values[i]`` of the attribute."""

    name: str
    cores: tuple[str, ...]
    choices: tuple[str, ...]
    fact_first: tuple[str, ...]
    choice_first: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Attribute:
    """One kind of fact, how users speak of it, how it is asked for, and what follows from it."""

    name: str
    values: tuple[str, ...]
    article: bool  # whether {a} puts "a" or "an" before the value
    profile: tuple[str, ...]
    statements: tuple[str, ...]
    others: tuple[str, ...]  # the same of somebody else; {who} is "my neighbour", …
    updates: tuple[str, ...]  # {o} is the earlier value (with its article), {a} the present one
    cores: tuple[str, ...]
    answers: tuple[str, ...]
    rules: tuple[Rule, Rule]

    def with_article(self, value: str) -> str:
        """The value as it stands after a verb: "an ibis" where values take an article, else as it is."""
        if not self.article:
            return value
        return f"{'an' if value[0] in 'aeiou' else 'a'} {value}"


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute(
        name="pet",
        values=("dog", "cat", "rabbit", "parrot", "turtle", "hamster", "goldfish", "lizard"),
        article=True,
        profile=("The user keeps {a} at home.", "The user has {a} as a pet.", "At home the user has {a}."),
        statements=(
            "I keep {a} at home.",
            "My {v} woke me up early.",
            "I had to feed my {v} before work.",
            "There is {a} living with me.",
            "I took my {v} to the vet.",
            "My {v} is the best company.",
            "I bought some food for my {v}.",
            "My pet {v} made a mess again.",
            "I share my flat with {a}.",
        ),
        others=("{who} keeps {a}.", "{who} took a {v} to the vet.", "I saw the {v} of {who}."),
        updates=(
            "I gave {o} away and now I keep {a}.",
            "I used to have {o}, but now I have {a}.",
            "After {o} I now share my home with {a}.",
        ),
        cores=(
            "which animal I keep at home",
            "what kind of pet I have",
            "which pet lives with me",
            "what animal I take care of",
            "which animal shares my home",
        ),
        answers=("You keep {a} at home.", "Your pet is {a}.", "It is {a} that lives with you."),
        rules=(
            Rule(
                "houseplant",
                (
                    "which plant I should keep out of the house",
                    "what plant not to put in my living room",
                    "which plant is missing from a safe list of houseplants",
                    "what plant I had better not bring home",
                ),
                ("lilies", "ivy", "daffodils", "oleander", "azaleas", "tulips", "ferns", "holly"),
                ("Since you keep {a}, leave {c} out of the house.", "You have {a}, so do not buy {c}."),
                ("Leave {c} out of the house, because you keep {a}.",),
            ),
            Rule(
                "pet_shop",
                (
                    "what to buy at the pet shop",
                    "which thing I need from the pet shop",
                    "what I should order at the pet shop",
                    "what is on my list for the pet shop",
                ),
                ("kennel", "litter", "hay", "perch", "lamp", "wheel", "filter", "crickets"),
                ("Since you keep {a}, order the {c}.", "You have {a}, so buy the {c}."),
                ("Order the {c}, because you keep {a}.",),
            ),
        ),
    ),
    Attribute(
        name="allergy",
        values=("peanuts", "shrimp", "milk", "wheat", "soy", "sesame", "celery", "mustard"),
        article=False,
        profile=("The user is allergic to {v}.", "The user has an allergy to {v}.", "The user cannot eat {v}."),
        statements=(
            "I am allergic to {v}.",
            "I got a rash from {v}.",
            "The smallest bit of {v} makes me ill.",
            "My allergy to {v} is a nuisance.",
            "I always ask whether there is {v} in the food.",
            "The doctor confirmed my allergy to {v}.",
            "I sent the plate back because of {v}.",
            "My throat swells when I eat {v}.",
            "Eating {v} is dangerous for me.",
        ),
        others=("{who} is allergic to {v}.", "{who} got a rash from {v}.", "{who} cannot eat {v}."),
        updates=(
            "My allergy to {o} is gone, but now I react to {a}.",
            "I used to be allergic to {o}, but now it is {a}.",
            "The new test says {a}, not {o}.",
        ),
        cores=(
            "what I am allergic to",
            "which food gives me an allergy",
            "what food makes me ill",
            "which allergy I have",
            "what food my body cannot take",
        ),
        answers=("You are allergic to {v}.", "Your allergy is to {v}.", "The food that makes you ill is {v}."),
        rules=(
            Rule(
                "dish",
                (
                    "which dish I must not order",
                    "what dish to avoid in a restaurant",
                    "which dish is not safe for me",
                    "what dish on the menu is dangerous for me",
                ),
                ("satay", "paella", "custard", "pasta", "tofu", "hummus", "chowder", "vinaigrette"),
                ("Since you are allergic to {v}, avoid the {c}.", "You cannot eat {v}, so do not order {c}."),
                ("Avoid the {c}, because you are allergic to {v}.",),
            ),
            Rule(
                "snack",
                (
                    "which snack to skip at the party",
                    "what snack I should not touch",
                    "which snack I have to leave on the plate",
                    "what snack would be bad for me",
                ),
                ("brittle", "crackers", "fudge", "biscuits", "edamame", "bagels", "dip", "sausages"),
                ("Since you are allergic to {v}, skip the {c}.", "You cannot eat {v}, so leave the {c}."),
                ("Skip the {c}, because you are allergic to {v}.",),
            ),
        ),
    ),
    Attribute(
        name="diet",
        values=("vegan", "vegetarian", "kosher", "halal", "keto", "paleo", "pescatarian", "macrobiotic"),
        article=False,
        profile=("The user follows a {v} diet.", "The user eats {v} food.", "The diet of the user is {v}."),
        statements=(
            "I follow a {v} diet.",
            "I only eat {v} food.",
            "I found a new {v} restaurant.",
            "My kitchen is strictly {v}.",
            "I have been eating {v} for years.",
            "I asked the waiter for a {v} menu.",
            "My {v} diet is easy to keep.",
            "I cooked a {v} meal for friends.",
            "All of my meals are {v}.",
        ),
        others=("{who} follows a {v} diet.", "{who} only eats {v} food.", "{who} asked for a {v} menu."),
        updates=(
            "I stopped eating {o} and now I eat {a} food.",
            "I used to follow a {o} diet, but now it is {a}.",
            "My diet changed from {o} to {a}.",
        ),
        cores=(
            "which diet I follow",
            "what diet I keep to",
            "which way of eating is mine",
            "what kind of diet I have",
            "which diet suits me",
        ),
        answers=("You follow a {v} diet.", "Your diet is {v}.", "You eat {v} food."),
        rules=(
            Rule(
                "dinner",
                (
                    "what to cook for dinner",
                    "which dinner would suit me",
                    "what I could have for dinner",
                    "which dinner I should plan",
                ),
                ("lentils", "omelette", "brisket", "kebab", "steak", "venison", "salmon", "barley"),
                ("Since your diet is {v}, cook {c} tonight.", "You eat {v} food, so have {c}."),
                ("Cook {c} tonight, because your diet is {v}.",),
            ),
            Rule(
                "breakfast",
                (
                    "what to eat for breakfast",
                    "which breakfast is right for me",
                    "what I could have for breakfast",
                    "which breakfast I should prepare",
                ),
                ("oats", "yoghurt", "challah", "dates", "bacon", "berries", "kippers", "miso"),
                ("Since your diet is {v}, start with {c}.", "You eat {v} food, so prepare {c}."),
                ("Start with {c}, because your diet is {v}.",),
            ),
        ),
    ),
    Attribute(
        name="condition",
        values=("asthma", "diabetes", "arthritis", "migraine", "eczema", "insomnia", "anemia", "vertigo"),
        article=False,
        profile=("The user lives with {v}.", "The user suffers from {v}.", "The user has chronic {v}."),
        statements=(
            "I live with {v}.",
            "My {v} was bad last night.",
            "I have had {v} since I was young.",
            "The clinic checked my {v}.",
            "My {v} keeps me from sports.",
            "I read a book about {v}, because I have it.",
            "My {v} is worse in winter.",
            "I suffer from {v}.",
            "The illness I have is {v}.",
        ),
        others=("{who} suffers from {v}.", "{who} has had {v} for years.", "{who} talked about {v}."),
        updates=(
            "My {o} is cured, but now I suffer from {a}.",
            "I used to suffer from {o}, but now it is {a}.",
            "It was not {o}, the clinic says it is {a}.",
        ),
        cores=(
            "which illness I live with",
            "what chronic condition I have",
            "which condition I suffer from",
            "what illness the clinic checks",
            "which chronic illness is mine",
        ),
        answers=("You live with {v}.", "Your chronic condition is {v}.", "You suffer from {v}."),
        rules=(
            Rule(
                "activity",
                (
                    "which activity is bad for my health",
                    "what activity I should give up",
                    "which activity my doctor would forbid",
                    "what activity could harm my health",
                ),
                ("sprinting", "fasting", "jogging", "clubbing", "bathing", "napping", "diving", "climbing"),
                ("Since you live with {v}, give up {c}.", "You suffer from {v}, so avoid {c}."),
                ("Give up {c}, because you live with {v}.",),
            ),
            Rule(
                "packing",
                (
                    "what to pack for my health",
                    "which medical thing belongs in my bag",
                    "what I must pack when I travel with my illness",
                    "which medical thing I should carry",
                ),
                (
                    "inhaler",
                    "glucometer",
                    "brace",
                    "sunglasses",
                    "ointment",
                    "earplugs",
                    "supplements",
                    "cane",
                ),
                ("Since you live with {v}, pack the {c}.", "You suffer from {v}, so carry the {c}."),
                ("Pack the {c}, because you live with {v}.",),
            ),
        ),
    ),
    Attribute(
        name="medication",
        values=(
            "aspirin",
            "ibuprofen",
            "insulin",
            "warfarin",
            "statins",
            "antibiotics",
            "lithium",
            "cortisone",
        ),
        article=False,
        profile=("The user takes {v}.", "The medicine of the user is {v}.", "The user needs {v} every day."),
        statements=(
            "I take {v} every day.",
            "I picked up my {v} at the pharmacy.",
            "My doctor put me on {v}.",
            "I nearly forgot my {v}.",
            "The dose of my {v} was changed.",
            "I keep my {v} in a box.",
            "I ran out of {v}.",
            "My medicine is {v}.",
            "A bottle of {v} stands by my bed.",
        ),
        others=("{who} takes {v}.", "{who} forgot the {v}.", "The doctor put {who} on {v}."),
        updates=(
            "I stopped taking {o} and now I take {a}.",
            "I used to take {o}, but now my doctor gives me {a}.",
            "The pharmacy replaced {o} with {a}.",
        ),
        cores=(
            "which medicine I take",
            "what medication I am on",
            "which drug my doctor gave me",
            "what medicine I need every day",
            "which medication is mine",
        ),
        answers=("You take {v}.", "Your medicine is {v}.", "Your doctor put you on {v}."),
        rules=(
            Rule(
                "drink",
                (
                    "what does not mix with my medicine",
                    "which thing my medicine forbids",
                    "what I cannot have with my medicine",
                    "which thing to avoid with my medication",
                ),
                ("ginger", "wine", "lemonade", "kale", "grapefruit", "cream", "espresso", "liquorice"),
                ("Since you take {v}, avoid {c}.", "You are on {v}, so do not have {c}."),
                ("Avoid {c}, because you take {v}.",),
            ),
            Rule(
                "time",
                (
                    "when to take my medicine",
                    "at which time my medicine is due",
                    "when my medication works best",
                    "at what time I should take my medication",
                ),
                ("dawn", "lunch", "mealtimes", "dusk", "bedtime", "noon", "teatime", "sunrise"),
                ("Since you take {v}, do it at {c}.", "You are on {v}, so the time is {c}."),
                ("Do it at {c}, because you take {v}.",),
            ),
        ),
    ),
    Attribute(
        name="job",
        values=("nurse", "teacher", "carpenter", "pilot", "baker", "lawyer", "farmer", "programmer"),
        article=True,
        profile=("The user works as {a}.", "The user is {a}.", "The job of the user is {v}."),
        statements=(
            "I work as {a}.",
            "Being {a} is hard these days.",
            "My shift as {a} was long.",
            "I trained for years to be {a}.",
            "As {a} I start early.",
            "My boss says I am a good {v}.",
            "I earn my money as {a}.",
            "I have been {a} for ten years.",
            "My profession is that of {a}.",
        ),
        others=("{who} works as {a}.", "{who} wants to be {a}.", "I met {a}, a friend of {who}."),
        updates=(
            "I quit as {o} and now I work as {a}.",
            "I used to be {o}, but now I am {a}.",
            "After years as {o} I became {a}.",
        ),
        cores=(
            "what job I have",
            "which job I do",
            "what I work as",
            "what my profession is",
            "which work pays my rent",
        ),
        answers=("You work as {a}.", "You are {a}.", "Your job is that of {a}."),
        rules=(
            Rule(
                "shoes",
                (
                    "which shoes to wear at work",
                    "what shoes fit my job",
                    "which shoes I need for work",
                    "what shoes I should buy for my job",
                ),
                (
                    "clogs",
                    "loafers",
                    "boots",
                    "oxfords",
                    "slippers",
                    "brogues",
                    "wellingtons",
                    "sneakers",
                ),
                ("Since you work as {a}, wear {c}.", "You are {a}, so buy {c}."),
                ("Wear {c}, because you work as {a}.",),
            ),
            Rule(
                "course",
                (
                    "which course would help my career",
                    "what course I should take for my career",
                    "which evening course fits my career",
                    "what course would move my career",
                ),
                (
                    "hygiene",
                    "grading",
                    "joinery",
                    "navigation",
                    "sourdough",
                    "contracts",
                    "irrigation",
                    "debugging",
                ),
                ("Since you work as {a}, study {c}.", "You are {a}, so choose {c}."),
                ("Study {c}, because you work as {a}.",),
            ),
        ),
    ),
    Attribute(
        name="city",
        values=("Oslo", "Madrid", "Cairo", "Tokyo", "Lima", "Sydney", "Dublin", "Mumbai"),
        article=False,
        profile=("The user lives in {v}.", "The home town of the user is {v}.", "The user has a flat in {v}."),
        statements=(
            "I live in {v}.",
            "The streets of {v} were full when I walked home.",
            "I rent a flat in {v}.",
            "It rained all day here in {v}.",
            "I love the parks of {v}, my city.",
            "My street in {v} is quiet.",
            "I took the tram through {v} to my office.",
            "My neighbours in {v} are friendly.",
            "My address is in {v}.",
        ),
        others=("{who} lives in {v}.", "{who} moved to {v}.", "{who} sent a card from {v}."),
        updates=(
            "I left {o} and now I live in {a}.",
            "I used to live in {o}, but now it is {a}.",
            "I moved from {o} to {a}.",
        ),
        cores=(
            "which city I live in",
            "what town I call home",
            "in which city my flat is",
            "what city I come home to",
            "in what town I live",
        ),
        answers=("You live in {v}.", "Your city is {v}.", "Your home is in {v}."),
        rules=(
            Rule(
                "language",
                (
                    "which language to practise for my town",
                    "what language my neighbours speak",
                    "which language I hear in my city",
                    "what language helps me in my city",
                ),
                ("Norwegian", "Spanish", "Arabic", "Japanese", "Quechua", "English", "Irish", "Marathi"),
                ("Since you live in {v}, practise {c}.", "Your home is in {v}, so learn {c}."),
                ("Practise {c}, because you live in {v}.",),
            ),
            Rule(
                "sight",
                (
                    "what to show a guest in my city",
                    "which sight to see near my home",
                    "what sight my town is known for",
                    "which sight I should show my visitors",
                ),
                ("fjord", "palace", "pyramids", "shrines", "cathedral", "harbour", "brewery", "bazaar"),
                ("Since you live in {v}, visit the {c}.", "Your home is in {v}, so show the {c}."),
                ("Visit the {c}, because you live in {v}.",),
            ),
        ),
    ),
    Attribute(
        name="family",
        values=(
            "daughter",
            "son",
            "twins",
            "nephew",
            "niece",
            "grandmother",
            "grandfather",
            "stepsister",
        ),
        article=False,
        profile=(
            "The user looks after a family member, the {v}.",
            "The user cares for the {v}.",
            "The {v} of the user lives in the house.",
        ),
        statements=(
            "I look after my {v}.",
            "My {v} had a cold.",
            "I picked up my {v} by car.",
            "I read a story to my {v}.",
            "I made soup for my {v}.",
            "I live with my {v}.",
            "I took my {v} to the dentist.",
            "I never leave my {v} alone for long.",
            "I spend most evenings with my {v}.",
        ),
        others=("{who} looks after a {v}.", "The {v} of {who} had a cold.", "I met the {v} of {who}."),
        updates=(
            "My {o} moved out and now I look after my {a}.",
            "I used to look after my {o}, but now it is my {a}.",
            "After my {o} I now care for my {a}.",
        ),
        cores=(
            "who I look after",
            "which relative I care for",
            "what family member lives with me",
            "which member of the family needs me",
            "what relative I look after",
        ),
        answers=("You look after your {v}.", "It is your {v}.", "The relative in your care is your {v}."),
        rules=(
            Rule(
                "present",
                (
                    "what present to wrap for my family",
                    "which present my family would like",
                    "what present I should make at home",
                    "which present suits my relative",
                ),
                ("kite", "scooter", "tricycles", "drum", "puzzle", "shawl", "chessboard", "necklace"),
                ("Since you look after your {v}, wrap the {c}.", "You care for your {v}, so give the {c}."),
                ("Wrap the {c}, because you look after your {v}.",),
            ),
            Rule(
                "outing",
                (
                    "where to go on a family outing",
                    "which place is good for a family outing",
                    "where my family outing should lead",
                    "which family outing to plan",
                ),
                ("zoo", "aquarium", "playground", "circus", "ballet", "tearoom", "museum", "cinema"),
                ("Since you look after your {v}, go to the {c}.", "You care for your {v}, so try the {c}."),
                ("Go to the {c}, because you look after your {v}.",),
            ),
        ),
    ),
    Attribute(
        name="hobby",
        values=(
            "pottery",
            "archery",
            "sailing",
            "knitting",
            "fishing",
            "painting",
            "cycling",
            "gardening",
        ),
        article=False,
        profile=("The user enjoys {v}.", "The hobby of the user is {v}.", "The user spends free time on {v}."),
        statements=(
            "I enjoy {v} on weekends.",
            "I spent the whole day on {v}.",
            "My friends laugh about my {v}.",
            "I got much better at {v}.",
            "After work I relax with {v}.",
            "I joined a club for {v}.",
            "There is nothing like {v} on a free day.",
            "I started {v} as a child and never stopped.",
            "My free time goes into {v}.",
        ),
        others=("{who} enjoys {v}.", "{who} joined a club for {v}.", "{who} talks about {v} all day."),
        updates=(
            "I gave up {o} and now I do {a}.",
            "I used to enjoy {o}, but now it is {a}.",
            "My hobby changed from {o} to {a}.",
        ),
        cores=(
            "which hobby I have",
            "what I do in my free time",
            "which hobby I enjoy",
            "what my favourite pastime is",
            "which pastime fills my weekends",
        ),
        answers=("Your hobby is {v}.", "You enjoy {v}.", "In your free time you do {v}."),
        rules=(
            Rule(
                "supplies",
                (
                    "what to buy for my hobby",
                    "which supplies my hobby needs",
                    "what my hobby shop should send",
                    "which supplies to get for my pastime",
                ),
                ("clay", "arrows", "rope", "wool", "bait", "brushes", "tyres", "seeds"),
                ("Since you enjoy {v}, buy {c}.", "Your hobby is {v}, so get more {c}."),
                ("Buy {c}, because you enjoy {v}.",),
            ),
            Rule(
                "place",
                (
                    "where to spend a free Saturday",
                    "which place is best for my free Saturday",
                    "where I should go on my free Saturday",
                    "which place fits my free Saturday",
                ),
                ("studio", "range", "marina", "parlour", "lake", "gallery", "velodrome", "greenhouse"),
                ("Since you enjoy {v}, spend it at the {c}.", "Your hobby is {v}, so go to the {c}."),
                ("Spend it at the {c}, because you enjoy {v}.",),
            ),
        ),
    ),
    Attribute(
        name="budget",
        values=("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"),
        article=False,
        profile=(
            "The user can spend {v} euros.",
            "The budget of the user is {v} euros.",
            "The user has {v} euros a day.",
        ),
        statements=(
            "I can spend {v} euros.",
            "My budget is {v} euros.",
            "I never spend more than {v} euros a day.",
            "I put {v} euros aside for it.",
            "With {v} euros I have to be careful.",
            "I counted my money and there are {v} euros.",
            "My limit is {v} euros.",
            "I have {v} euros left for fun.",
            "All I can afford is {v} euros.",
        ),
        others=("{who} can spend {v} euros.", "{who} has {v} euros.", "{who} paid {v} euros."),
        updates=(
            "My budget went from {o} to {a} euros.",
            "I used to have {o} euros, but now it is {a} euros.",
            "It is no longer {o}, I can spend {a} euros now.",
        ),
        cores=(
            "how much I can spend",
            "what my budget is",
            "how much money I have",
            "what limit my money has",
            "how much money I may spend",
        ),
        answers=("You can spend {v} euros.", "Your budget is {v} euros.", "You have {v} euros."),
        rules=(
            Rule(
                "stay",
                (
                    "where to sleep within my budget",
                    "which place to stay I can pay for",
                    "where I can stay for my money",
                    "which stay my budget allows",
                ),
                (
                    "hostel",
                    "campsite",
                    "dormitory",
                    "guesthouse",
                    "motel",
                    "cottage",
                    "apartment",
                    "hotel",
                ),
                ("Since you have {v} euros, book the {c}.", "Your budget is {v} euros, so take the {c}."),
                ("Book the {c}, because you have {v} euros.",),
            ),
            Rule(
                "meal",
                (
                    "which meal out I can pay for",
                    "what meal my budget allows",
                    "which meal out is within my money",
                    "what meal I can afford",
                ),
                ("sandwich", "pizza", "curry", "sushi", "tapas", "fondue", "lobster", "banquet"),
                ("Since you have {v} euros, order the {c}.", "Your budget is {v} euros, so eat the {c}."),
                ("Order the {c}, because you have {v} euros.",),
            ),
        ),
    ),
    Attribute(
        name="tool",
        values=("drill", "chisel", "sander", "wrench", "chainsaw", "lathe", "welder", "jigsaw"),
        article=True,
        profile=("The user owns {a}.", "The tool of the user is {a}.", "In the workshop the user has {a}."),
        statements=(
            "I own {a}.",
            "I fixed it with my {v}.",
            "My {v} needs some oil.",
            "I left my {v} in the workshop.",
            "My {v} is loud but useful.",
            "I lent out my {v} and got it back.",
            "I work with my {v} in the cellar.",
            "My favourite tool is my {v}.",
            "In my toolbox there is {a}.",
        ),
        others=("{who} owns {a}.", "{who} broke {a}.", "I borrowed nothing but saw the {v} of {who}."),
        updates=(
            "I sold {o} and now I own {a}.",
            "I used to own {o}, but now I have {a}.",
            "I replaced {o} with {a}.",
        ),
        cores=(
            "which tool I own",
            "what tool is in my workshop",
            "which tool I work with",
            "what tool I have in the cellar",
            "which tool lies in my toolbox",
        ),
        answers=("You own {a}.", "Your tool is {a}.", "In your workshop there is {a}."),
        rules=(
            Rule(
                "project",
                (
                    "what to make in my workshop",
                    "which project fits my workshop",
                    "what project I could start in the workshop",
                    "which project my toolbox allows",
                ),
                ("shelf", "carving", "table", "plumbing", "firewood", "bowl", "gate", "birdhouse"),
                ("Since you own {a}, start with the {c}.", "You have {a}, so plan the {c}."),
                ("Start with the {c}, because you own {a}.",),
            ),
            Rule(
                "safety",
                (
                    "what to put on for safety in the workshop",
                    "which safety gear I need",
                    "what safety gear fits my tool",
                    "which safety gear belongs in my workshop",
                ),
                ("goggles", "gloves", "mask", "kneepads", "helmet", "apron", "visor", "earmuffs"),
                ("Since you own {a}, put on the {c}.", "You have {a}, so use the {c}."),
                ("Put on the {c}, because you own {a}.",),
            ),
        ),
    ),
    Attribute(
        name="speech",
        values=("brief", "formal", "cheerful", "blunt", "poetic", "playful", "technical", "gentle"),
        article=False,
        profile=("The user likes {v} answers.", "The tone of the user is {v}.", "The user speaks in a {v} way."),
        statements=(
            "I like {v} answers.",
            "Please be {v} when you write to me.",
            "My own letters are always {v}.",
            "People say that my tone is {v}.",
            "I prefer a {v} tone.",
            "I try to sound {v}.",
            "A {v} style is what I want.",
            "My way of talking is {v}.",
            "Talk to me in a {v} voice.",
        ),
        others=("{who} likes {v} answers.", "{who} always sounds {v}.", "{who} wrote a {v} letter."),
        updates=(
            "I no longer want {o} answers, be {a} now.",
            "I used to like a {o} tone, but now I prefer {a}.",
            "My tone went from {o} to {a}.",
        ),
        cores=(
            "which tone I like",
            "what style of answer I prefer",
            "which way of talking I like",
            "what tone you should use with me",
            "which style of talking is mine",
        ),
        answers=("You like a {v} tone.", "You prefer {v} answers.", "Your style is {v}."),
        rules=(
            Rule(
                "greeting",
                (
                    "how a letter to me should begin",
                    "which greeting to use with me",
                    "what greeting I would like",
                    "which greeting fits me",
                ),
                ("hi", "greetings", "hooray", "listen", "behold", "yoohoo", "ping", "dearest"),
                ("Since you like a {v} tone, begin with {c}.", "You prefer {v} answers, so say {c}."),
                ("Begin with {c}, because you like a {v} tone.",),
            ),
            Rule(
                "closing",
                (
                    "how a letter to me should end",
                    "which closing word to use with me",
                    "what closing word I would like",
                    "which closing word fits me",
                ),
                ("bye", "sincerely", "cheers", "enough", "farewell", "toodles", "over", "hugs"),
                ("Since you like a {v} tone, end with {c}.", "You prefer {v} answers, so close with {c}."),
                ("End with {c}, because you like a {v} tone.",),
            ),
        ),
    ),
)

BY_NAME: dict[str, Attribute] = {attribute.name: attribute for attribute in ATTRIBUTES}
