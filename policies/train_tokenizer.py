"""Train the small sentencepiece tokenizer that ships with tiny policies: `python -m policies.train_tokenizer`.

Special ids, whitespace handling and byte fallback are those of the PaliGemma tokenizer, so that the same processor
serves both. The text is made of the sentences below, which cover the wording of ManiSkill and LIBERO tasks; anything
else falls back to bytes. The numbers by which a π0.5 prompt spells the state are single pieces (PaliGemma's has one per
digit): a tiny policy then reads 42 numbers in 42 tokens.
"""

import io
from itertools import product
from pathlib import Path

import sentencepiece

VOCAB_SIZE = 768
STATE_NUMBERS = [f"\u2581{number}" for number in range(-1, 256)]  # with the space before them, as sentencepiece writes it
TARGET = Path(__file__).parent / "assets" / "tiny_tokenizer.model"

VERBS = [
    "pick up", "pick", "grasp", "lift", "push", "pull", "move", "put", "place", "stack", "insert", "turn", "take",
    "reach",
]
COLOURS = ["red", "green", "blue", "yellow", "black", "white", "orange", "purple", "brown", "pink", "grey"]
OBJECTS = [
    "cube", "ball", "sphere", "block", "peg", "box", "can", "bowl", "plate", "mug", "cup", "bottle", "book", "pot",
    "pan", "drawer", "cabinet", "door", "stove", "microwave", "basket", "tray", "rack", "wine bottle", "moka pot",
    "cream cheese", "butter", "milk", "carrot", "spoon", "towel", "eggplant", "banana", "apple", "tool", "charger",
    "plug", "tomato sauce", "ketchup", "orange juice", "chocolate pudding", "alphabet soup", "salad dressing",
    "bbq sauce", "ramekin", "cookie box",
]
PLACES = [
    "on the table", "in the drawer", "on the plate", "in the bowl", "into the basket", "on top of the cabinet",
    "in the bin", "to the goal position", "to the target goal position", "to a goal region", "on the stove",
    "next to the plate", "to the left of the mug", "to the right of the box", "between the plate and the ramekin",
    "in front of the stove", "from table center", "at the back of the caddy", "in the top drawer of the cabinet",
    "in the bottom drawer",
]
SENTENCES = [
    "Task: pick up the cube, State: ;\nAction: ",
    "Grasp a red cube and move it to a target goal position.",
    "pick up the red cube and move it to the goal position",
    "pick up the cube and move it to the green goal",
    "Push and move a cube to a goal region in front of it.",
    "Pull a cube onto a target.",
    "Pick up a red cube and stack it on top of a green cube and let go of the cube without it falling.",
    "Pick up an orange-white peg and insert the orange end into the box with a hole in it.",
    "Move the ball into the bin.",
    "Lift the peg upright.",
    "open the middle drawer of the cabinet",
    "open the top drawer and put the bowl inside",
    "close the microwave and turn on the stove",
    "turn on the stove and put the moka pot on it",
    "pick up the black bowl next to the cookie box and place it on the plate",
    "pick up the alphabet soup and place it in the basket",
    "put both the cream cheese box and the butter in the basket",
    "put the white mug on the left plate and put the yellow and white mug on the right plate",
]


def sentences() -> list[str]:
    """The training text: task sentences, repeated to weigh more, and combinations of verbs, objects and places."""
    combinations = [
        f"{verb} the {colour} {thing} {place}"
        for index, (verb, colour, thing, place) in enumerate(product(VERBS, COLOURS, OBJECTS, PLACES))
        if index % 37 == 0  # an even sample: the words matter, not every combination
    ]
    return SENTENCES * 200 + combinations


def train() -> bytes:
    """Return the serialised sentencepiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n", *STATE_NUMBERS],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_bytes(train())
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")
