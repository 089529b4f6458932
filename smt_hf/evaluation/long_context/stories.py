"""bAbI's stories of tasks 1 to 3: files of them, and worlds that make up new ones.

A world has four people, six rooms and three objects. In task 1 people move; in tasks 2 and 3 they also take objects
along and leave them. The rules and words are those of facebookarchive/bAbI-tasks (Weston et al. 2015,
https://arxiv.org/abs/1502.05698) and of the published files, which have more verbs and begin with everybody anywhere.
The room that the facts mention last is the answer to 51, 35 and 14 % of the made-up questions of tasks 1 to 3, and to
53, 40 and 14 % of the published test questions.
"""

import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from smt_hf.errors import InputError

ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
PEOPLE = ("John", "Mary", "Sandra", "Daniel")
OBJECTS = ("apple", "football", "milk")
_GOES = ("went to", "went back to", "journeyed to", "travelled to", "moved to")
_TAKES = ("took", "got", "grabbed", "picked up")
_LEAVES = ("dropped", "discarded", "left", "put down")
NUM_QUESTIONS = 5  # of one world
RECENT = 5  # task 1 asks for people whose last fact is one of so many; in the published files no other is asked for
MOVES = 2 / 3  # of the facts of tasks 2 and 3, about as in the published files

_LINE = re.compile(r"(\d+) ([^\t]+?)\s*(?:\t([^\t]+)\t([\d ]+))?")


@dataclass(frozen=True)
class Story:
    """Facts, and one question about them."""

    facts: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]  # numbers of the facts that the answer follows from, in order


def read_stories(path: Path) -> list[Story]:
    """All questions of a bAbI file, each with the facts before it.

    Raises:
        InputError: no such file, or not of this format.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as a bAbI file: {error}.") from error
    stories: list[Story] = []
    facts: dict[int, str] = {}
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise InputError(f"{path}, line {place} is not a line of bAbI: `1 Mary moved to the bathroom.`")
        number, text = int(match[1]), match[2]
        if number == 1:
            facts = {}
        if match[3] is None:
            facts[number] = text
            continue
        order = list(facts)
        support = [order.index(int(word)) for word in match[4].split() if int(word) in facts]
        stories.append(Story(tuple(facts.values()), text, match[3], tuple(sorted(support))))
    if not stories:
        raise InputError(f"{path} has no question.")
    return stories


@dataclass
class World:
    """Where everybody and everything is, and what the facts so far tell of it.

    `move` and `handle` make the next fact.
    """

    rng: random.Random
    facts: list[str] = field(default_factory=list)
    room_of: dict[str, str] = field(default_factory=dict)
    place_of: dict[str, str] = field(default_factory=dict)  # objects -> a room, or who carries them
    told: dict[str, int] = field(default_factory=dict)  # people -> number of the fact about their room
    handled: dict[str, tuple[int, str]] = field(default_factory=dict)  # objects -> the last fact about them, its person
    dropped: dict[str, tuple[str, int] | None] = field(default_factory=dict)  # objects -> room, fact about the room
    # Objects -> their rooms as far as the facts tell, each with the numbers of those facts.
    history: dict[str, list[tuple[str, tuple[int, ...]]]] = field(
        default_factory=lambda: {name: [] for name in OBJECTS}
    )

    def __post_init__(self):
        self.room_of |= {person: self.rng.choice(ROOMS) for person in PEOPLE}
        self.place_of |= {thing: self.rng.choice(ROOMS) for thing in OBJECTS}

    def move(self) -> None:
        person, room = self.rng.choice([(p, r) for p in PEOPLE for r in ROOMS if r != self.room_of[p]])
        self.room_of[person] = room
        self.told[person] = len(self.facts)
        self.facts.append(f"{person} {self.rng.choice(_GOES)} the {room}.")

    def handle(self) -> bool:
        """Somebody takes or leaves an object, if anybody can."""
        takes = [(p, o) for p in PEOPLE for o in OBJECTS if self.place_of[o] == self.room_of[p]]
        leaves = [(p, o) for p in PEOPLE for o in OBJECTS if self.place_of[o] == p]
        if not takes + leaves:
            return False
        person, thing = self.rng.choice(takes + leaves)
        is_taken = (person, thing) in takes
        self.handled[thing] = len(self.facts), person
        self.place_of[thing] = person if is_taken else self.room_of[person]
        self.dropped[thing] = None
        if not is_taken and person in self.told:
            self.dropped[thing] = self.room_of[person], self.told[person]
        verb = self.rng.choice(_TAKES if is_taken else _LEAVES)
        self.facts.append(f"{person} {verb} the {thing}{self.rng.choice(('', ' there'))}.")
        return True

    def whereabouts(self, thing: str) -> tuple[str, tuple[int, ...]] | None:
        """The room of an object and the two facts that tell it, if they do."""
        if thing not in self.handled:
            return None
        number, person = self.handled[thing]
        if self.place_of[thing] == person:
            known = (self.room_of[person], self.told[person]) if person in self.told else None
        else:
            known = self.dropped[thing]
        return None if known is None else (known[0], tuple(sorted({number, known[1]})))

    def known_things(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The objects whose room the facts tell, each with `whereabouts`."""
        return {thing: found for thing in OBJECTS if (found := self.whereabouts(thing)) is not None}

    def remember(self) -> None:
        """Add to the history of each object."""
        for thing, history in self.history.items():
            found = self.whereabouts(thing)
            if found is not None and (not history or history[-1][0] != found[0]):
                history.append(found)


def made_up(task: str, rng: random.Random) -> list[Story]:
    """The five questions about one new world.

    Args:
        task: `qa1` (where is a person), `qa2` (where is an object) or `qa3` (where was an object before).
    """
    return _people_stories(rng) if task == "qa1" else _object_stories(task, rng)


def _people_stories(rng: random.Random) -> list[Story]:
    world, stories = World(rng), []
    for _ in range(NUM_QUESTIONS):
        world.move()
        world.move()
        person = rng.choice([name for name in PEOPLE if world.told.get(name, -RECENT) >= len(world.facts) - RECENT])
        support = (world.told[person],)
        stories.append(Story(tuple(world.facts), f"Where is {person}?", world.room_of[person], support))
    return stories


def _object_stories(task: str, rng: random.Random) -> list[Story]:
    """After three facts or more, each fact is followed by a question with probability 1/2, if one can be answered."""
    world, since = World(rng), 0
    stories: list[Story] = []
    while len(stories) < NUM_QUESTIONS:
        if rng.random() < MOVES or not world.handle():
            world.move()
        world.remember()
        since += 1
        asked = _question(task, world, rng) if since > 2 and rng.random() < 0.5 else None
        if asked is not None:
            stories.append(asked)
            since = 0
    return stories


def _question(task: str, world: World, rng: random.Random) -> Story | None:
    facts = tuple(world.facts)
    if task == "qa2":
        known = world.known_things()
        if not known:
            return None
        thing = rng.choice(sorted(known))
        room, support = known[thing]
        return Story(facts, f"Where is the {thing}?", room, support)
    things = [thing for thing, history in world.history.items() if len(history) > 1]
    if not things:
        return None
    thing = rng.choice(things)
    (before, early), (room, late) = world.history[thing][-2:]
    return Story(facts, f"Where was the {thing} before the {room}?", before, tuple(sorted({*early, *late})))
