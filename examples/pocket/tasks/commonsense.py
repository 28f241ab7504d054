# SPDX-License-Identifier: Apache-2.0
"""Commonsense: what somebody does next, where a thing is now, which of three things is the biggest or smallest."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from math import comb, perm
from random import Random
from typing import Any

from .items import Item, Kind, multiple_choice, table


LEFT_THERE, MOVED_ON = 0.5, 0.6  # how often a thing is put down, and how often its bearer then goes elsewhere


def kinds() -> list[Kind]:
    stories = table("stories")
    names, reactions, starts = len(stories["names"]), len(stories["reactions"]), len(stories["starts"])
    places, objects, sizes = len(stories["places"]), len(stories["objects"]), len(stories["sizes"])
    endings = (
        1 + 1 + (places - 1)
    )  # the thing is carried along, or left; then its bearer stays, or goes to another place
    located = perm(names, 2) * objects * perm(places, 3) * 3 * endings
    ordered = comb(sizes, 3) * 2 * 2  # two orders of the facts, two questions
    return [
        Kind("reaction", 5, starts * names * reactions * comb(reactions - 1, 3), partial(_reaction, stories)),
        Kind("location", 4, located * comb(places - 1, 3), partial(_location, stories)),
        Kind("size", 2, ordered * (sizes - 3), partial(_size, stories)),
    ]


def _reaction(stories: dict[str, Any], random: Random) -> Item:
    name = random.choice(stories["names"])
    cause, effect = random.choice(stories["reactions"])
    wrong = random.sample([other for _, other in stories["reactions"] if other != effect], 3)
    prompt = f"{random.choice(stories['starts'])}{name} {cause}. So {name}"
    return multiple_choice(prompt, f"{effect}.", [f"{other}." for other in wrong], f"{prompt} {effect}.", random)


def _location(stories: dict[str, Any], random: Random) -> Item:
    """Somebody takes a thing to another place, and perhaps leaves it there; somebody else goes somewhere meanwhile."""
    bearer, other = random.sample(stories["names"], 2)
    thing = random.choice(stories["objects"])
    origin, goal, elsewhere = random.sample(stories["places"], 3)
    story = [f"{bearer} took the {thing} in the {origin}.", f"{bearer} went to the {goal}."]
    story.insert(random.randrange(3), f"{other} went to the {elsewhere}.")
    not_goal = [place for place in stories["places"] if place != goal]
    if random.random() < LEFT_THERE:
        story.append(f"{bearer} left the {thing} there.")
        if random.random() < MOVED_ON:
            story.append(f"Then {bearer} went to the {random.choice(not_goal)}.")
    prompt = " ".join(story) + f"\nQuestion: Where is the {thing}?\nAnswer:"
    return multiple_choice(prompt, goal, random.sample(not_goal, 3), f"{prompt} {goal}", random)


def _size(stories: dict[str, Any], random: Random) -> Item:
    """The table of sizes goes from large to small."""
    sizes = stories["sizes"]
    chosen = [sizes[i] for i in sorted(random.sample(range(len(sizes)), 3))]
    facts = [f"The {larger} is bigger than the {smaller}." for larger, smaller in pairwise(chosen)]
    random.shuffle(facts)
    asked, right = random.choice([("biggest", chosen[0]), ("smallest", chosen[2])])
    prompt = " ".join(facts) + f"\nQuestion: Which is the {asked}?\nAnswer:"
    outside = random.choice([size for size in sizes if size not in chosen])
    wrong = [size for size in chosen if size != right]
    return multiple_choice(prompt, right, [*wrong, outside], f"{prompt} {right}", random)
