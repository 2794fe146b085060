"""The eleven tools as schemas, and the sentences in which people ask for them. Used through `tool_world`.

A request is a noun or a verb in a frame ("Tell me the weather in {town}.") or a sentence of its own. Training has frames and
sentences of its own, and so has the test of unseen phrasings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NOUN_FRAMES = (
    "[Tell|Show|Give|Get|Find] me {}.",
    "[Please|Now|Please now] [tell|show|give|get|find] me {}.",
    "Can you [tell|show|give|get|find] me {}?",
    "I [want|need] [to know |to have |to find |]{}.",
    "[What is|Where is|Do you have|Do you know] {}?",
    "Find [out |]{}[ for me|].",
    "[Read|Send] {} to me.",
    "Let me [know|have|see] {}.",
    "Help me [with|to find|to get] {}.",
    "My question is {}.",
    "{}[, please|].",
)
NOUN_FRAMES_HELD_OUT = ("I ask for {}.", "Can you help me with {}?", "Now let me know {}.", "Please read {} to me.")
VERB_FRAMES = (
    "{}.",
    "{}[, please| for me| now].",
    "[Please|Now|Please now] {}.",
    "Can you {}[ for me|]?",
    "I [want|need|like] to {}.",
    "I want you to {}.",
    "Help me to {}.",
    "Let us {}.",
    "One thing to do is this: {}.",
)
VERB_FRAMES_HELD_OUT = ("I ask you to {}.", "Can you help me to {}?", "Now let us {}.", "It is time to {}.")


@dataclass(frozen=True)
class Asks:
    """Ways to ask, with slots in braces: nouns and verbs for the frames, and whole sentences. `[a|b]` is a or b."""

    nouns: tuple[str, ...] = ()
    verbs: tuple[str, ...] = ()
    sentences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tool:
    """A tool as a schema and as people ask for it.

    A request gives the arguments whose slots stand in it, so optional ones may be absent. `missing` are requests that leave a
    required argument out, by that argument.
    """

    name: str
    domain: str
    description: str
    slots: dict[str, str]  # argument -> kind of value: a pool of the tiny world, "number", "things" (a list), "program"
    asks: Asks
    held_out_sentences: tuple[str, ...]
    answer: str  # what to say with the result; no sentence of lab 00's facts, where known names alone stand
    missing: dict[str, Asks] = field(default_factory=dict)
    optional: tuple[str, ...] = ()

    def schema(self) -> dict[str, Any]:
        """The tool in OpenAI's form, as every chat template takes it."""
        types = {"number": {"type": "integer"}, "things": {"type": "array", "items": {"type": "string"}}}
        properties = {slot: types.get(kind, {"type": "string"}) for slot, kind in self.slots.items()}
        required = [slot for slot in self.slots if slot not in self.optional]
        parameters = {"type": "object", "properties": properties, "required": required}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


ALL_TOOLS = (
    Tool(
        name="weather",
        domain="market",
        description="Read the weather in a town.",
        slots={"town": "town", "day": "day"},
        asks=Asks(
            nouns=("the weather [in|of|for] {town}[ on {day}|]", "how the weather is in {town}[ on {day}|]"),
            sentences=(
                "[What|How] is the weather in {town}[ on {day}|]?",
                "[In|For] {town}[ on {day}|], [what|how] is the weather?",
                "On {day}, [what|how] is the weather in {town}?",
                "I go to {town}[ on {day}|]. [What|How] is the weather there?",
                "Is it good weather in {town}[ on {day}|]?",
                "Is the weather good in {town}[ on {day}|]?",
                "[In|For] {town}, is it good weather[ on {day}|]?",
                "How good is the weather [in|of] {town}[ on {day}|]?",
            ),
        ),
        held_out_sentences=(
            "Is the weather in {town} good[ on {day}|]?",
            "In {town}, is the weather good[ on {day}|]?",
        ),
        answer="The weather of {town} is {degrees}.",
        missing={
            "town": Asks(nouns=("the weather[ on {day}|]",), sentences=("[What|How] is the weather[ on {day}|]?",))
        },
        optional=("day",),
    ),
    Tool(
        name="price",
        domain="market",
        description="Find the price of things in a town.",
        slots={"thing": "thing", "town": "town"},
        asks=Asks(
            nouns=(
                "the price of {thing} in {town}",
                "what {thing} cost in {town}",
                "how much one pays for {thing} in {town}",
            ),
            sentences=(
                "How much [do|are] {thing} [cost |]in {town}?",
                "What do {thing} cost in {town}?",
                "In {town}, [how much do {thing} cost|what do {thing} cost|what is the price of {thing}]?",
                "I am in {town}. How much do {thing} cost [here|there]?",
                "For how much can one get {thing} in {town}?",
                "In {town}, for how much can [I|one] [get|buy] {thing}?",
                "{thing} cost how much in {town}?",
            ),
        ),
        held_out_sentences=("{thing} in {town} cost how much?", "In {town}, for how much does one get {thing}?"),
        answer="The {thing} cost {price} in {town}.",
        missing={
            "town": Asks(nouns=("the price of {thing}", "what {thing} cost"), sentences=("How much do {thing} cost?",)),
            "thing": Asks(nouns=("the price in {town}",), sentences=("How much does it cost in {town}?",)),
        },
    ),
    Tool(
        name="buy",
        domain="market",
        description="Buy things.",
        slots={"thing": "thing", "count": "number", "colour": "colour"},
        asks=Asks(
            verbs=("[buy|get] [me |]{count} {thing}[ in {colour}|]",),
            sentences=(
                "I [want|need] {count} {thing}[ in {colour}|][. Buy them|. Please get them|].",
                "[Of the {thing}|Of {thing}], [buy|get] [me |]{count}.",
                "My {thing} are gone. [Buy|Get] [me |]{count} more.",
                "I have no {thing}. Please buy {count}.",
                "You can [get|buy] me {count} {thing}[ in {colour}|].",
                "What I [need|want] is {count} {thing}[ in {colour}|].",
                "There are no more {thing}. I need {count}.",
                "{count} {thing}[ in {colour}|][, please| for me].",
                "It is {count} {thing}[ in {colour}|] that I [want|need].",
            ),
        ),
        held_out_sentences=("{count} {thing}[ in {colour}|] is what I need.", "There are no {thing}, so get {count}."),
        answer="The cost of {count} {thing} is {cost}.",
        missing={
            "count": Asks(verbs=("[buy|get] [me |]some {thing}[ in {colour}|]", "[buy|get] me {thing}[ in {colour}|]")),
            "thing": Asks(verbs=("[buy|get] [me |]{count}[ in {colour}|]",), sentences=("I [want|need] {count}.",)),
        },
        optional=("colour",),
    ),
    Tool(
        name="boat",
        domain="market",
        description="Find the time of a boat to a town.",
        slots={"town": "town", "day": "day"},
        asks=Asks(
            nouns=("[the|a] boat to {town} on {day}", "when [the|a] boat to {town} is on {day}"),
            sentences=(
                "When is [the|a] boat to {town} on {day}?",
                "On {day}, [when is the boat to {town}?|find me a boat to {town}.|I need a boat to {town}.]",
                "[Is there|What time is] a boat to {town} on {day}?",
                "Is there a boat on {day} to {town}?",
                "I [want|need] to [go|get] to {town} on {day}. Find me a boat.",
                "What time is the boat on {day} to {town}?",
                "I take a boat to {town} on {day}. What time is it?",
                "On {day} I go to {town}. When is the boat?",
            ),
        ),
        held_out_sentences=("On {day} I take a boat to {town}. When is it?", "Is there on {day} a boat to {town}?"),
        answer="The boat to {town} is at {time}.",
        missing={
            "day": Asks(nouns=("[the|a] boat to {town}",), sentences=("When is [the|a] boat to {town}?",)),
            "town": Asks(nouns=("[the|a] boat on {day}",), sentences=("When is [the|a] boat on {day}?",)),
        },
    ),
    Tool(
        name="shop",
        domain="market",
        description="Find the town where one can buy all of these things.",
        slots={"things": "things"},
        asks=Asks(
            nouns=("[a|the] town [for|with|that sells] {things}", "where one can [buy|get] {things}"),
            sentences=(
                "Where can [I|one] [buy|get|find] {things}?",
                "In what town can [I|one] [buy|get|find] {things}?",
                "What town [has|sells] {things}?",
                "I [want|need] {things}. Where can I [buy|get|find] [them|all of them]?",
                "Where do they have {things}?",
                "To [buy|find] {things}, [where can I go|where do I go|what town has them]?",
                "For {things}, [what town is there|where do I go]?",
            ),
        ),
        held_out_sentences=("To get {things}, what town is there?", "Where do they sell {things}?"),
        answer="One can buy that in {result_town}.",
        missing={
            "things": Asks(
                nouns=("a town to buy things",), sentences=("Where can [I|one] [buy|get|find] [it|them|all that]?",)
            )
        },
    ),
    Tool(
        name="sell",
        domain="market",
        description="Sell things in a town.",
        slots={"thing": "thing", "count": "number", "town": "town"},
        asks=Asks(verbs=("sell {count} {thing} in {town}",)),
        held_out_sentences=("In {town}, sell {count} {thing}.",),
        answer="You get {money} for the {thing}.",
    ),
    Tool(
        name="message",
        domain="office",
        description="Send a message to somebody.",
        slots={"name": "name", "day": "day"},
        asks=Asks(
            verbs=("[send|write|give] [a message to {name}|{name} a message] on {day}",),
            sentences=(
                "On {day}, [please |][send|write] [a message to {name}|{name} a message].",
                "{name} [wants|needs|gets] a message on {day}.",
                "A message [to|for] {name} on {day}[, please|].",
                "It is {day}. Send {name} a message.",
                "Let {name} get a message on {day}.",
                "On {day}, {name} [wants|gets] a message.",
                "For {name}, [write|send] a message on {day}.",
            ),
        ),
        held_out_sentences=("On {day} {name} needs a message.", "For {name}, a message on {day}."),
        answer="The message to {name} is sent on {day}.",
        missing={
            "day": Asks(verbs=("[send|write] [a message to {name}|{name} a message]",)),
            "name": Asks(verbs=("[send|write] a message on {day}",), sentences=("On {day}, [send|write] a message.",)),
        },
    ),
    Tool(
        name="job",
        domain="office",
        description="Find the job of a person.",
        slots={"name": "name"},
        asks=Asks(
            nouns=("the [job|work] of {name}", "what {name} [does|works as]", "what job {name} has"),
            sentences=(
                "What [job|work] does {name} have?",
                "What does {name} [do|work as|work]?",
                "Who is {name} at work?",
                "{name} has a job. What is it?",
                "{name} has what job?",
                "What work is it that {name} has?",
            ),
        ),
        held_out_sentences=("What does {name} have as a job?", "{name} has work. What is it?"),
        answer="The job of {name} is {job}.",
        missing={"name": Asks(nouns=("the [job|work]",), sentences=("What [job|work] is it?",))},
    ),
    Tool(
        name="work",
        domain="office",
        description="Add work of a person on a day.",
        slots={"name": "name", "job": "job", "day": "day"},
        asks=Asks(
            verbs=(
                "[add|write|put] [work for |]{name} as [a |]{job} on {day}",
                "let {name} work as [a |]{job} on {day}",
            ),
            sentences=(
                "{name} [works|is to work|wants to work] as [a |]{job} on {day}.",
                "On {day}, [add|write|put|let] {name} as [a |]{job}.",
                "On {day} {name} [works|is to work|wants to work] as [a |]{job}.",
                "I [want|need] {name} [to work |]as [a |]{job} on {day}.",
                "The {job} on {day} is {name}. [Add|Write] that.",
                "As [a |]{job}, [add|write|put] {name} on {day}.",
                "As [a |]{job}, {name} [is to work|wants to work] on {day}.",
            ),
        ),
        held_out_sentences=("On {day} I need {name} as a {job}.", "As a {job}, {name} works on {day}."),
        answer="The work as a {job} on {day} is for {name}.",
        missing={
            "day": Asks(
                verbs=("[add|write|put] {name} as [a |]{job}",), sentences=("I [want|need] {name} as [a |]{job}.",)
            ),
            "job": Asks(
                verbs=("[add|write|put] [work for |]{name} on {day}",), sentences=("{name} is to work on {day}.",)
            ),
        },
    ),
    Tool(
        name="age",
        domain="office",
        description="Get the age of a person.",
        slots={"name": "name"},
        asks=Asks(
            nouns=("the age of {name}", "how old {name} is"),
            sentences=(
                "How old is {name}?",
                "{name} is how old?",
                "How many years does {name} have?",
                "Is {name} old?",
                "What age [has|is] {name}?",
                "{name} has what age?",
                "What is the age that {name} has?",
                "Of {name} I [want|need] the age.",
            ),
        ),
        held_out_sentences=("{name} has how many years?", "Of what age is {name}?"),
        answer="The age of {name} is {age}.",
        missing={"name": Asks(nouns=("the age",), sentences=("How old is [he|she|it]?", "What age is it?"))},
    ),
    Tool(
        name="python",
        domain="office",
        description="Run a program.",
        slots={"program": "program"},
        asks=Asks(
            nouns=("{program}", "what {program} is"),
            verbs=("run {program}",),
            sentences=(
                "[What|How much] is {program}?",
                "{program} is [how much|what]?",
                "I have {program}. How much is that?",
                "What do I get for {program}?",
                "For {program}, [what|how much] is it?",
                "{program} is how many?",
                "For {program}, what do you [get|have|find]?",
                "How many do [I|you] get for {program}?",
            ),
        ),
        held_out_sentences=("How many is {program}?", "For {program}, what do I get?"),
        answer="It is {output}.",
        missing={"program": Asks(verbs=("run a program", "run it"), sentences=("[What|How much] is it?",))},
    ),
)
