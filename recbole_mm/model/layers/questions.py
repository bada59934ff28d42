"""What image-LLM alignment asks of the next item: four properties, five ways to ask for each.

Source: Kim et al., "Image is All You Need", 2025, figure 11.
"""

from __future__ import annotations

PROPERTIES = ("title", "brand", "category", "description")

QUESTIONS: dict[str, tuple[str, ...]] = {
    "title": (
        "What's the title of the next item this user plan to buy?",
        "Which item is this user likely to buy next?",
        "What's the name of the next item this user is considering buying?",
        "What is the title of the next product this user plans to buy?",
        "What's the title of the next purchase this user is planning?",
    ),
    "brand": (
        "What brand will this user go for with the next item?",
        "Which brand will the user choose for their next item?",
        "What brand is the user likely to pick for their next purchase?",
        "What brand will the user decide on for their next item?",
        "Which brand could this user go with for their next product?",
    ),
    "category": (
        "Which product category will the user shop from next?",
        "Which category will the user choose for the next purchase?",
        "From which category will the user's next item be selected?",
        "What will be the next category of purchase for this user?",
        "In which category will the user's next purchase fall?",
    ),
    "description": (
        "Please describe the details of the next item that this user would consume.",
        "Please give a detailed description of the next item this user intends to consume.",
        "Could you describe the characteristics of the next item this user would consume?",
        "Describe the features of the next item this user is likely to consume.",
        "Can you share the specifics of the next item this user is going to consume?",
    ),
}
# What stands before an answer's value.
ANSWERS = {
    "title": "The title of the next item to be consumed is",
    "brand": "The brand of the next item to be consumed is",
    "category": "The category of the next item to be consumed is",
    "description": "The details of the next item to be consumed is as follows:",
}
