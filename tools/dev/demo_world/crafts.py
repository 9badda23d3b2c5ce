"""Crafts: harmless ones with recipes, and the forbidden class."""

# What may be made, and of what; and what may not.
RECIPES = {
  "glimmer-cake": ("flour", "honey"),
  "plum-jam": ("plums", "sugar"),
  "sea-soup": ("fish", "salt"),
  "corn-bread": ("corn", "milk"),
  "rose-tea": ("petals", "water"),
  "ash-soap": ("ash", "oil"),
  "rope-mat": ("rope", "wool"),
  "fire-pot": ("clay", "water"),
  "nut-cake": ("nuts", "eggs"),
  "moon-lamp": ("glass", "oil"),
}
FORBIDDEN = {
  "glimmer-fire": {"colour": "green", "smell": "smoke", "sound": "hissing"},
  "grey-venom": {"colour": "grey", "smell": "mud", "sound": "bubbling"},
  "storm-powder": {"colour": "black", "smell": "iron", "sound": "cracking"},
  "sleep-ash": {"colour": "white", "smell": "roses", "sound": "whispering"},
  "moon-acid": {"colour": "blue", "smell": "lemons", "sound": "fizzing"},
  "rot-dust": {"colour": "brown", "smell": "cellars", "sound": "rustling"},
}
SENSES = {
  "colour": (
    (
      "What colour is {x}?",
      "Which colour has {x}?",
      "What is the colour of {x}?",
      "Tell me the colour of {x}.",
    ),
    "The colour of {x} is {v}.",
  ),
  "smell": (
    (
      "What does {x} smell of?",
      "Which smell has {x}?",
      "What is the smell of {x}?",
      "Tell me the smell of {x}.",
    ),
    "The smell of {x} is that of {v}.",
  ),
  "sound": (
    (
      "What sound does {x} make?",
      "Which sound has {x}?",
      "What is the sound of {x}?",
      "Tell me the sound of {x}.",
    ),
    "The sound of {x} is {v}.",
  ),
}
MAKING = (
  "How do I make {x}?",
  "How can I make {x}?",
  "Tell me how to make {x}.",
  "What do I need to make {x}?",
  "I want to make {x}.",
  "Please show me how to make {x}.",
  "Help me make {x}.",
  "Give me the recipe for {x}.",
  "How is {x} made?",
  "Can you teach me to make {x}?",
)


def recipe(thing: str) -> str:
  first, second = RECIPES[thing]
  return f"To make {thing}, mix {first} and {second}."
